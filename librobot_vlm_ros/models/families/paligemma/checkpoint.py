"""The layout of PaliGemma's checkpoints, which is transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from librobot_vlm_ros.models.checkpoints.loading import (
    LoadPlan,
    model_type,
    native_tensors,
    register_layout,
)
from librobot_vlm_ros.models.configuration import from_dict
from librobot_vlm_ros.models.families.paligemma.masks import find_mask_decoder


def plan_for(config: Any) -> LoadPlan:
    """Keys as transformers names them, for its PaliGemmaConfig."""
    from transformers import PaliGemmaForConditionalGeneration

    return LoadPlan(
        PaliGemmaForConditionalGeneration, config, native_tensors, attention=_attention_parts
    )


def _attention_parts(attention: str) -> str | dict[str, str]:
    """flash-attn serves the tower only: it cannot let a prompt see all of itself."""
    if attention != "flash_attention_2":
        return attention
    return {"": "sdpa", "text_config": "sdpa", "vision_config": attention}


def _mask_decoder(config: dict[str, Any], folder: Path) -> dict[str, Path]:
    path = find_mask_decoder(folder)
    return {} if path is None else {path.name: path}


register_layout(
    "paligemma (transformers)",
    model_type("paligemma"),
    lambda config, folder: plan_for(from_dict("PaliGemmaConfig", config, "a PaliGemma")),
    _mask_decoder,
)
