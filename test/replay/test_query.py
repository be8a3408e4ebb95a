"""`librobot-vlm query` against a running node."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rectangle_bag import START_NS, write_rectangle_bag

from librobot_vlm_ros.cli.main import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def node(start_node: Callable[..., Any]) -> Any:
    # Questions follow long after the last frame where the machine is busy.
    return start_node("model:=fake", "lock_step:=true", "tasks:=[caption]", "camera_timeout_s:=0")


def test_about_the_newest_frame(
    tmp_path: Path, node: Any, lock_step: Callable[..., Any], capsys: Captured
) -> None:
    assert main(["query", "caption"]) == 1  # there is none yet
    assert "208" in (first := capsys.readouterr().err) or "206" in first
    write_rectangle_bag(tmp_path / "bag", 3)
    lock_step(tmp_path / "bag")
    assert main(["query", "ground", "the red box", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["success"] is True
    assert answer["stamp_ns"] == START_NS + 200_000_000
    assert (answer["task"], answer["prompt"], answer["model"]) == ("ground", "the red box", "fake")
    assert [region["label"] for region in answer["regions"]] == ["the red box"] * 2
    assert main(["query", "caption"]) == 0
    assert capsys.readouterr().out.startswith("a ")
    earlier = START_NS + 100_000_000
    stamp = f"{earlier // 10**9}.{earlier % 10**9:09}"
    assert main(["query", "caption", "--stamp", stamp, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stamp_ns"] == earlier
    assert main(["query", "caption", "--stamp", "5"]) == 1
    assert "208" in (last := capsys.readouterr().err) or "206" in last  # the bag is through


def test_about_a_picture_of_ones_own(tmp_path: Path, node: Any, capsys: Captured) -> None:
    picture = tmp_path / "desk.png"
    Image.fromarray(np.full((30, 40, 3), 80, np.uint8)).save(picture)
    assert main(["query", "detect", "--image", str(picture)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["label", "score", "x_min", "y_min", "x_max", "y_max"]
    assert len(shown) == 4


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["dance"], "UNKNOWN_TASK(202)"),
        (["ground"], "EMPTY_PROMPT(200)"),
        (["region_caption"], "BAD_REGION(210)"),
    ],
)
def test_what_cannot_be_answered_is_coded(
    tmp_path: Path, node: Any, capsys: Captured, words: list[str], code: str
) -> None:
    picture = tmp_path / "desk.png"
    Image.fromarray(np.full((30, 40, 3), 80, np.uint8)).save(picture)
    assert main(["query", *words, "--image", str(picture)]) == 1
    assert f"librobot-vlm query: {code}" in capsys.readouterr().err
    assert node.alive


def test_pictures_that_are_none_are_refused_here(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "text.png").write_text("no picture")
    assert main(["query", "caption", "--image", str(tmp_path / "text.png")]) == 1
    assert "BAD_IMAGE(100)" in capsys.readouterr().err
    assert main(["query", "caption", "--image", str(tmp_path / "none.png")]) == 1
    assert "FILE_NOT_FOUND(604)" in capsys.readouterr().err


def test_without_a_node_it_says_what_to_start(ros_env: dict[str, str], capsys: Captured) -> None:
    assert main(["query", "caption", "--node", "nobody", "--timeout", "0.5"]) == 1
    shown = capsys.readouterr().err
    assert "DEADLINE_EXCEEDED(502)" in shown
    assert "librobot-vlm run" in shown
