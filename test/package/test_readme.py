"""The README is short, and says what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(TEXT.splitlines()) <= 150


def test_the_quickstart_has_the_two_commands_and_nothing_else() -> None:
    first = re.search(r"```(?:bash)?\n(.*?)```", TEXT, re.S)
    assert first is not None
    commands = [line.split("#")[0].strip() for line in first[1].splitlines()]
    assert [c for c in commands if c] == ["make demo", "make test"]


def test_pictures_and_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT)
    local = [name for name in named if not name.startswith("http")]
    assert any(name.endswith(".png") for name in local), "the README shows no picture of the demo"
    assert [name for name in local if not (ROOT / name).exists()] == []


def test_every_page_of_the_documentation_is_in_the_list_to_read_on() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    pages -= {"index.md", "contributing.md", "messages.md"}  # this page, a file beside it, the API
    assert {page for page in pages if f"(docs/{page})" not in TEXT} == set()
