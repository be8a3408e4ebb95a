"""The README says what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools/readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.ros
def test_generated_parts_are_up_to_date(readme: ModuleType) -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.rendered(text) == text, "run: tools/run python tools/readme.py"


def test_every_generated_part_is_in_the_readme(readme: ModuleType) -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- generated: (\w+) -->", text)) == set(readme.PARTS)


def test_the_quickstart_has_the_two_commands_and_nothing_else(readme: ModuleType) -> None:
    text = readme.README.read_text(encoding="utf-8")
    first = re.search(r"```(?:bash)?\n(.*?)```", text, re.S)
    assert first is not None
    commands = [line.split("#")[0].strip() for line in first[1].splitlines()]
    assert [c for c in commands if c] == ["make demo", "make test"]


def test_pictures_and_files_that_the_readme_names_exist(readme: ModuleType) -> None:
    text = readme.README.read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#]+)\)", text)
    local = [name for name in named if not name.startswith("http")]
    assert local, "the README shows no picture of the demo"
    assert [name for name in local if not (ROOT / name).exists()] == []
