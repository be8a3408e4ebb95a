"""Boxes that Qwen-VL writes, in source pixels; what is none is counted."""

from __future__ import annotations

import json

import pytest

from librobot_vlm_ros.core import ErrorCode, RequestError
from librobot_vlm_ros.models.families.qwen_vl.processor import (
    QWEN2_TASKS,
    QWEN3_TASKS,
    parse_json_boxes,
    parse_token_boxes,
)
from librobot_vlm_ros.models.inputs.prompts import question

REF = "<|object_ref_start|>{}<|object_ref_end|>"
BOX = "<|box_start|>{}<|box_end|>"


def test_boxes_of_tokens_in_source_pixels() -> None:
    text = REF.format("a cube") + BOX.format("(100,250),(500,750)")
    text += BOX.format("(0, 0), (1000, 1000)") + REF.format("ball") + BOX.format("(1,2),(3,4)")
    regions, malformed = parse_token_boxes(text, 640, 480)
    assert [region.label for region in regions] == ["a cube", "a cube", "ball"]
    assert regions[0].box == (64.0, 120.0, 320.0, 360.0)
    assert regions[1].box == (0.0, 0.0, 640.0, 480.0)
    assert malformed == 0
    assert parse_token_boxes("it is at (10,20),(30,40)", 100, 100, "it")[0][0].label == "it"


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("I see nothing.", 0, 1),
        (BOX.format("(1,2),(3)") + BOX.format("(1,2),(3,4)"), 1, 1),
        (BOX.format("(500,2),(3,4)"), 0, 1),
        (BOX.format("(1,2),(1001,4)"), 0, 1),
        ("<|box_start|>(1,2),(3,", 0, 1),
        ("<|box_start|>(1,2)" + BOX.format("(1,2),(3,4)"), 1, 1),
        (BOX.format("(1,2),(99999999999,4)"), 0, 1),
    ],
)
def test_pieces_that_are_no_box_are_counted(text: str, good: int, bad: int) -> None:
    regions, malformed = parse_token_boxes(text, 100, 100)
    assert (len(regions), malformed) == (good, bad)


def test_boxes_of_json_in_source_pixels() -> None:
    listed = [
        {"bbox_2d": [100, 250, 500, 750], "label": "a {cube}"},
        {"bbox_2d": [0, 0, 1000, 1000.0]},
    ]
    text = f"```json\n{json.dumps(listed)}\n```"
    regions, malformed = parse_json_boxes(text, 640, 480, "all")
    assert [region.label for region in regions] == ["a {cube}", "all"]
    assert regions[0].box == (64.0, 120.0, 320.0, 360.0)
    assert regions[1].box == (0.0, 0.0, 640.0, 480.0)
    assert malformed == 0
    assert parse_json_boxes("```json\n[]\n```", 640, 480) == ((), 0)


GOOD = '{"bbox_2d": [1, 2, 3, 4], "label": "x"}'


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("There is none.", 0, 1),
        (f'[{GOOD}, {{"bbox_2d": [1, 2, 3', 1, 1),
        (f'[{{"bbox_2d": [1, 2, 3], "label": "y"}}, {GOOD}]', 1, 1),
        ('[{"bbox_2d": [1, 2, 3, 4, ' + GOOD + "]", 1, 1),
        ('[{"bbox_2d": [5, 2, 3, 4]}]', 0, 1),
        ('[{"bbox_2d": [1, 2, 3, 4000]}]', 0, 1),
        ('[{"bbox_2d": [true, 2, 3, 4]}]', 0, 1),
        ('[{"bbox_2d": [NaN, 2, 3, 4]}]', 0, 1),
        ('[{"bbox_2d": "1 2 3 4", "label": 7}]', 0, 1),
        ('{"a":' + "[" * 100_000, 0, 1),
        ('{"bbox_2d": [1, 2, 3, ' + "9" * 5000 + "]}", 0, 1),
        (f'{{"objects": [{GOOD}, {GOOD}]}}', 2, 0),
        (f'{{"objects": [{GOOD}, {{"label": "a {{cube}}"}}]}}', 1, 1),
        ('{"objects": [{"none": 1}]}', 0, 1),
        ('[{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8], [9]], "label": "x"}]', 2, 1),
        ('[{"bbox_2d": [], "label": "x"}]', 0, 1),
    ],
)
def test_objects_that_are_no_box_are_counted(text: str, good: int, bad: int) -> None:
    regions, malformed = parse_json_boxes(text, 100, 100)
    assert (len(regions), malformed) == (good, bad)


@pytest.mark.parametrize("tasks", [QWEN2_TASKS, QWEN3_TASKS])
def test_questions_hold_the_words_where_a_task_has_a_place_for_them(tasks: dict[str, str]) -> None:
    assert "the red cube" in question(tasks, "ground", "the red cube")
    assert question(tasks, "answer", "why?") == "why?"
    for task, text, code in (
        ("ground", "", ErrorCode.EMPTY_PROMPT),
        ("caption", "x", ErrorCode.BAD_PARAMETER),
    ):
        with pytest.raises(RequestError) as caught:
            question(tasks, task, text)
        assert caught.value.code == code
