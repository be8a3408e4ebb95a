"""Hooks of mkdocs.yml: pages that are made from files of the repository while the site is built.

- A page with `<!-- interfaces -->` gets a table for each .msg, .srv and .action file.
- A page with `<!-- file: NAME -->` gets that Markdown file, its links made those of the site.
- A drawing becomes part of the page, so that it has the colours of the page's theme.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_FIELD = re.compile(r"(?P<type>[\w/]+(?:\[\d*\])?)\s+(?P<name>\w+)(?:\s*=\s*(?P<value>\S+))?\s*")
_DRAWING = re.compile(r"!\[[^\]]*\]\((drawings/[\w-]+\.svg)\)")
_PARTS = {"msg": [""], "srv": ["Request", "Response"], "action": ["Goal", "Result", "Feedback"]}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in what the marks ask for."""
    markdown = re.sub(r"<!-- file: (\S+) -->", lambda match: file_page(match[1]), markdown)
    markdown = _DRAWING.sub(lambda match: drawing(match[1]), markdown)
    return markdown.replace("<!-- interfaces -->", "\n".join(interfaces()))


def file_page(name: str) -> str:
    """A Markdown file of the repository as a page of the site."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return text.replace("](docs/", "](")


def drawing(name: str) -> str:
    """An SVG file as part of a page."""
    svg = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return f'<div class="drawing">\n{svg}</div>'


def interfaces() -> Iterator[str]:
    """Every interface as a section with a table of its fields."""
    for kind, parts in _PARTS.items():
        for path in sorted(ROOT.glob(f"{kind}/*.{kind}")):
            yield f"## {kind}/{path.stem} {{ #{path.stem.lower()} }}\n"
            yield from interface(path.read_text(encoding="utf-8"), parts)


def interface(text: str, parts: list[str]) -> Iterator[str]:
    """The introduction of one file, and a table for each of its parts."""
    intro, _, rest = text.partition("\n\n")
    yield " ".join(line.removeprefix("#").strip() for line in intro.splitlines()) + "\n"
    sections = re.split(r"^---$", rest, flags=re.MULTILINE)
    if len(sections) != len(parts):
        raise ValueError(f"expected {len(parts)} parts divided by ---, found {len(sections)}")
    for title, section in zip(parts, sections, strict=True):
        if title:
            yield f"**{title}**\n"
        yield from _table(section) if section.strip() else ("Empty.\n",)


def _table(section: str) -> Iterator[str]:
    constants = "=" in re.sub(r"#.*", "", section)
    yield "| constant | value | meaning |" if constants else "| field | type | meaning |"
    yield "| --- | --- | --- |"
    for line in section.strip().splitlines():
        field, _, comment = line.partition("#")
        meaning = html.escape(comment.strip(), quote=False).replace("|", "\\|")
        if not field.strip():
            if meaning:
                yield f"| *{meaning}* | | |"
            continue
        match = _FIELD.fullmatch(field)
        if match is None:
            raise ValueError(f"cannot read the field {line!r}")
        middle = match["value"] if constants else f"`{match['type']}`"
        yield f"| `{match['name']}` | {middle} | {meaning} |"
    yield ""
