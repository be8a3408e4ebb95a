"""Who may import whom: `ros -> runtime -> models -> core`, never back."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "librobot_vlm_ros"
SOURCES = Path(__file__).resolve().parents[2] / PACKAGE

#: Room -> the rooms (or single modules of them) that it may import, besides itself.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "tensors": {"core"},
    "console": {"core"},
    "evaluation": {"core"},
    "bags": {"core"},
    "models": {"core"},
    "runtime": {"core", "models.backend"},
    "ros": {"runtime", "models", "core"},
    "client": {"core", "tensors"},
    "replay": {"client", "bags", "core", "ros.parameters.parameter_syntax"},
    "annotate": {"ros", "runtime", "models", "core", "bags", "console", "replay.message_types"},
    "doctor": {"ros", "runtime", "models", "core"},
    "demo": {"replay", "client", "bags", "models", "core", "console", "evaluation", "tabletop"},
    "tabletop": {"core", "models", "bags", "evaluation"},
    "bench": {
        *("runtime", "models", "core", "bags", "console", "client", "ros.dds", "cli.arguments"),
    },
    "cli": {
        *("ros", "runtime", "models", "core", "bags", "tensors", "console", "client"),
        *("annotate", "replay", "doctor", "demo", "bench", "tabletop", "evaluation"),
    },
}
#: Rooms of the node's own process, and of those that talk to it.
_WITH_ROS = {"ros", "cli", "client", "replay", "annotate", "doctor", "demo", "bench"}

#: Packages from outside that are at home in some rooms only.
AT_HOME: dict[str, set[str]] = {
    "torch": {"models", "tabletop", "bench", "doctor"},
    "transformers": {"models", "tabletop", "bench", "doctor"},
    "safetensors": {"models", "tabletop"},
    "tokenizers": {"models", "tabletop", "bench"},
    "peft": {"models"},
    "bitsandbytes": {"models"},
    "pybullet": {"tabletop"},
    "rclpy": _WITH_ROS,
    "launch": {"ros", "cli"},
    "launch_ros": {"ros", "cli"},
}


def imported_names(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Full dotted names that `source`, the text of `module`, imports anywhere in it."""
    parts = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                up = node.level - 1 if is_package else node.level
                base = parts[: len(parts) - up]
            else:
                base = []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{stem}.{alias.name}"


