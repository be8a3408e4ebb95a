"""Frames, tasks, requests, results, limits: what cannot be right cannot be made."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from librobot_vlm_ros.core import (
    TASKS,
    EmbeddingData,
    EngineError,
    ErrorCode,
    Frame,
    GenerationParams,
    ImageError,
    InferenceError,
    InferenceInfo,
    InferenceRequest,
    Limits,
    ModelAnswer,
    Region,
    RequestError,
    Result,
    VlmError,
    get_task,
    make_request,
)


@pytest.fixture
def frame():
    return Frame(np.zeros((48, 64, 3), np.uint8), "front", stamp_ns=5, frame_id="optical")


def test_a_frame_shares_its_pixels_and_cannot_be_written():
    pixels = np.zeros((2, 3, 3), np.uint8)
    frame = Frame(pixels, "front", 0)
    assert np.shares_memory(frame.pixels, pixels)
    assert (frame.width, frame.height) == (3, 2)
    with pytest.raises(ValueError, match="read-only"):
        frame.pixels[0, 0, 0] = 1
    pixels[0, 0, 0] = 1  # the owner's own array stays writable
    with pytest.raises(dataclasses.FrozenInstanceError):
        frame.camera = "rear"


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 3), np.uint8),
        np.zeros((2, 3, 4), np.uint8),
        np.zeros((2, 3, 3), np.float32),
        [[[0, 0, 0]]],
        None,
    ],
    ids=["gray", "alpha", "float", "list", "nothing"],
)
def test_a_frame_is_uint8_rgb(pixels):
    with pytest.raises(ImageError) as caught:
        Frame(pixels, "front", 0)
    assert caught.value.code is ErrorCode.BAD_IMAGE


def test_a_frame_has_pixels():
    with pytest.raises(ImageError) as caught:
        Frame(np.zeros((0, 3, 3), np.uint8), "front", 0)
    assert caught.value.code is ErrorCode.EMPTY_IMAGE


def test_an_age_is_never_negative():
    frame = Frame(np.zeros((1, 1, 3), np.uint8), "front", 0, received_ns=2_000_000_000)
    assert frame.age_s(2_500_000_000) == 0.5
    assert frame.age_s(1_000_000_000) == 0.0


def test_frames_are_told_apart_and_usable_as_keys():
    first, second = (Frame(np.zeros((1, 1, 3), np.uint8), "front", 0) for _ in range(2))
    assert len({first, second}) == 2
    assert "pixels" not in repr(first)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("<OD>", "detect"),
        ("OD", "detect"),
        ("detection", "detect"),
        (" Detect ", "detect"),
        ("<CAPTION>", "caption"),
        ("<MORE_DETAILED_CAPTION>", "more_detailed_caption"),
        ("<CAPTION_TO_PHRASE_GROUNDING>", "ground"),
        ("phrase-grounding", "ground"),
        ("phrase grounding", "ground"),
        ("<REFERRING_EXPRESSION_SEGMENTATION>", "segment"),
        ("<REGION_TO_SEGMENTATION>", "region_segment"),
        ("<OPEN_VOCABULARY_DETECTION>", "open_vocabulary_detect"),
        ("<REGION_TO_CATEGORY>", "region_category"),
        ("<REGION_TO_DESCRIPTION>", "region_caption"),
        ("<REGION_TO_OCR>", "region_ocr"),
        ("<OCR_WITH_REGION>", "ocr_with_region"),
        ("<DENSE_REGION_CAPTION>", "dense_region_caption"),
        ("<REGION_PROPOSAL>", "region_proposal"),
        ("vqa", "answer"),
    ],
)
def test_tasks_are_known_by_florences_prompts_and_other_usual_names(name, task):
    assert get_task(name).name == task


def test_every_common_name_and_alias_leads_to_one_task():
    names = [name for spec in TASKS.values() for name in (spec.name, *spec.aliases)]
    assert len(names) == len(set(names))
    assert all(get_task(name).name == name for name in TASKS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("captoin", "Did you mean caption"),
        ("detcet", "Did you mean detect"),
        ("make coffee", "Tasks are: caption,"),
        ("", "Tasks are: caption,"),
        ("x" * 1_000_000, "Tasks are: caption,"),
        ("\x1b[2J", "Tasks are: caption,"),
        (None, "caption,"),
    ],
)
def test_an_unknown_task_names_the_nearest(name, hint):
    with pytest.raises(RequestError) as caught:
        get_task(name)
    assert caught.value.code is ErrorCode.UNKNOWN_TASK
    assert hint in caught.value.hint
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"num_beams": 0},
        {"num_beams": 1000},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_generation_parameters_are_bounded(bad):
    with pytest.raises(RequestError, match=next(iter(bad))) as caught:
        GenerationParams(**bad)
    assert caught.value.code is ErrorCode.BAD_PARAMETER


def test_generation_parameters_within_bounds_are_kept():
    params = GenerationParams(max_new_tokens=1, num_beams=3, temperature=1, top_p=0.1, seed=0)
    assert (params.num_beams, params.temperature) == (3, 1)
    assert GenerationParams().max_new_tokens is None


def test_a_request_holds_the_common_name_of_its_task(frame):
    request = InferenceRequest("1", frame, "<OD>")
    assert request.task == "detect"
    assert request.spec.output == "regions"


def test_a_task_that_needs_text_gets_some(frame):
    with pytest.raises(RequestError) as caught:
        InferenceRequest("1", frame, "ground", prompt="  ")
    assert caught.value.code is ErrorCode.EMPTY_PROMPT


@pytest.mark.parametrize(
    "region",
    [
        None,
        (1, 2, 3),
        (1, 2, 3, 4, 5),
        (math.nan, 0, 10, 10),
        (0, 0, math.inf, 10),
        (10, 10, 5, 5),
        (5, 5, 5, 9),
        (100, 100, 200, 200),
        "abcd",
        (None, 0, 1, 1),
        (10**400, 0, 1, 1),
        7,
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_task_that_needs_a_region_gets_a_box_in_the_image(frame, region):
    with pytest.raises(RequestError) as caught:
        InferenceRequest("1", frame, "region_caption", region=region)
    assert caught.value.code is ErrorCode.BAD_REGION


def test_a_region_is_cut_to_the_image(frame):
    request = InferenceRequest("1", frame, "region_caption", region=[-5, 3, 1000, 40])
    assert request.region == (0.0, 3.0, 64.0, 40.0)


def test_a_request_from_outside_is_cleaned_and_bounded(frame):
    request = make_request(
        request_id="1",
        frame=frame,
        task="<CAPTION_TO_PHRASE_GROUNDING>",
        prompt=" the <image>\x00 red\ncube ",
        region=[0, 0, 5, 5],
    )
    assert (request.task, request.prompt) == ("ground", "the image red cube")
    assert request.region == (0, 0, 5, 5)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"task": "ground"}, ErrorCode.EMPTY_PROMPT),
        ({"task": "ground", "prompt": "\u200b"}, ErrorCode.EMPTY_PROMPT),
        ({"prompt": "x" * 5000}, ErrorCode.PROMPT_TOO_LONG),
        ({"prompt": None}, ErrorCode.BAD_PARAMETER),
        ({"task": "nothing"}, ErrorCode.UNKNOWN_TASK),
        ({"params": GenerationParams(max_new_tokens=1025)}, ErrorCode.BAD_PARAMETER),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_request_from_outside_is_refused(frame, fields, code):
    with pytest.raises(RequestError) as caught:
        make_request(**({"request_id": "1", "frame": frame, "task": "caption"} | fields))
    assert caught.value.code is code


def test_a_region_of_a_result_is_a_box():
    found = Region("duck", math.nan, 1, 2, 3, 4, polygon=((1, 2), (3, 2), (3, 4)))
    assert found.box == (1, 2, 3, 4)
    for box in ((3, 2, 1, 4), (1, 4, 3, 2), (math.nan, 0, 1, 1), (0, 0, 1, math.inf)):
        with pytest.raises(InferenceError):
            Region("duck", 0.5, *box)
    with pytest.raises(InferenceError):
        Region("duck", 0.5, 1, 2, 3, 4, polygon=((1, math.nan),))


@pytest.mark.parametrize(
    ("pooling", "array"),
    [
        ("mean", np.zeros(4, np.float64)),
        ("mean", np.zeros((2, 4), np.float32)),
        ("none", np.zeros(4, np.float16)),
        ("mean", [1.0, 2.0]),
    ],
    ids=["double", "not pooled", "not per token", "list"],
)
def test_an_embedding_has_the_stated_dtype_and_rank(pooling, array):
    with pytest.raises(InferenceError):
        EmbeddingData(pooling, array)


def test_embeddings_that_are_right():
    assert EmbeddingData("mean", np.zeros(4, np.float16)).array.shape == (4,)
    assert EmbeddingData("none", np.zeros((2, 4), np.float32)).array.shape == (2, 4)


def test_an_answer_claims_nothing_by_default():
    answer = ModelAnswer()
    assert math.isnan(answer.score)
    assert answer.regions == ()


def test_a_result_is_an_answer_or_an_error():
    source = {"frame_header": object(), "stamp_ns": 1, "frame_id": "a"}
    size = {"image_width": 2, "image_height": 2, "info": InferenceInfo()}
    good = Result(**source, **size, answer=ModelAnswer())
    assert (good.ok, good.error_code, good.error_msg) == (True, 0, "")
    assert good.frame_header is source["frame_header"]
    error = EngineError(ErrorCode.BUSY, "queue is full")
    bad = Result(**source, **size, error=error)
    assert (bad.ok, bad.error_code, bad.error_msg) == (False, 500, "BUSY(500): queue is full.")
    for both_or_none in ({}, {"answer": ModelAnswer(), "error": error}):
        with pytest.raises(VlmError):
            Result(**source, **size, **both_or_none)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "9"])
def test_limits_are_positive_integers(value):
    with pytest.raises(RequestError, match="max_pixels") as caught:
        Limits(max_pixels=value)
    assert caught.value.code is ErrorCode.BAD_PARAMETER


def test_a_frame_of_smaller_pixels_has_the_size_of_its_source():
    frame = Frame(np.zeros((24, 32, 3), np.uint8), "c", 0, source_width=64, source_height=48)
    assert (frame.width, frame.height) == (64, 48)
    assert "64x48" in repr(frame)
    request = InferenceRequest("r", frame, "region_caption", region=(40, 30, 60, 45))
    assert request.region == (40, 30, 60, 45)


@pytest.mark.parametrize("size", [(31, 24), (64, 0), (0, 48)])
def test_a_source_smaller_than_the_pixels_is_refused(size):
    with pytest.raises(ImageError, match="32x24"):
        Frame(np.zeros((24, 32, 3), np.uint8), "c", 0, source_width=size[0], source_height=size[1])
