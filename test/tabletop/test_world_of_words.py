"""The tabletop's vocabulary, prompts and answers."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers")

from librobot_vlm_ros.tabletop.labels import COLOURS, KINDS, LABELS, label_of
from librobot_vlm_ros.tabletop.network import EOS, UNK, build_tokenizer, to_bin
from librobot_vlm_ros.tabletop.targets import (
    caption_of,
    caption_question,
    detect_question,
    ground_question,
)

BOXES = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.9995, 1.0]], np.float32)


def test_the_world_has_at_least_eight_kinds_and_six_colours() -> None:
    assert len(KINDS) >= 8
    assert len(COLOURS) == 6
    assert len(set(LABELS)) == len(LABELS) == 30


@pytest.mark.parametrize(("kind", "colour"), [("cube", None), ("duck", "red"), ("dragon", None)])
def test_a_label_that_is_no_object_of_the_world_is_refused(kind: str, colour: str | None) -> None:
    with pytest.raises(ValueError, match="no such object"):
        label_of(kind, colour)


def test_a_caption_lists_the_objects_from_left_to_right() -> None:
    assert caption_of(["duck"]) == "a duck on the table"
    named = caption_of(["red cube", "duck", "blue ball"])
    assert named == "a red cube, a duck and a blue ball on the table"


def test_every_prompt_label_and_instruction_is_made_of_known_words() -> None:
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(0)
    asked = [ground_question(LABELS[:2], BOXES, rng) for _ in range(200)]
    asked += [caption_question(LABELS[:2]), detect_question(LABELS[:2], BOXES)]
    for question in asked:
        assert UNK not in question.prompt + question.answer, tokenizer.decode(question.prompt)


def test_captions_survive_the_tokenizer_word_for_word() -> None:
    tokenizer = build_tokenizer()
    text = caption_of(list(LABELS))
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_location_tokens_are_single_tokens_in_one_run() -> None:
    tokenizer = build_tokenizer()
    first = tokenizer.convert_tokens_to_ids("<loc_0>")
    ids = tokenizer("cube<loc_0><loc_7><loc_999>", add_special_tokens=False).input_ids
    assert ids[1:] == [first, first + 7, first + 999]


def test_a_detection_answer_holds_label_and_box_of_each_object_and_ends() -> None:
    tokenizer = build_tokenizer()
    question = detect_question(["red cube", "duck"], BOXES)
    text = "".join(tokenizer.convert_ids_to_tokens(question.answer))
    assert text == (
        "redcube<loc_100><loc_200><loc_300><loc_400>duck<loc_500><loc_500><loc_999><loc_999></s>"
    )
    assert question.answer[-1] == EOS
    assert len(question.place) == len(question.answer)
    assert [place >= 0 for place in question.place].count(True) == 8


def test_an_absent_object_gets_no_box() -> None:
    rng = np.random.default_rng(1)
    question = ground_question(["duck"], BOXES[:1], rng, absent=1.0)
    assert question.answer == [EOS]


def test_bins_cover_the_image_and_stay_inside_it() -> None:
    assert to_bin(0.0, 320) == 0
    assert to_bin(160.0, 320) == 500
    assert to_bin(320.0, 320) == 999
    assert to_bin(-4.0, 320) == 0
