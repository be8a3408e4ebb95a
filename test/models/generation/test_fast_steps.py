"""The functional decode steps: what the modules would have said, faster, or an honest refusal."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from librobot_vlm_ros.core import ErrorCode, GenerationParams, ModelAnswer, ModelError
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.generation.config import Generated
from librobot_vlm_ros.models.generation.fast.bart import FastBartDecoder
from librobot_vlm_ros.models.generation.fast.graph_runner import GraphRunner, bucket
from librobot_vlm_ros.models.generation.fast.llama import FastCausalDecoder, FastLlama
from librobot_vlm_ros.models.generation.loop import generate

_VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
_VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 1200}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
_MARKS = {"image_token_id": 1100, "video_token_id": 1101}
_MARKS |= {"vision_start_token_id": 1102, "vision_end_token_id": 1103}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava-v1.5-7b": {"vision_config": _VISION, "text_config": {**_TEXT, "head_dim": 8}},
    "paligemma-3b": {
        "vision_config": _VISION,
        "text_config": {**_TEXT, "head_dim": 16},
        "image_token_id": 1100,
    },
    "internvl2-2b": {
        "vision_config": _VISION,
        "text_config": {**_TEXT, "head_dim": 8},
        "image_token_id": 1100,
    },
    "qwen2-vl-2b": {
        **_MARKS,
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2},
        "text_config": {**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
    },
    "qwen3-vl-4b": {
        **_MARKS,
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
        "text_config": {
            **_TEXT,
            "head_dim": 8,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
    },
}


@pytest.fixture(params=sorted(CONFIGS))
def causal(request: pytest.FixtureRequest):
    torch.manual_seed(3)
    name = request.param
    vlm = create_vlm(name, config={"variant": name, **CONFIGS[name]}, device="cpu").eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would prove little
        for key, weight in vlm.language_model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                weight.add_(torch.randn_like(weight) * 0.2)
    return vlm


def generated(vlm: Any, decoder: str, rows: list[list[int]], params: GenerationParams):
    """Tokens and log-probabilities of a batch of prompts without images."""
    vlm.generator.kind = decoder
    with vlm.inference():
        made, history = vlm.start(None, rows)
        kind = (FastCausalDecoder, FastBartDecoder)
        assert isinstance(made, kind) == (decoder == "functional")
        found = generate(
            made, vlm.processor.generation_config(params), history, seeds=[4, 5, 6][: len(rows)]
        )
    assert all(isinstance(row, Generated) for row in found)
    return found


PARAMS = [
    GenerationParams(max_new_tokens=90),  # longer than the first cache
    GenerationParams(max_new_tokens=12, num_beams=3),
    GenerationParams(max_new_tokens=12, temperature=0.9),
]


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "beams", "sampled"])
def test_a_batch_of_prompts_continues_as_through_the_module(
    causal, params: GenerationParams
) -> None:
    rows = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15]]
    expected = generated(causal, "module", rows, params)
    found = generated(causal, "functional", rows, params)
    assert [row.ids for row in found] == [row.ids for row in expected]
    assert len({row.ids for row in found}) == 3
    for row, other in zip(found, expected, strict=True):
        assert row.log_probs == pytest.approx(other.log_probs, abs=2e-4)


def test_beyond_the_length_that_a_rotary_base_grows_with_the_module_decodes(causal) -> None:
    if causal.name != "internvl2-2b":
        pytest.skip("its frequencies do not depend on the length")
    room = int(causal.config.text_config.max_position_embeddings)
    causal.generator.kind = "auto"
    with causal.inference():
        near, _ = causal.start(None, [[5, 6, 7]], new_tokens=room - 4)
        far, _ = causal.start(None, [[5, 6, 7]], new_tokens=room - 3)
        causal.generator.kind = "functional"
        with pytest.raises(ModelError, match="depends on the length beyond") as caught:
            causal.start(None, [[5, 6, 7]], new_tokens=room - 3)
    assert isinstance(near, FastCausalDecoder)
    assert not isinstance(far, FastCausalDecoder)
    assert caught.value.code == ErrorCode.BAD_CONFIG


@pytest.mark.parametrize("params", PARAMS[:2], ids=["greedy", "beams"])
def test_florence_continues_as_through_the_module(vlm, params: GenerationParams) -> None:
    rows = [[0, 5, 9, 2], [0, 7, 2], [0, 8, 8, 8, 8, 2]]
    expected = generated(vlm, "module", rows, params)
    found = generated(vlm, "functional", rows, params)
    assert [row.ids for row in found] == [row.ids for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.log_probs == pytest.approx(other.log_probs, abs=2e-4, nan_ok=True)


def moved_about(vlm: Any, decoder: str, rows: list[list[int]]) -> torch.Tensor:
    """Logits after rows were swapped among prompts, and became more and fewer, on their way."""
    vlm.generator.kind = decoder
    with vlm.inference():
        made, _ = vlm.start(None, rows)
        made.prefill()
        for order in (None, [1, 0], [0, 0, 1, 1], [3, 1, 0, 2], [2, 0]):
            if order is not None:
                made.reorder(torch.tensor(order))
            count = 2 if order is None else len(order)
            logits = made.decode(torch.arange(20, 20 + count))
        return logits


def test_rows_may_change_their_prompts_and_their_number(causal, vlm) -> None:
    for model, rows in ((causal, [[5, 6, 7], [9]]), (vlm, [[0, 5, 2], [0, 9, 9, 9, 2]])):
        expected = moved_about(model, "module", rows)
        found = moved_about(model, "functional", rows)
        assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["llava-v1.5-7b", "qwen3-vl-4b"])
def test_half_precision_stays_close_to_the_module(name: str) -> None:
    torch.manual_seed(3)
    config = {"variant": name, **CONFIGS[name]}
    vlm = create_vlm(name, config=config, device="cpu", dtype="bfloat16").eval()
    with torch.inference_mode():
        logits = []
        for decoder in ("module", "functional"):
            vlm.generator.kind = decoder
            made, _ = vlm.start(None, [[5, 6, 7]])
            made.prefill()
            logits.append(made.decode(torch.tensor([8])).float())
    assert logits[1].dtype == torch.float32
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


def test_the_weights_are_the_modules_own(causal) -> None:
    step = FastLlama(causal.language_model, causal.module.lm_head)
    layer = causal.language_model.layers[1]
    assert step.layers[1].up.data_ptr() == layer.mlp.up_proj.weight.data_ptr()
    assert step.layers[1].out.data_ptr() == layer.self_attn.o_proj.weight.data_ptr()
    assert step.head.data_ptr() == causal.module.lm_head.weight.data_ptr()


class _Wrapped(nn.Linear):
    """A linear layer that does something of its own, as an adapter's would."""