def wrong_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of `module` that its room may not make."""
    room = module.split(".")[1] if "." in module else ""
    if room not in ALLOWED:
        return []
    wrong = []
    for name in imported_names(source, module, is_package):
        parts = name.split(".")
        if parts[0] == PACKAGE:
            inner = ".".join(parts[1:])
            own = [room, *ALLOWED[room]]
            if room in _WITH_ROS:
                own += ["msg", "srv", "action"]
            known = [*ALLOWED, "msg", "srv", "action"]
            fine = any(inner == good or inner.startswith(f"{good}.") for good in own)
            if parts[1:] and parts[1] in known and not fine:
                wrong.append(f"{module} imports {name}")
        elif parts[0] in AT_HOME and room not in AT_HOME[parts[0]]:
            wrong.append(f"{module} imports {name}")
        elif parts[0].endswith("_msgs") and room not in _WITH_ROS:
            wrong.append(f"{module} imports the messages {name}")
    return wrong


def modules() -> list[tuple[Path, str, bool]]:
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(SOURCES).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        found.append((path, ".".join(parts[:-1] if is_package else parts), is_package))
    return found


def test_no_import_goes_against_the_direction_of_the_rooms() -> None:
    found = modules()
    assert len(found) > 5
    wrong = [
        line
        for path, module, is_package in found
        for line in wrong_imports(path.read_text(encoding="utf-8"), module, is_package)
    ]
    assert wrong == []


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, each sorted (Tarjan's strong components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        open_.append(name)
        for other in imports.get(name, ()):
            if other not in number:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in open_:
                lowest[name] = min(lowest[name], number[other])
        if lowest[name] == number[name]:
            group = open_[open_.index(name) :]
            del open_[-len(group) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(imports):
        if name not in number:
            visit(name)
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = {module for _, module, _ in modules()}
    imports: dict[str, set[str]] = {}
    for path, module, is_package in modules():
        names = imported_names(path.read_text(encoding="utf-8"), module, is_package)
        imports[module] = {
            name if name in known else name.rpartition(".")[0] for name in names
        } & known - {module}
    assert circles(imports) == []


#: Inside `models/` a room or module imports those below it in this list, and none above.
MODELS = (
    *("testing", "families", "vlm", "local_backend", "processor", "training", "generation"),
    *("cache", "inputs", "checkpoints", "fake", "registry", "catalog", "placement"),
    *("configuration", "backend"),
)


def upward_imports(source: str, module: str) -> list[str]:
    """Imports of a module in `models/` that go up in MODELS."""
    room = module.split(".")[2]
    return [
        f"{module} imports {name}"
        for name in imported_names(source, module, is_package=False)
        if name.startswith(f"{PACKAGE}.models.")
        and name.split(".")[2] in MODELS
        and MODELS.index(name.split(".")[2]) < MODELS.index(room)
    ]


def test_inside_models_the_arrows_run_one_way() -> None:
    found = [
        (path, module)
        for path, module, _ in modules()
        if module.startswith(f"{PACKAGE}.models.") and module.count(".") >= 2
    ]
    assert {module.split(".")[2] for _, module in found} == set(MODELS)
    wrong = [
        line
        for path, module in found
        for line in upward_imports(path.read_text(encoding="utf-8"), module)
    ]
    assert wrong == []


def test_an_arrow_that_goes_up_in_models_is_found() -> None:
    line = "from librobot_vlm_ros.models.families.llava.model import LlavaVLM"
    assert len(upward_imports(line, f"{PACKAGE}.models.local_backend")) == 1
    assert (
        upward_imports(
            "from librobot_vlm_ros.models.vlm import Parts",
            f"{PACKAGE}.models.families.llava.model",
        )
        == []
    )


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_folder_lists_more_than_about_fifteen_entries() -> None:
    folders = {path.parent for path in SOURCES.rglob("*.py")}
    entries = {
        str(folder.relative_to(SOURCES)): [
            path.name
            for path in folder.iterdir()
            if not path.name.startswith("__") and path.name != "py.typed"
        ]
        for folder in folders
    }
    assert {name: len(found) for name, found in entries.items() if len(found) > 16} == {}


def test_every_room_has_a_rule() -> None:
    rooms = {path.parent.name for path in SOURCES.glob("*/*.py")}
    rooms |= {path.stem for path in SOURCES.glob("*.py")} - {"__init__"}
    assert rooms <= set(ALLOWED), f"say in ALLOWED what {rooms - set(ALLOWED)} may import"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core.images.raw", "from librobot_vlm_ros.models import create_vlm"),
        ("core.images.raw", "from ...runtime import engine"),
        ("core.images.raw", "import torch"),
        ("models.families.llava.model", "from librobot_vlm_ros import runtime"),
        ("models.families.llava.model", "import librobot_vlm_ros.ros.main"),
        ("models.families.llava.model", "def f():\n    import rclpy"),
        ("runtime.engine", "from librobot_vlm_ros.models import create_vlm"),
        ("runtime.engine", "from librobot_vlm_ros.models.families.florence2.model import Florence"),
        ("runtime.engine", "from sensor_msgs.msg import Image"),
        ("runtime.engine", "from librobot_vlm_ros.msg import Caption"),
        ("ros.node", "import torch.nn"),
        ("tabletop.train", "from librobot_vlm_ros.ros import messages"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, line: str) -> None:
    assert len(wrong_imports(line, f"{PACKAGE}.{module}")) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core.images.raw", "from ..errors import ImageError"),
        ("core.images.raw", "import numpy as np"),
        ("models.families.llava.model", "from librobot_vlm_ros.core import Frame"),
        ("models.families.llava.model", "import torch"),
        ("runtime.engine", "from librobot_vlm_ros.models.backend import VlmBackend"),
        ("runtime.engine", "from ..core.errors import ErrorCode"),
        ("ros.node", "from librobot_vlm_ros.msg import Caption"),
        ("cli.main", "from librobot_vlm_ros.ros.main import main"),
    ],
)
def test_a_right_arrow_passes(module: str, line: str) -> None:
    assert wrong_imports(line, f"{PACKAGE}.{module}") == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("librobot_vlm_ros", ["torch", "transformers", "rclpy", "numpy", "cv2"]),
        ("librobot_vlm_ros.core", ["torch", "transformers", "rclpy"]),
        ("librobot_vlm_ros.models", ["torch", "transformers", "rclpy"]),
        ("librobot_vlm_ros.runtime", ["torch", "transformers", "rclpy"]),
        ("librobot_vlm_ros.bags", ["torch", "transformers", "rclpy"]),
        ("librobot_vlm_ros.tabletop", ["pybullet", "rclpy"]),
    ],
)
def test_importing_a_room_loads_nothing_heavy(module: str, unwanted: list[str]) -> None:
    script = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr or done.stdout
