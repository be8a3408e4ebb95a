"""The fake model: what tests above models/ rely on."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from librobot_vlm_ros.core import (
    TASKS,
    ErrorCode,
    Frame,
    GenerationParams,
    InferenceRequest,
    ModelAnswer,
    ModelError,
    VlmError,
)
from librobot_vlm_ros.models import VlmBackend, create_vlm

Ask = Callable[..., InferenceRequest]


def code_of(entry: ModelAnswer | VlmError) -> ErrorCode:
    assert isinstance(entry, VlmError)
    return entry.code


def test_it_is_a_backend() -> None:
    assert isinstance(create_vlm("fake"), VlmBackend)


def test_it_answers_every_task(ask: Ask) -> None:
    requests = [
        ask(name, prompt="cup" if spec.needs_text else "", region=(1, 1, 9, 9))
        for name, spec in TASKS.items()
    ]
    for request, answer in zip(requests, create_vlm("fake").run(requests), strict=True):
        assert isinstance(answer, ModelAnswer), answer
        output = request.spec.output
        assert (len(answer.regions) == 2) == (output == "regions")
        assert (answer.embedding is not None) == (output == "embedding")
        assert bool(answer.text) == (output != "embedding")


def test_the_same_request_gives_the_same_answer_and_other_pixels_another(
    ask: Ask, make_frame: Callable[..., Frame]
) -> None:
    vlm = create_vlm("fake")
    one, again, other = vlm.run([ask("detect"), ask("detect"), ask("detect", on=make_frame(2))])
    assert one.regions == again.regions != other.regions


def test_boxes_lie_in_the_image(ask: Ask) -> None:
    (answer,) = create_vlm("fake", config={"regions": 50}).run([ask("detect")])
    for region in answer.regions:
        assert 0 <= region.x_min < region.x_max <= 80
        assert 0 <= region.y_min < region.y_max <= 48


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ("fail_every", ErrorCode.INFERENCE_FAILED),
        ("oom_every", ErrorCode.OUT_OF_MEMORY),
        ("nan_every", ErrorCode.NAN_LOGITS),
    ],
)
def test_every_second_request_fails_as_told(ask: Ask, setting: str, code: ErrorCode) -> None:
    good, bad, again = create_vlm("fake", config={setting: 2}).run([ask("caption")] * 3)
    assert isinstance(good, ModelAnswer)
    assert code_of(bad) == code
    assert isinstance(again, ModelAnswer)


def test_it_breaks_as_told(ask: Ask) -> None:
    with pytest.raises(RuntimeError, match="told to break"):
        create_vlm("fake", config={"raise_every": 1}).run([ask("caption")])


def test_tokens_are_streamed_and_make_up_the_text(ask: Ask) -> None:
    heard: list[tuple[int, str]] = []
    (answer,) = create_vlm("fake").run(
        [ask("caption")], on_token=lambda index, text: heard.append((index, text))
    )
    assert "".join(text for _, text in heard) == answer.text
    assert len(heard) == answer.generated_tokens > 3


def test_a_cancelled_request_stops_before_the_next_token(ask: Ask) -> None:
    heard: list[str] = []
    entries = create_vlm("fake").run(
        [ask("caption"), ask("caption")],
        on_token=lambda index, text: heard.append(text) if index == 0 else None,
        should_stop=lambda index: index == 0 and len(heard) == 2,
    )
    assert code_of(entries[0]) == ErrorCode.CANCELLED
    assert isinstance(entries[1], ModelAnswer)
    assert len(heard) == 2


def test_a_request_past_its_deadline_stops(ask: Ask) -> None:
    (entry,) = create_vlm("fake").run([ask("caption", deadline_ns=time.monotonic_ns() - 1)])
    assert code_of(entry) == ErrorCode.DEADLINE_EXCEEDED


def test_latency_is_spread_over_the_tokens(ask: Ask) -> None:
    pauses: list[float] = []
    vlm = create_vlm("fake", config={"latency_s": 1.0}, sleep=pauses.append)
    vlm.run([ask("caption", params=GenerationParams(max_new_tokens=4))])
    assert pauses == pytest.approx([0.25] * 4)


def test_loading_can_be_cancelled_and_can_fail() -> None:
    with pytest.raises(ModelError) as caught:
        create_vlm("fake", config={"load_s": 60.0}, should_cancel=lambda: True)
    assert caught.value.code == ErrorCode.LOAD_CANCELLED
    with pytest.raises(ModelError) as caught:
        create_vlm("fake", config={"load_error": int(ErrorCode.WEIGHTS_CORRUPT)})
    assert caught.value.code == ErrorCode.WEIGHTS_CORRUPT


@pytest.mark.parametrize("config", [{"latency": 1}, {"latency_s": -1}, {"regions": "two"}])
def test_a_wrong_setting_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ModelError) as caught:
        create_vlm("fake", config=config)
    assert caught.value.code == ErrorCode.BAD_CONFIG


def test_closed_it_answers_that_no_model_is_loaded(ask: Ask) -> None:
    vlm = create_vlm("fake", config={"memory_bytes": 7})
    assert vlm.memory_bytes() == 7
    vlm.close()
    assert code_of(vlm.run([ask("caption")])[0]) == ErrorCode.MODEL_NOT_LOADED
    assert vlm.memory_bytes() == 0


def test_the_embedding_has_the_length_it_states(ask: Ask) -> None:
    vlm = create_vlm("fake", config={"embedding_dim": 5})
    (answer,) = vlm.run([ask("embed")])
    assert answer.embedding.array.shape == (vlm.embedding_dim,) == (5,)
    assert answer.embedding.array.dtype == np.float32
