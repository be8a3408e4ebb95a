"""Device, dtype and attention: honoured or refused."""

from __future__ import annotations

import pytest
import torch

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.placement import resolve_placement


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("_no_gpu")
def test_auto_without_a_gpu() -> None:
    found = resolve_placement()
    assert (str(found.device), found.dtype, found.attention) == ("cpu", torch.float32, "sdpa")


def test_auto_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = resolve_placement()
    assert (str(found.device), found.dtype, found.attention) == ("cuda:0", torch.float16, "sdpa")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "flash_attn")
    assert resolve_placement().attention == "flash_attention_2"
    assert resolve_placement(dtype="float32").attention == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_placement().attention == "sdpa"


@pytest.mark.parametrize("name", ["float16", "fp16", "half", "torch.float16", torch.float16])
def test_names_of_a_dtype(name: object) -> None:
    assert resolve_placement("cpu", name).dtype == torch.float16


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize(
    ("choice", "code"),
    [
        ({"device": "cuda"}, ErrorCode.DEVICE_UNAVAILABLE),
        ({"device": "cuda:7"}, ErrorCode.DEVICE_UNAVAILABLE),
        ({"device": "toaster"}, ErrorCode.DEVICE_UNAVAILABLE),
        ({"device": "mps"}, ErrorCode.DEVICE_UNAVAILABLE),
        ({"dtype": "float8"}, ErrorCode.DTYPE_UNSUPPORTED),
        ({"dtype": "int8"}, ErrorCode.DTYPE_UNSUPPORTED),
        ({"attention": "flash_attention_2"}, ErrorCode.ATTENTION_UNAVAILABLE),
        ({"attention": "paged"}, ErrorCode.ATTENTION_UNAVAILABLE),
        ({"quantization": "int3"}, ErrorCode.BAD_CONFIG),
    ],
)
def test_what_cannot_be_done_is_refused(tiny_folder, choice: dict, code: ErrorCode) -> None:
    with pytest.raises(ModelError) as caught:
        create_vlm("florence-2-tabletop", pretrained=str(tiny_folder), **choice)
    assert caught.value.code == code


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old One")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ModelError, match="Old One") as caught:
        resolve_placement("cuda", "bfloat16")
    assert caught.value.code == ErrorCode.DTYPE_UNSUPPORTED


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_reaches_every_part(tiny_folder, attention: str) -> None:
    vlm = create_vlm(
        "florence-2-tabletop", pretrained=str(tiny_folder), device="cpu", attention=attention
    )
    parts = (vlm.config, vlm.config.vision_config, vlm.language_model.encoder.config)
    assert {part._attn_implementation for part in parts} == {attention}


def test_flash_attention_serves_the_text_model_only() -> None:
    from librobot_vlm_ros.models.families.florence2.checkpoint import attention_parts
    from librobot_vlm_ros.models.families.florence2.configuration import FlorenceConfig

    config = FlorenceConfig().to_transformers()
    config._attn_implementation = attention_parts("flash_attention_2")
    assert config.text_config._attn_implementation == "flash_attention_2"
    assert config.vision_config._attn_implementation == "sdpa"
