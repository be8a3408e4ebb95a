"""Questions about a frame that was asked about before: the same answers, with less to read."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import GenerationParams, ModelAnswer
from librobot_vlm_ros.models.registry import create_vlm, model_info
from librobot_vlm_ros.models.testing.conformance import hooks_of

MODELS = ["internvl2-2b", "llava-v1.5-7b", "qwen2-vl-2b", "qwen3-vl-4b"]
SHORT = GenerationParams(max_new_tokens=6)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp(request.param) / "tiny"
    hooks_of(model_info(request.param)).write_official(path)
    return request.param, path


@pytest.fixture
def vlm(folder: tuple[str, Path]):
    name, path = folder
    return create_vlm(name, pretrained=str(path), device="cpu", dtype="float32")


def places_read(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and places of each pass through the language model, as they come."""
    passes: list[tuple[int, int]] = []
    forward = vlm.language_model.forward

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(tuple(options["inputs_embeds"].shape[:2]))
        return forward(*args, **options)

    monkeypatch.setattr(vlm.language_model, "forward", counted)
    return passes


def answers(vlm: Any, *requests: Any) -> list[tuple[str, float]]:
    entries = vlm.run(list(requests))
    assert all(isinstance(entry, ModelAnswer) for entry in entries), entries
    return [(entry.text, round(entry.score, 4)) for entry in entries]


def test_a_second_question_on_a_frame_reads_its_own_words_only(
    vlm, ask, make_frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = make_frame(3)
    first = ask("answer", on=frame, prompt="red", params=SHORT)
    second = ask("answer", on=frame, prompt="the duck on a table", params=SHORT)
    expected = answers(vlm, second)
    vlm.backend.frames.clear()
    passes = places_read(vlm, monkeypatch)
    answers(vlm, first)
    again = answers(vlm, second)
    assert again == expected
    assert vlm.backend.prefixes.hits == 1
    image = len(vlm.backend.frames.lookup(frame).features.vectors)
    assert passes[0][1] > image >= 4 > 0
    assert passes[1][1] < passes[0][1] - image + 10  # a few words more than the first question


def test_several_questions_on_a_new_frame_read_it_once(
    vlm, ask, make_frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = make_frame(4)
    words = ["red", "the duck on a table", "a mug"]
    asked = [ask("answer", on=frame, prompt=text, params=SHORT) for text in words]
    expected = []
    for request in asked:
        vlm.backend.frames.clear()
        expected += answers(vlm, request)
    vlm.backend.frames.clear()
    passes = places_read(vlm, monkeypatch)
    assert answers(vlm, *asked) == expected
    assert [rows for rows, _ in passes] == [1, 3]


def test_frames_known_and_new_are_answered_in_one_batch(vlm, ask, make_frame) -> None:
    frames = [make_frame(5), make_frame(6), make_frame(7, 90, 40)]
    asked = [ask("answer", on=frame, prompt="a mug", params=SHORT) for frame in frames]
    expected = []
    for request in asked:
        vlm.backend.frames.clear()
        expected += answers(vlm, request)
    vlm.backend.frames.clear()
    answers(vlm, asked[0])
    assert answers(vlm, *asked) == expected
    assert answers(vlm, *asked) == expected


def test_what_is_kept_goes_with_the_frame_and_stays_within_its_bound(vlm, ask, make_frame) -> None:
    for number in range(3):
        answers(vlm, ask("answer", on=make_frame(number), prompt="a", params=SHORT))
    assert len(vlm.backend.prefixes) == 3
    vlm.backend.free_caches()
    gc.collect()
    assert len(vlm.backend.prefixes) == 0
    vlm.backend.prefixes._limit = 1
    answers(vlm, ask("answer", on=make_frame(9), prompt="a", params=SHORT))
    assert len(vlm.backend.prefixes) == 0


def test_features_that_were_made_anew_are_read_anew(vlm, ask, make_frame) -> None:
    frame = make_frame(8)
    request = ask("answer", on=frame, prompt="a", params=SHORT)
    first = answers(vlm, request)
    with torch.no_grad():
        for parameter in vlm.vision_encoder.parameters():
            parameter.add_(0.3)
    entry = vlm.backend.frames.lookup(frame)
    entry.features = None
    entry.pixels = vlm.pixels(frame.pixels)
    assert answers(vlm, request) != first
    assert vlm.backend.prefixes.hits == 0


def test_a_frame_is_seen_anew_once_the_weights_have_changed(vlm, ask, make_frame) -> None:
    frame = make_frame(8)
    request = ask("answer", on=frame, prompt="a", params=SHORT)
    first = answers(vlm, request)
    with torch.no_grad():  # as an optimiser does, and load_state_dict
        for parameter in vlm.vision_encoder.parameters():
            parameter.add_(0.3)
    after = answers(vlm, request)
    assert after != first
    vlm.backend.frames.clear()
    assert answers(vlm, request) == after
    misses = vlm.backend.frames.misses
    answers(vlm, request)
    assert vlm.backend.frames.misses == misses
