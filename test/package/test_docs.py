"""The documentation says what the code says: its tables, and the paths and names in its text."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import librobot_vlm_ros

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "librobot_vlm_ros"
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
DRAWINGS = sorted((ROOT / "docs/drawings").glob("*.svg"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load("docs_tables")


@pytest.fixture(scope="module")
def site() -> ModuleType:
    return load("docs_site")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.ros
@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_generated_tables_are_up_to_date(tables: ModuleType, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.rendered(text) == text, "run: tools/run python tools/docs_tables.py"


def test_every_generated_table_is_in_one_page(tables: ModuleType) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert Counter(re.findall(r"<!-- generated: (\w+) -->", text)) == Counter(list(tables.PARTS))


def test_a_stale_table_is_told(tables: ModuleType) -> None:
    page = "before <!-- generated: errors -->\nold\n<!-- end --> behind"
    fresh = tables.rendered(page)
    assert fresh.startswith("before <!-- generated: errors -->\n| about | codes |")
    assert fresh.endswith("<!-- end --> behind")


#: What the repository holds, as the text names it in code marks.
FOLDERS = "librobot_vlm_ros|test|tools|config|launch|msg|srv|action|docs"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize(
    ("heading", "word", "most"), [("frame", "Twelve", 12), ("step", "Ten", 10)]
)
def test_the_tables_of_the_ways_have_as_many_files_as_they_say(
    heading: str, word: str, most: int
) -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = re.search(rf"^## .*{heading}$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    assert f"{word} files, from" in section[1]
    steps = re.findall(r"^\| (\d+) \| `([^`]+)`", section[1], re.MULTILINE)
    assert [step for step, _ in steps] == [str(step) for step in range(1, most + 1)]
    missing = {path for _, path in steps if not (PACKAGE / path).exists()}
    assert missing <= {"processor.py"}  # of the family


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_module_that_a_page_runs_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m (librobot_vlm_ros[\w.]*)", text))
    places = {name: ROOT / name.replace(".", "/") for name in modules}
    missing = {
        name
        for name, place in places.items()
        if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file())
    }
    assert missing == set()


def test_every_name_of_the_api_pages_is_there() -> None:
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    texts = "".join(page.read_text(encoding="utf-8") for page in pages)
    named = re.findall(r"^::: ([\w.]+)", texts, re.MULTILINE)
    assert len(named) > 5
    for name in named:
        assert pkgutil.resolve_name(name) is not None


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^|&& )make ([a-z-]+)", text, re.MULTILINE)) <= targets


@pytest.mark.parametrize("drawing", DRAWINGS, ids=ids)
def test_every_file_and_room_in_a_drawing_exists(drawing: Path) -> None:
    texts = re.findall(r"<text[^>]*drawing-name[^>]*>([^<]*)<", drawing.read_text(encoding="utf-8"))
    named = {word for text in texts for word in re.findall(r"[\w]+(?:/[\w.]+)+", text)}
    assert {name for name in named if not (PACKAGE / name).exists()} == set()


def test_the_rooms_in_the_drawing_are_those_of_the_package() -> None:
    text = (ROOT / "docs/drawings/rooms.svg").read_text(encoding="utf-8")
    names = re.findall(r"<text[^>]*drawing-name[^>]*>([^<]*)<", text)
    drawn = {word for name in names for word in re.findall(r"\w+", name)}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert drawn == rooms


def test_messages_become_tables(site: ModuleType) -> None:
    request = "# What it is.\n\nuint16 code  # 0 = fine | else wrong\nfloat32[4] box\n"
    text = f"{request}---\nstring text # <b>\n"
    assert list(site.interface(text, ["Request", "Response"])) == [
        "What it is.\n",
        "**Request**\n",
        "| field | type | meaning |",
        "| --- | --- | --- |",
        "| `code` | `uint16` | 0 = fine \\| else wrong |",
        "| `box` | `float32[4]` |  |",
        "",
        "**Response**\n",
        "| field | type | meaning |",
        "| --- | --- | --- |",
        "| `text` | `string` | &lt;b&gt; |",
        "",
    ]


def test_drawings_and_files_become_part_of_the_page(site: ModuleType) -> None:
    page = "![what it shows](drawings/rooms.svg)\n<!-- file: CONTRIBUTING.md -->"
    page = site.on_page_markdown(page)
    assert '<div class="drawing">\n<svg ' in page
    assert "drawings/" not in page
    assert "# Contributing" in page
    assert "(adding-a-family.md)" in page  # a link of the site, not of the repository
    assert "](docs/" not in page


def test_every_field_of_every_interface_is_in_the_page_of_messages(site: ModuleType) -> None:
    text = "\n".join(site.interfaces())
    for kind in ("msg", "srv", "action"):
        for path in ROOT.glob(f"{kind}/*.{kind}"):
            assert f"## {kind}/{path.stem} " in text
            source = path.read_text(encoding="utf-8")
            for name in re.findall(r"^[a-z][\w/]*(?:\[\d*\])?\s+(\w+)", source, re.MULTILINE):
                assert f"| `{name}` |" in text


def test_a_message_that_cannot_be_read_is_told(site: ModuleType) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        list(site.interface("# What.\n\nstring\n", [""]))
    with pytest.raises(ValueError, match="expected 2 parts"):
        list(site.interface("# What.\n\nstring a\n", ["Request", "Response"]))


@pytest.mark.filterwarnings("ignore:nodes.Node.traverse:DeprecationWarning")  # catkin_pkg's
def test_the_changelog_has_a_section_of_the_version_that_ros_tools_find() -> None:
    versions = pytest.importorskip("catkin_pkg.package_version")
    text = (ROOT / "CHANGELOG.rst").read_text(encoding="utf-8")
    forthcoming = versions.get_forthcoming_label(text)
    released = re.findall(r"^(\d+\.\d+\.\d+) \(\d{4}-\d{2}-\d{2}\)$", text, re.MULTILINE)
    version = librobot_vlm_ros.__version__
    assert forthcoming == f"{version} (forthcoming)" or version in released
