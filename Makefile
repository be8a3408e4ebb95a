# The two commands of the quickstart, and the rest. `make help` lists them.

PYTHON ?= python3
ARGS ?=
SEED ?= 1
FRAMES ?= 200

# A ROS installation that was sourced in this shell would be mixed with the wheels of the set-up.
unexport PYTHONPATH PYTHONHOME AMENT_PREFIX_PATH COLCON_PREFIX_PATH ROS_DISTRO RMW_IMPLEMENTATION

SET_UP := $(PYTHON) tools/set_up.py
RUN := bash tools/run

.DEFAULT_GOAL := help
.PHONY: help demo test torture node-check bench lint format docs setup evaluate clean distclean python

help:
	@echo "make demo       set up what is missing, run the demo, leave build/demo/report.html"
	@echo "make test       set up what is missing, run the whole test suite (ARGS=... go to pytest)"
	@echo "make node-check the node under load (ARGS=\"--seconds 10\"), leaves build/node/summary.json"
	@echo "make torture    hostile input and faults, 15 min (ARGS=\"--row NAME\", \"--soak 8h\"): build/torture/summary.json"
	@echo "make bench      against transformers' generate, leaves build/bench/summary.json"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite the sources"
	@echo "make docs       the documentation's site, leaves build/docs/index.html"
	@echo "make evaluate   score the embedded model on renders of its world: SEED=1 FRAMES=200"
	@echo "make setup      only the set-up: .venv, requirements, ROS 2 wheels, colcon build"
	@echo "make clean      remove what was built; make distclean removes .venv too"

python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "set-up: no $(PYTHON) here. Debian 12, Ubuntu 24.04:"; \
	  echo "  sudo apt-get update && sudo apt-get install -y python3 python3-venv"; exit 1; }

setup: python
	@$(SET_UP)

demo: setup
	@$(RUN) librobot-vlm demo --out build/demo $(ARGS)

test: setup
	@LIBROBOT_VLM_REQUIRE_ROS=1 $(RUN) python -m pytest $(ARGS)

torture: setup
	@$(RUN) python test/torture/run.py $(ARGS)

node-check: setup
	@$(RUN) python -m librobot_vlm_ros.bench.node_check $(ARGS)

bench: setup
	@$(RUN) librobot-vlm bench --out build/bench $(ARGS)

lint: setup
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

format: setup
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

docs: python
	@$(SET_UP) --extra docs
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet --strict
	@echo "build/docs/index.html"

evaluate: python
	@$(SET_UP) --extra tabletop
	@$(RUN) python -m librobot_vlm_ros.tabletop.evaluate \
	  --seed $(SEED) --frames $(FRAMES) --out build/evaluate $(ARGS)

clean:
	rm -rf build install log .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf .venv
