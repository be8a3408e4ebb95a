"""The usage examples of the model layer's specification, as written, at tiny size.

Only sizes are added to the configurations, and folders stand for hub ids.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models import AbstractVLM, create_vlm, get_vlm, list_vlms
from librobot_vlm_ros.models.families.qwen_vl.model import QwenVLConfig

SIZES: dict[str, Any] = {
    "image_token_id": 1100,
    "video_token_id": 1101,
    "vision_start_token_id": 1102,
    "vision_end_token_id": 1103,
    "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1200,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    },
}


def test_basic_usage(caplog: pytest.LogCaptureFixture) -> None:
    print("Available VLMs:", list_vlms())

    # Create a VLM
    config = {
        "variant": "qwen2-vl-2b",
        "use_flash_attn": True,
        "use_lora": True,
        "lora_rank": 16,
    }
    with caplog.at_level(logging.INFO):
        model = create_vlm("qwen2-vl-2b", config={**config, **SIZES}, device="cpu")
    # What became of the preference is said.
    assert any("use_flash_attn: computing with sdpa" in m for m in caplog.messages)

    # Freeze vision encoder
    for param in model.vision_encoder.parameters():
        param.requires_grad = False

    # Prepare inputs
    images = torch.randn(2, 3, 224, 224)  # Batch of 2 images
    input_ids = torch.randint(0, 1000, (2, 50))  # Text tokens
    labels = torch.randint(0, 1000, (2, 50))  # Target tokens

    # Forward pass
    outputs = model(images=images, input_ids=input_ids, labels=labels)
    print(f"Loss: {outputs['loss'].item()}")
    assert outputs["loss"].item() > 0

    # Generation
    generated_ids = model.generate(
        images=images,
        input_ids=input_ids[:, :10],  # Prompt
        max_new_tokens=100,
        temperature=0.8,
        top_p=0.95,
    )
    assert generated_ids.shape[0] == 2
    assert 1 <= generated_ids.shape[1] <= 100


def test_custom_configuration() -> None:
    # Create custom config
    config = QwenVLConfig(
        variant="qwen2-vl-7b",
        vision_num_layers=32,
        num_hidden_layers=32,
        use_flash_attn=True,
        use_lora=True,
        lora_rank=32,
        lora_alpha=64,
        **SIZES,
    )

    # Create model with custom config
    VLMClass = get_vlm("qwen2-vl-7b")  # noqa: N806 (as written there)
    model = VLMClass(config=config, freeze_vision=True)

    assert isinstance(model, AbstractVLM)
    assert len(model.language_model.layers) == 32
    assert len(model.vision_encoder.blocks) == 32
    layer = model.language_model.layers[31].mlp.up_proj
    assert (layer.r, layer.scaling) == ({"default": 32}, {"default": 2.0})
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())
    assert model.get_num_parameters(trainable_only=True) > 0


def test_creating_from_pretrained_weights_with_settings_for_training(
    family: str, family_folder: Path
) -> None:
    config = {"variant": family, "use_flash_attn": True, "use_lora": True, "lora_rank": 16}
    model = create_vlm(family, config=config, pretrained=str(family_folder), device="cpu")
    assert model.has_adapter
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    features = model.encode_image(images)  # [B, N, D]
    assert features.dim() == 3
    assert features.shape[::2] == (2, model.get_embedding_dim())


def test_the_modules_of_the_examples_exist() -> None:
    import importlib

    for info in ("qwen_vl", "florence", "paligemma", "llava"):
        importlib.import_module(f"librobot_vlm_ros.models.{info}")


@pytest.mark.parametrize("config", [{}, {"use_flash_attn": True}])
def test_flash_attention_that_is_asked_for_by_name_is_refused_where_it_cannot_be(
    family: str, family_folder: Path, config: dict[str, Any]
) -> None:
    with pytest.raises(ModelError) as caught:
        create_vlm(
            family,
            config=config,
            pretrained=str(family_folder),
            device="cpu",
            attention="flash_attention_2",
        )
    assert caught.value.code == ErrorCode.ATTENTION_UNAVAILABLE


def test_another_attention_that_is_asked_for_stands(
    family: str, family_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = create_vlm(
            family,
            config={"use_flash_attn": True},
            pretrained=str(family_folder),
            device="cpu",
            attention="eager",
        )
    assert model.config._attn_implementation == "eager"
    assert any("use_flash_attn: computing with eager" in m for m in caplog.messages)