def test_a_layer_that_is_not_plain_is_left_to_the_module(
    causal, caplog: pytest.LogCaptureFixture
) -> None:
    attention = causal.language_model.layers[1].self_attn
    plain = attention.q_proj
    wrapped = _Wrapped(plain.in_features, plain.out_features, bias=plain.bias is not None)
    attention.q_proj = wrapped
    with caplog.at_level(logging.DEBUG, "librobot_vlm_ros"):
        generated(causal, "auto", [[5]], GenerationParams(max_new_tokens=2))
    assert "decodes through its module: a _Wrapped" in caplog.text
    causal.generator.kind = "functional"
    with pytest.raises(ModelError, match="_Wrapped") as caught:
        causal.start(None, [[5]])
    assert caught.value.code == ErrorCode.BAD_CONFIG
    attention.q_proj = plain
    plain.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="hooks"):
        causal.start(None, [[5]])


def test_training_and_unknown_decoders_are_refused(causal) -> None:
    causal.generator.kind = "functional"
    causal.train()
    with pytest.raises(ModelError, match="training"):
        causal.start(None, [[5]])
    with pytest.raises(ModelError, match="module, functional"):
        create_vlm(causal.name, config=CONFIGS[causal.name], device="cpu", decoder="fast")


def test_weights_that_change_between_answers_are_the_ones_used(vlm, ask) -> None:
    request = ask("caption", params=GenerationParams(max_new_tokens=8))
    (before,) = vlm.run([request])
    with torch.no_grad():
        vlm.module.model.language_model.decoder.layers[0].fc1.weight.mul_(-3.0)
    (after,) = vlm.run([request])
    vlm.generator.kind = "module"
    (reference,) = vlm.run([request])
    assert isinstance(before, ModelAnswer)
    assert after.text == reference.text
    assert (after.text, after.score) != (before.text, before.score)


def test_caches_come_in_few_sizes() -> None:
    assert [bucket(n, 256) for n in (1, 256, 257, 1000)] == [256, 256, 512, 1024]
    assert [bucket(n, 1) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


class _Owner:
    pass


def test_a_runner_keeps_the_caches_that_nobody_uses_and_no_more(causal) -> None:
    runner = GraphRunner(FastLlama(causal.language_model, causal.module.lm_head))
    runner.cuda, runner.refused = True, "not here"  # the bookkeeping of CUDA, without a graph
    first, second = _Owner(), _Owner()
    with torch.inference_mode():
        mine = runner.static_cache(first, 3, 100)
        assert (mine.rows, mine.capacity) == (4, 256)
        mine.kv.fill_(1.0)
        mine.cache_position.fill_(9)
        assert runner.static_cache(second, 3, 100) is not mine
        del second
        other = runner.static_cache(first, 4, 200)
        assert other is not mine
        kept = id(other)
        del first, other
        third = _Owner()
        again = runner.static_cache(third, 4, 256)
        assert id(again) == kept
        assert not again.kv.any()
        assert int(again.cache_position) == 0
        owners = [_Owner() for _ in range(8)]
        for number, owner in enumerate(owners):
            runner.static_cache(owner, 1, 256 << number % 6)
        assert len(runner._kept) <= 4


def test_padded_rows_of_a_cache_do_not_change_the_answers(causal) -> None:
    rows = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15]]
    params = GenerationParams(max_new_tokens=10)
    expected = generated(causal, "functional", rows, params)
    with causal.inference():
        made, history = causal.start(None, rows)
        made._runner.cuda, made._runner.refused = True, "not here"
        found = generate(made, causal.processor.generation_config(params), history)
        assert [row.ids for row in found] == [row.ids for row in expected]
        assert made._cache.rows == 4


def test_a_graph_that_cannot_be_captured_is_said_once_and_done_without(
    causal, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = GraphRunner(FastLlama(causal.language_model, causal.module.lm_head))
    runner.cuda, runner.refused = True, ""

    def broken(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "Stream", broken)
    owner = _Owner()
    with torch.inference_mode():
        for capacity in (100, 300):
            cache = runner.static_cache(owner, 1, capacity)
            assert runner.decode_one_token(cache).shape == (1, len(causal.module.lm_head.weight))
    assert caplog.text.count("without a CUDA graph") == 1
    assert "capturing" in runner.refused


def test_a_folder_tells_nothing_of_the_decoder(tiny_folder: Path) -> None:
    vlm = create_vlm("florence-2-base", pretrained=str(tiny_folder), device="cpu", decoder="module")
    assert vlm.generator.kind == "module"
