"""A loaded model answering the robot: batches, streams, scores, stops and failures."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from librobot_vlm_ros.core import (
    TASKS,
    ErrorCode,
    Frame,
    GenerationParams,
    InferenceError,
    InferenceRequest,
    Limits,
    ModelAnswer,
    VlmError,
)
from librobot_vlm_ros.models import VlmBackend, create_vlm
from librobot_vlm_ros.models.families.florence2.model import FlorenceVLM
from librobot_vlm_ros.models.families.florence2.processor import FLORENCE_TASKS
from librobot_vlm_ros.models.generation.config import Generated

Ask = Callable[..., InferenceRequest]
MakeFrame = Callable[..., Frame]

PROMPTS = {"ground": "a red cube", "open_vocabulary_detect": "a cube", "segment": "the table"}


def every_request(vlm: FlorenceVLM, ask: Ask) -> list[InferenceRequest]:
    return [
        ask(task, prompt=PROMPTS.get(task, ""), region=(1, 2, 40, 30), name=task)
        for task in sorted(vlm.tasks)
    ]


def code_of(entry: ModelAnswer | VlmError) -> ErrorCode:
    assert isinstance(entry, VlmError), entry
    return entry.code


def said(vlm: FlorenceVLM, *parts: str | int) -> Generated:
    """Generated ids of words and location bins, every token with probability 0.5."""
    ids = vlm.tokenizer.prompt([p if isinstance(p, str) else (p,) for p in parts])[1:]
    return Generated(tuple(ids), tuple([math.log(0.5)] * len(ids)))


def same(one: ModelAnswer, other: ModelAnswer) -> bool:
    return (one.text, one.regions, one.malformed) == (other.text, other.regions, other.malformed)


def test_giving_back_caches_changes_no_answer(vlm: FlorenceVLM, ask: Ask) -> None:
    request = ask("caption")
    before = vlm.run([request])[0]
    assert len(vlm.frames) > 0
    vlm.free_caches()
    assert len(vlm.frames) == 0
    after = vlm.run([request])[0]
    assert isinstance(before, ModelAnswer)
    assert isinstance(after, ModelAnswer)
    assert same(before, after)


def test_free_memory_of_a_gpu_counts_what_torch_keeps_unused(
    vlm: FlorenceVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vlm.free_memory() is None  # on a CPU the system knows better
    monkeypatch.setattr(type(vlm), "torch_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert vlm.free_memory() == 1100


def test_it_is_a_backend_that_says_what_it_is(vlm: FlorenceVLM) -> None:
    assert isinstance(vlm, VlmBackend)
    assert (vlm.name, vlm.device, vlm.dtype) == ("florence-2-base", "cpu", "float32")
    assert len(vlm.revision) == 16
    assert vlm.embedding_dim == vlm.get_embedding_dim() == 32
    assert vlm.memory_bytes() == sum(
        t.nbytes for t in {*vlm.module.parameters(), *vlm.module.buffers()}
    )


def test_it_answers_every_task_it_declares_in_one_batch(vlm: FlorenceVLM, ask: Ask) -> None:
    assert vlm.tasks == {*FLORENCE_TASKS, "embed"}
    requests = every_request(vlm, ask)
    for request, answer in zip(requests, vlm.run(requests), strict=True):
        assert isinstance(answer, ModelAnswer), (request.task, answer)
        assert answer.inference_s > 0
        if request.task == "embed":
            assert answer.embedding.array.shape == (32,)
        else:
            assert 1 <= answer.generated_tokens <= 24
            assert answer.prompt_tokens > 2
            assert 0 < answer.score <= 1


def test_a_batch_answers_as_each_request_alone(
    vlm: FlorenceVLM, ask: Ask, make_frame: MakeFrame
) -> None:
    requests = [
        ask(task, on=make_frame(seed, *size), prompt=PROMPTS.get(task, ""))
        for seed, (task, size) in enumerate(
            [("detect", (48, 80)), ("caption", (90, 33)), ("ground", (64, 64))]
        )
    ]
    together = vlm.run(requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = vlm.run([request])
        assert same(alone, answer)


def test_a_frame_is_seen_once_for_all_its_tasks(
    vlm: FlorenceVLM, ask: Ask, make_frame: MakeFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    see = vlm._see
    monkeypatch.setattr(vlm, "_see", lambda pixels: seen.append(len(pixels)) or see(pixels))
    other = make_frame(2)
    vlm.run([ask("caption"), ask("detect"), ask("embed"), ask("caption", on=other)])
    vlm.run([ask("ground", prompt="a cube"), ask("embed", on=other)])
    assert seen == [2]


def test_another_frame_with_the_same_number_is_another_frame(
    vlm: FlorenceVLM, ask: Ask, make_frame: MakeFrame
) -> None:
    twin = dataclasses.replace(make_frame(9), sequence=1, stamp_ns=1)
    one, other = vlm.run([ask("embed"), ask("embed", on=twin)])
    assert not np.array_equal(one.embedding.array, other.embedding.array)


def test_the_memory_of_frames_is_bounded(vlm: FlorenceVLM, ask: Ask, make_frame: MakeFrame) -> None:
    for seed in range(30):
        vlm.run([ask("embed", on=make_frame(seed, 8, 8))])
    assert len(vlm.frames) == 8


def test_regions_are_in_pixels_of_the_source_image(vlm: FlorenceVLM, ask: Ask) -> None:
    generated = said(vlm, "red cube", 100, 200, 500, 999, "duck", 0, 0, 10, 10)
    answer = vlm.read(ask("detect"), generated)
    assert [region.label for region in answer.regions] == ["red cube", "duck"]
    width, height = 80, 48
    assert answer.regions[0].box == pytest.approx(
        (100.5 * width / 1000, 200.5 * height / 1000, 500.5 * width / 1000, 999.5 * height / 1000)
    )
    assert answer.text.startswith("red cube<loc_100><loc_200>")
    assert answer.malformed == 0


def test_a_regions_score_is_that_of_its_own_tokens(vlm: FlorenceVLM, ask: Ask) -> None:
    generated = said(vlm, "cube", 1, 2, 3, 4, "duck", 5, 6, 7, 8)
    log_probs = [math.log(p) for p in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 1)]
    answer = vlm.read(ask("detect"), Generated(generated.ids, tuple(log_probs)))
    cube, duck = (region.score for region in answer.regions)
    assert cube == pytest.approx((0.9 * 0.8 * 0.7 * 0.6 * 0.5) ** (1 / 5))
    assert duck == pytest.approx((0.4 * 0.3 * 0.2 * 0.1 * 0.05) ** (1 / 5))


@pytest.mark.parametrize("beams", [1, 3])
def test_the_score_of_a_caption_is_what_the_model_gives_to_its_words(
    vlm: FlorenceVLM, ask: Ask, beams: int
) -> None:
    vlm.settings = dataclasses.replace(vlm.settings, forced_bos_token_id=None)
    first = vlm.tokenizer.first_location
    request = ask("caption", params=GenerationParams(num_beams=beams, max_new_tokens=6))
    (answer,) = vlm.run([request])
    job = vlm._job(0, request)
    with torch.no_grad():
        pixels = vlm.encode_image(request.frame)
        (ids,) = vlm.generate(
            request.frame, torch.tensor([job.prompt]), num_beams=beams, max_new_tokens=6
        ).tolist()
        answer_ids = torch.tensor([[2, *ids[:-1]]])
        logits = vlm(request.frame, input_ids=torch.tensor([job.prompt]), labels=None)
        assert logits["logits"].shape[1] == 1
        logits = vlm.forward(
            request.frame, input_ids=torch.tensor([job.prompt]), decoder_input_ids=answer_ids
        )["logits"][0].float()
    assert pixels.shape == (1, 17, 32)
    logits[:, vlm.config.image_token_id] = -math.inf
    values = []
    for token, row in zip(ids, logits.softmax(-1), strict=True):
        near = range(max(first, token - 10), min(first + 1000, token + 11))
        values.append(sum(row[n] for n in near) if first <= token < first + 1000 else row[token])
    chosen = torch.stack(values).log()
    known = chosen if vlm.settings.forced_eos_token_id is None or len(ids) < 6 else chosen[:-1]
    assert answer.score == pytest.approx(math.exp(known.mean()), rel=1e-4)


def test_polygons_are_named_by_what_was_asked_for(vlm: FlorenceVLM, ask: Ask) -> None:
    generated = said(vlm, 1, 1, 9, 1, 9, 9)
    answer = vlm.read(ask("segment", prompt="the red cube"), generated)
    assert [region.label for region in answer.regions] == ["the red cube"]
    assert len(answer.regions[0].polygon) == 3


def test_text_answers_hold_no_location_tokens(vlm: FlorenceVLM, ask: Ask) -> None:
    generated = said(vlm, "a red cube", 1, 2, 3, 4)
    assert vlm.read(ask("region_category", region=(0, 0, 9, 9)), generated).text == "a red cube"


@pytest.mark.parametrize("beams", [1, 3])
def test_streamed_text_is_the_text(vlm: FlorenceVLM, ask: Ask, beams: int) -> None:
    heard: dict[int, str] = {0: "", 1: ""}
    params = GenerationParams(num_beams=beams)
    answers = vlm.run(
        [ask("detect", params=params), ask("dense_region_caption", params=params)],
        on_token=lambda index, text: heard.update({index: heard[index] + text}),
    )
    assert heard == {index: answer.text for index, answer in enumerate(answers)}
    assert all(heard.values())


def test_a_request_is_cancelled_within_one_token(vlm: FlorenceVLM, ask: Ask) -> None:
    heard: list[int] = []
    params = GenerationParams(num_beams=1)
    entries = vlm.run(
        [ask("detect", params=params), ask("detect", params=params)],
        on_token=lambda index, text: heard.append(index),
        should_stop=lambda index: index == 0 and heard.count(0) == 2,
    )
    assert code_of(entries[0]) == ErrorCode.CANCELLED
    assert heard.count(0) == 2
    assert isinstance(entries[1], ModelAnswer)


def test_a_request_past_its_deadline_is_not_answered(vlm: FlorenceVLM, ask: Ask) -> None:
    late = time.monotonic_ns() - 1
    entries = vlm.run(
        [ask("detect", deadline_ns=late), ask("embed", deadline_ns=late), ask("detect")]
    )
    assert [code_of(entry) for entry in entries[:2]] == [ErrorCode.DEADLINE_EXCEEDED] * 2
    assert isinstance(entries[2], ModelAnswer)


def test_a_task_beyond_the_model_names_the_models_that_can(
    tiny_folder, ask: Ask, frame: Frame
) -> None:
    vlm = create_vlm("florence-2-tabletop", pretrained=str(tiny_folder), device="cpu")
    bad, good = vlm.run([ask("ocr"), ask("caption")])
    assert code_of(bad) == ErrorCode.TASK_NOT_SUPPORTED
    assert "florence-2-large" in bad.hint
    assert isinstance(good, ModelAnswer)
    assert code_of(vlm.run([ask("answer", prompt="why")])[0]) == ErrorCode.TASK_NOT_SUPPORTED


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"task": "caption", "prompt": "a cup"}, ErrorCode.BAD_PARAMETER),
        ({"task": "ground", "prompt": "\x00\x07"}, ErrorCode.EMPTY_PROMPT),
        ({"task": "ground", "prompt": "cube " * 120}, ErrorCode.PROMPT_TOO_LONG),
        ({"task": "ground", "prompt": "x" * 5000}, ErrorCode.PROMPT_TOO_LONG),
        (
            {"task": "caption", "params": GenerationParams(max_new_tokens=129)},
            ErrorCode.BAD_PARAMETER,
        ),
        (
            {"task": "caption", "params": GenerationParams(max_new_tokens=1025)},
            ErrorCode.BAD_PARAMETER,
        ),
        (
            {"task": "caption", "params": GenerationParams(num_beams=2, temperature=1.0)},
            ErrorCode.BAD_PARAMETER,
        ),
    ],
)
def test_a_bad_request_fails_alone(
    vlm: FlorenceVLM, ask: Ask, fields: dict, code: ErrorCode
) -> None:
    before, bad, after = vlm.run([ask("caption"), ask(**fields), ask("caption")])
    assert code_of(bad) == code
    assert same(before, after)


def test_limits_bound_what_a_request_may_ask_for(tiny_folder, ask: Ask) -> None:
    vlm = create_vlm(
        "florence-2-base",
        pretrained=str(tiny_folder),
        device="cpu",
        limits=Limits(max_new_tokens=5, max_prompt_chars=20),
    )
    long, many, fine = vlm.run(
        [
            ask("ground", prompt="a red cube on the table"),
            ask("caption", params=GenerationParams(max_new_tokens=6)),
            ask("caption"),
        ]
    )
    assert code_of(long) == ErrorCode.PROMPT_TOO_LONG
    assert code_of(many) == ErrorCode.BAD_PARAMETER
    assert fine.generated_tokens <= 5


def test_a_prompt_of_unknown_words_is_answered(vlm: FlorenceVLM, ask: Ask) -> None:
    (answer,) = vlm.run([ask("ground", prompt="zebra <unk> 車 \U0001f916")])
    assert isinstance(answer, ModelAnswer)


def test_sampling_is_repeatable_by_seed(vlm: FlorenceVLM, ask: Ask) -> None:
    def sample(seed: int) -> str:
        params = GenerationParams(temperature=2.0, top_p=0.9, seed=seed)
        return vlm.run([ask("detect", params=params)])[0].text

    assert sample(1) == sample(1) != sample(2)


def test_per_token_embeddings(tiny_folder, ask: Ask) -> None:
    options = {"pretrained": str(tiny_folder), "device": "cpu"}
    mean = create_vlm("florence-2-base", **options).run([ask("embed")])[0].embedding
    tokens = create_vlm("florence-2-base", embedding_pooling="none", **options)
    each = tokens.run([ask("embed")])[0].embedding
    assert (mean.pooling, each.pooling) == ("mean", "none")
    assert each.array.shape == (17, 32)
    np.testing.assert_allclose(each.array.mean(axis=0), mean.array, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "held"), [("float16", np.float16), ("bfloat16", np.float32), ("fp32", np.float32)]
)
def test_every_dtype_answers(tiny_folder, ask: Ask, dtype: str, held: type) -> None:
    vlm = create_vlm("florence-2-base", pretrained=str(tiny_folder), device="cpu", dtype=dtype)
    caption, embedding = vlm.run([ask("caption"), ask("embed")])
    assert isinstance(caption, ModelAnswer)
    assert embedding.embedding.array.dtype == held


def test_nan_in_a_half_dtype_goes_on_in_a_safe_one_with_one_warning(
    tiny_folder, ask: Ask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vlm = create_vlm("florence-2-base", pretrained=str(tiny_folder), device="cpu", dtype="fp16")
    see = vlm._see

    def overflow(pixels: torch.Tensor) -> torch.Tensor:
        features = see(pixels)
        return features * math.nan if features.dtype == torch.float16 else features

    monkeypatch.setattr(vlm, "_see", overflow)
    heard: list[str] = []
    with caplog.at_level(logging.WARNING):
        answers = vlm.run(
            [ask("detect"), ask("embed")], on_token=lambda index, text: heard.append(text)
        )
        vlm.run([ask("detect")])
    assert all(isinstance(answer, ModelAnswer) for answer in answers)
    assert vlm.dtype == "float32"
    assert "".join(heard) == answers[0].text
    assert len([r for r in caplog.records if "NaN" in r.message]) == 1


def test_nan_in_float32_is_an_error_with_its_code(
    vlm: FlorenceVLM, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    see = vlm._see
    monkeypatch.setattr(vlm, "_see", lambda pixels: see(pixels) * math.nan)
    entries = vlm.run([ask("detect"), ask("embed")])
    assert [code_of(entry) for entry in entries] == [ErrorCode.NAN_LOGITS] * 2


def test_what_breaks_a_batch_is_found_and_the_rest_answered(
    vlm: FlorenceVLM, ask: Ask, make_frame: MakeFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = make_frame(5)
    embed = vlm.embed

    def run_out(jobs):
        if any(job.request.frame is poison for job in jobs):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return embed(jobs)

    monkeypatch.setattr(vlm, "embed", run_out)
    first, bad, last = vlm.run([ask("caption"), ask("caption", on=poison), ask("caption")])
    assert code_of(bad) == ErrorCode.OUT_OF_MEMORY
    assert isinstance(bad, InferenceError)
    assert same(first, last)


def test_it_answers_the_same_while_a_training_loop_has_it_in_training_mode(
    vlm: FlorenceVLM, ask: Ask
) -> None:
    (expected,) = vlm.run([ask("detect")])
    vlm.train()
    (found,) = vlm.run([ask("detect")])
    assert same(found, expected)
    assert vlm.training
    assert vlm.module.training


def test_warming_up_answers_once_and_remembers_nothing(vlm: FlorenceVLM) -> None:
    vlm.warm_up()
    assert len(vlm.frames) == 0


def test_closed_it_holds_nothing_and_says_so(vlm: FlorenceVLM, ask: Ask) -> None:
    vlm.run([ask("caption")])
    vlm.close()
    assert vlm.memory_bytes() == 0
    assert len(vlm.frames) == 0
    assert code_of(vlm.run([ask("caption")])[0]) == ErrorCode.MODEL_NOT_LOADED
    vlm.close()


def test_every_task_has_its_text_or_region_checked_by_the_core() -> None:
    assert {name for name in FLORENCE_TASKS if TASKS[name].needs_region} == {
        "region_segment",
        "region_category",
        "region_caption",
        "region_ocr",
    }
