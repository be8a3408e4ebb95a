"""The .msg, .srv and .action files: every field explained, every code the one of the core."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from librobot_vlm_ros.core import ErrorCode

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for kind in ("msg", "srv", "action") for path in ROOT.glob(f"{kind}/*.{kind}"))

FIELD = re.compile(r"^(?P<type>[\w/]+(\[\d*\])?)\s+(?P<name>\w+)\s*(?P<rest>.*)$")


def fields(text: str) -> list[tuple[str, str, str]]:
    """(type, name, comment) of every field and constant."""
    found = []
    for line in text.splitlines():
        if not line.strip() or line.startswith(("#", "---")):
            continue
        match = FIELD.match(line)
        assert match, f"cannot read {line!r}"
        comment = match["rest"].partition("#")[2].strip()
        found.append((match["type"], match["name"], comment))
    return found


def test_the_interfaces_of_the_design_are_there() -> None:
    assert {path.name for path in FILES} == {
        "Caption.msg",
        "Embedding.msg",
        "ErrorCode.msg",
        "Generate.action",
        "GroundedRegion.msg",
        "GroundingArray.msg",
        "InferenceInfo.msg",
        "ListModels.srv",
        "ModelDescription.msg",
        "Query.srv",
        "SwitchModel.srv",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_field_says_what_it_means(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "the file says first what it is"
    silent = [name for _, name, comment in fields(text) if len(comment) < 8]
    assert silent == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_length_and_time_names_its_unit(path: Path) -> None:
    without = []
    for _, name, comment in fields(path.read_text(encoding="utf-8")):
        if (name.endswith("_s") and "second" not in comment) or (
            re.search(r"^[xy]_|width|height", name) and "pixel" not in comment
        ):
            without.append(name)
    assert without == []


def test_error_codes_are_those_of_the_core() -> None:
    text = (ROOT / "msg" / "ErrorCode.msg").read_text(encoding="utf-8")
    constants = {
        name: int(value) for name, value in re.findall(r"^uint16 (\w+)=(\d+)", text, re.MULTILINE)
    }
    assert constants == {code.name: int(code) for code in ErrorCode}


@pytest.mark.parametrize(
    "name", ["Caption.msg", "GroundingArray.msg", "Embedding.msg", "Query.srv", "Generate.action"]
)
def test_results_carry_header_provenance_and_error(name: str) -> None:
    text = (ROOT / name.split(".")[1] / name).read_text(encoding="utf-8")
    if "---" in text:
        text = text.split("\n---\n")[1]
    types = {field: kind for kind, field, _ in fields(text)}
    assert types["header"] == "std_msgs/Header"
    assert types["info"] == "InferenceInfo"
    assert types["error_code"] == "uint16"
    assert types["error_msg"] == "string"


@pytest.mark.ros
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_built_interface_is_this_file(path: Path) -> None:
    module = importlib.import_module(f"librobot_vlm_ros.{path.parent.name}")
    built = getattr(module, path.stem)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".msg":
        parts, types = [text], [built]
    elif path.suffix == ".srv":
        parts, types = re.split(r"^---$", text, flags=re.MULTILINE), [built.Request, built.Response]
    else:
        parts = re.split(r"^---$", text, flags=re.MULTILINE)
        types = [built.Goal, built.Result, built.Feedback]
    for part, kind in zip(parts, types, strict=True):
        expected = [name for _, name, _ in fields(part) if not name.isupper()]
        assert list(kind.get_fields_and_field_types()) == expected


@pytest.mark.ros
def test_a_region_without_a_score_can_say_so() -> None:
    from librobot_vlm_ros.msg import GroundedRegion

    region = GroundedRegion(label="duck", score=float("nan"))
    assert region.score != region.score
