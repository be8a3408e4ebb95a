"""The page on adding a family is a program: its blocks, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/adding-a-family.md"
_BLOCK = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, *command: str) -> str:
    """What `python command` prints; a process of its own, for what it registers stays."""
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_a_whole_family_and_a_size(written: Path) -> None:
    files = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    family = ("configuration.py", "variants.json", "checkpoint.py", "processor.py", "model.py")
    tests = {"tests/test_pointer.py", "tests/test_sizes.py"}
    assert files == {"my_vlms/sizes.py", *tests, *(f"my_vlms/pointer/{name}" for name in family)}


def test_its_tests_pass(written: Path) -> None:
    report = run(written, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert re.search(r"\b4 passed", report), report


def test_its_code_is_as_clean_as_ours(written: Path) -> None:
    settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    docstrings = ["--ignore", "D,I,INP"]  # the page's own text explains
    run(written, "-m", "ruff", "check", *settings, *docstrings, ".")
    run(written, "-m", "ruff", "format", *settings, "--check", ".")


def test_the_family_is_three_classes_deep(written: Path) -> None:
    names = run(
        written,
        "-c",
        "import json; from my_vlms.pointer.model import PointerVLM; "
        "print(json.dumps([c.__name__ for c in PointerVLM.__mro__ "
        "if c.__module__.startswith(('my_vlms', 'librobot'))]))",
    )
    assert json.loads(names) == ["PointerVLM", "CausalLM", "AbstractVLM"]
