"""Shared memory for images: switched on where it helps, left alone where the user has said more."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from librobot_vlm_ros.ros import dds

CONFIG = Path(__file__).parents[2] / "config"


def test_the_profile_is_used_and_gives_64_mb() -> None:
    environ: dict[str, str] = {}
    said = dds.use_image_profile(environ)
    file = Path(environ["FASTRTPS_DEFAULT_PROFILES_FILE"])
    assert str(file) in said
    names = {"d": "http://www.eprosima.com/XMLSchemas/fastRTPS_Profiles"}
    tree = ElementTree.parse(file)
    assert [item.text for item in tree.iterfind(".//d:segment_size", names)] == [str(64 * 2**20)]
    (participant,) = tree.iterfind(".//d:participant", names)
    assert participant.get("is_default_profile") == "true"


@pytest.mark.parametrize(
    "environ",
    [
        {"FASTRTPS_DEFAULT_PROFILES_FILE": "/mine.xml"},
        {"FASTDDS_DEFAULT_PROFILES_FILE": "/mine.xml"},
        {"FASTDDS_BUILTIN_TRANSPORTS": "UDPv4"},
        {"RMW_IMPLEMENTATION": "rmw_zenoh_cpp"},
        {"LIBROBOT_VLM_TRANSPORT": "default"},
    ],
)
def test_what_the_user_has_set_stays(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert "left as it is" in dds.use_image_profile(environ)
    assert environ == before


def test_too_little_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dds, "SHARED_MEMORY", tmp_path / "none")
    environ: dict[str, str] = {}
    assert "--shm-size" in dds.use_image_profile(environ)
    assert environ == {}


def test_the_allocator_can_be_tuned_and_gives_memory_back() -> None:
    assert dds.keep_freed_memory() in (True, False)
    dds.give_back_memory()


def test_the_other_middlewares_files_are_well_formed_and_say_that_they_are_untested() -> None:
    ElementTree.parse(CONFIG / "cyclonedds.xml")
    for name in ("cyclonedds.xml", "zenoh.json5"):
        assert "NOT TESTED" in (CONFIG / name).read_text(encoding="utf-8")
