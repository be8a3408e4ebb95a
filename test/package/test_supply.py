"""What comes from outside: nothing runs code of a checkpoint, every package is pinned once."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {".py", ".md", ".yaml", ".yml", ".json", ".toml", ".sh", ".xml", ".txt", ""}
LEFT_BY_TOOLS = {"build", "install", "log", "dist"}  # besides every hidden folder

SETTING = re.compile(r"trust_remote_code[\"']?\s*(=|:)\s*(True|true|1|yes)", re.IGNORECASE)


def tree_files() -> Iterator[Path]:
    """Text files of the project, without what tools leave in the tree."""
    for folder, folders, names in os.walk(ROOT):
        hidden = {name for name in folders if name.startswith(".") and name != ".ci"}
        folders[:] = sorted(set(folders) - hidden - LEFT_BY_TOOLS)
        for name in names:
            if Path(name).suffix in TEXTS and name != "tokenizer.json":
                yield Path(folder) / name


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def enables_remote_code(name: str, text: str) -> bool:
    """Whether a file switches on `trust_remote_code` (a Python file: passes anything but False)."""
    if not name.endswith(".py"):
        return SETTING.search(text) is not None
    passed: list[ast.expr] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            passed.append(node.value)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    passed.append(value)
    return not all(is_false(value) for value in passed)


def test_no_file_of_the_tree_lets_a_checkpoint_run_code() -> None:
    files = list(tree_files())
    assert any(path.suffix == ".py" for path in files)
    guilty = [
        str(path.relative_to(ROOT))
        for path in files
        if path != Path(__file__).resolve()
        and enables_remote_code(path.name, path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert guilty == []


@pytest.mark.parametrize(
    ("name", "text", "guilty"),
    [
        ("a.py", "load(x, trust_remote_code=True)", True),
        ("a.py", "load(x, trust_remote_code=flag)", True),
        ("a.py", "load(x, **{'trust_remote_code': True})", True),
        ("a.py", "load(x, trust_remote_code=False)", False),
        ("a.py", "# never trust_remote_code=True", False),
        ("a.yaml", "trust_remote_code: true", True),
        ("a.yaml", "trust_remote_code: false", False),
        ("a.sh", "run --set trust_remote_code=1", True),
    ],
)
def test_remote_code_is_recognised(name: str, text: str, guilty: bool) -> None:
    assert enables_remote_code(name, text) is guilty


def pins(file: str) -> list[tuple[str, str, str]]:
    """(name, version, marker) of every line that installs something."""
    found = []
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if requirement:
            match = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?==([\w.+]+)(?:\s*;\s*(.*))?", requirement)
            assert match, f"{file}: {requirement!r} is not an exact pin"
            found.append((match[1].lower(), match[2], match[3] or ""))
    return found


def test_every_requirement_is_pinned_exactly_and_once() -> None:
    direct = [pin for file in sorted(ROOT.glob("requirements*.txt")) for pin in pins(file.name)]
    pulled_in = pins("constraints.txt")
    places = [(name, marker) for name, _, marker in direct + pulled_in]
    assert len(places) == len(set(places))
    both = {name for name, _, _ in direct} & {name for name, _, _ in pulled_in}
    assert both == set(), "pinned in two places: run tools/lock.sh"


def test_no_address_of_a_package_registry_is_in_the_tree() -> None:
    words = re.compile(
        r"(extra-)?index-url|--find-links|-f https?:|pypi\.org/simple", re.IGNORECASE
    )
    files = [*ROOT.glob("requirements*.txt"), ROOT / "constraints.txt", ROOT / "Makefile"]
    files += [ROOT / ".ci" / "run", *(ROOT / "tools").iterdir()]
    found = [
        path.name for path in files if path.is_file() and words.search(path.read_text("utf-8"))
    ]
    assert found == []
