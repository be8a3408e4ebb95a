"""NaN in a half dtype: every family and every way of decoding goes on in a safe one, told once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from librobot_vlm_ros.core import ErrorCode, GenerationParams, InferenceError, ModelAnswer
from librobot_vlm_ros.models import AbstractVLM, create_vlm
from librobot_vlm_ros.models.placement import move_module

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "sampling": {"temperature": 0.9, "top_p": 0.9, "seed": 4},
    "beams": {"num_beams": 2},
}


@pytest.fixture
def overflowing(family: str, family_folder: Path) -> Callable[[str], AbstractVLM]:
    """The tiny model in a dtype; what its vision side computes first is NaN in half precision."""

    def poison(_layer: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output if output.dtype == torch.float32 else output * torch.nan

    def load(dtype: str) -> AbstractVLM:
        vlm = create_vlm(family, pretrained=str(family_folder), device="cpu", dtype=dtype)
        kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
        first = next(part for part in vlm.vision_encoder.modules() if isinstance(part, kinds))
        first.register_forward_hook(poison)
        return vlm

    return load


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("way", sorted(WAYS))
def test_requests_are_answered_in_a_safe_dtype_with_one_warning(
    overflowing: Callable[[str], AbstractVLM], ask, caplog, way: str
) -> None:
    vlm = overflowing("float16")
    request = ask("caption", params=GenerationParams(max_new_tokens=3, **WAYS[way]))
    (first,) = vlm.run([request])
    (again,) = vlm.run([request])
    assert isinstance(first, ModelAnswer), first
    assert first.text == again.text
    assert vlm.dtype == "float32"
    (warning,) = warnings_of(caplog)
    assert "float16" in warning
    assert "float32" in warning


@pytest.mark.parametrize("way", sorted(WAYS))
def test_generate_goes_on_in_a_safe_dtype_with_one_warning(
    overflowing: Callable[[str], AbstractVLM], batch: dict[str, Any], caplog, way: str
) -> None:
    vlm = overflowing("bfloat16")
    options = {"max_new_tokens": 3, **WAYS[way]}
    first = vlm.generate(batch["images"], batch["input_ids"], **options)
    assert vlm.dtype == "float32"
    assert torch.equal(vlm.generate(batch["images"], batch["input_ids"], **options), first)
    assert len(warnings_of(caplog)) == 1


def test_embeddings_go_on_in_a_safe_dtype_with_one_warning(
    overflowing: Callable[[str], AbstractVLM], ask, caplog
) -> None:
    vlm = overflowing("float16")
    answers = [vlm.run([ask("embed")])[0] for _ in range(2)]
    assert all(isinstance(answer, ModelAnswer) for answer in answers)
    assert len(warnings_of(caplog)) == 1


def test_nan_in_float32_is_an_error(
    overflowing: Callable[[str], AbstractVLM], batch: dict[str, Any]
) -> None:
    vlm = overflowing("float32")
    with torch.no_grad():
        next(vlm.vision_encoder.parameters()).fill_(torch.nan)
    with pytest.raises(InferenceError) as caught:
        vlm.generate(batch["images"], batch["input_ids"], max_new_tokens=2)
    assert caught.value.code == ErrorCode.NAN_LOGITS


@pytest.mark.parametrize("moved", ["made in", "gone to"])
def test_rotary_frequencies_stay_in_full_precision(moved: str) -> None:
    config = {
        "vision_config": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
        "text_config": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    }
    config["vision_config"] |= {"intermediate_size": 24}
    config["text_config"] |= {"intermediate_size": 24, "num_key_value_heads": 2}
    dtype = "bfloat16" if moved == "made in" else "float32"
    vlm = create_vlm("llava-v1.5-7b", config=config, device="cpu", dtype=dtype)
    if moved == "gone to":  # as from float16 on a GPU
        move_module(vlm.module, dtype=torch.bfloat16)
    rotary = vlm.language_model.rotary_emb
    exact = 1e4 ** -(torch.arange(0, 32, 2) / 32)
    assert vlm.dtype == "bfloat16"
    assert torch.allclose(rotary.inv_freq, exact, rtol=1e-6, atol=0)
