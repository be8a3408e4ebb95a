"""Layouts of Florence-2 checkpoints: the official one and transformers' own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.loading import (
    LoadPlan,
    expect_rank,
    key_map,
    register_layout,
    renamed,
)
from librobot_vlm_ros.models.configuration import (
    check_token,
    from_dict,
)
from librobot_vlm_ros.models.families.florence2.configuration import is_original, original_to_native

_BLOCK = r"^vision_tower\.(blocks\..+?_block)\."
_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
#: Official name to transformers' name.
_OFFICIAL = key_map(
    (r"^vision_tower\.convs\.(\d+)\.proj\.", rf"{_TOWER}.convs.\1.conv."),
    (r"^vision_tower\.convs\.(\d+)\.norm\.", rf"{_TOWER}.convs.\1.norm."),
    (rf"{_BLOCK}(conv[12])\.fn\.dw\.", rf"{_TOWER}.\1.\2."),
    (rf"{_BLOCK}(?:window|channel)_attn\.norm\.", rf"{_TOWER}.\1.norm1."),
    (rf"{_BLOCK}((?:window|channel)_attn)\.fn\.(qkv|proj)\.", rf"{_TOWER}.\1.\2.\3."),
    (rf"{_BLOCK}ffn\.norm\.", rf"{_TOWER}.\1.norm2."),
    (rf"{_BLOCK}ffn\.fn\.net\.(fc[12])\.", rf"{_TOWER}.\1.ffn.\2."),
    (r"^image_projection$", f"{_PROJECTOR}.image_projection.weight"),
    (r"^image_proj_norm\.", f"{_PROJECTOR}.image_proj_norm."),
    (r"^image_pos_embed\.(row|column)_", rf"{_PROJECTOR}.image_position_embed.\1_"),
    (r"^visual_temporal_embed\.", f"{_PROJECTOR}.visual_temporal_embed."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
#: What prompts and answers are put together from.
_TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
#: Tables with one row a token, to which the row of the image token is added.
_TOKEN_TABLES = ("shared.weight", "embed_tokens.weight", "lm_head.weight")


def attention_parts(attention: str) -> str | dict[str, str]:
    """flash-attn serves the text model only.

    DaViT's channel attention takes the number of pixels as its head size, far beyond what
    flash-attn can do.
    """
    if attention != "flash_attention_2":
        return attention
    return {"": attention, "text_config": attention, "vision_config": "sdpa"}


def plan_for(config: Any) -> LoadPlan:
    """Keys as transformers names them, for a Florence2Config. Raises ModelError BAD_CONFIG."""
    from transformers import Florence2ForConditionalGeneration

    text = config.text_config
    for name in _TEXT_IDS:
        check_token(f"config.json: text_config.{name}", getattr(text, name), text.vocab_size)
    check_token("config.json: image_token_id", config.image_token_id, text.vocab_size)
    return LoadPlan(
        model_class=Florence2ForConditionalGeneration,
        config=config,
        convert=lambda key, value: [(key, value)],
        attention=attention_parts,
    )


def _plan_original(config: dict[str, Any], folder: Path) -> LoadPlan:
    native = original_to_native(config)

    def convert(key: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
        if key == "language_model.final_logits_bias":
            if bool(value.any()):
                raise ModelError(
                    ErrorCode.KEY_MISMATCH,
                    f"{key} is not zero, and transformers' Florence-2 has no place for it",
                )
            return
        name = renamed(key, _OFFICIAL)
        if key == "image_projection":
            expect_rank(key, value, 2)
            value = value.t()
        elif name.endswith(_TOKEN_TABLES):
            expect_rank(key, value, 2)
            if value.shape[0] == native.text_config.vocab_size - 1:
                value = torch.cat([value, value.new_zeros(1, value.shape[1])])
        yield name, value

    return dataclasses.replace(plan_for(native), convert=convert)


register_layout("florence-2 (official)", is_original, _plan_original)
register_layout(
    "florence-2 (transformers)",
    lambda config: config.get("model_type") == "florence2" and not is_original(config),
    lambda config, folder: plan_for(from_dict("Florence2Config", config, "a Florence-2")),
)
