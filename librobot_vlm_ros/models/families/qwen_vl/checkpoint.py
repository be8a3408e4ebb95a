"""The layout of Qwen2-VL's and Qwen3-VL's checkpoints, official and transformers' own."""

from __future__ import annotations

from typing import Any

from librobot_vlm_ros.models.checkpoints.loading import (
    LoadPlan,
    key_map,
    model_type,
    register_layout,
    renaming,
)
from librobot_vlm_ros.models.configuration import bad_value
from librobot_vlm_ros.models.families.qwen_vl.configuration import native_config

#: Names as published with either generation, and as newer versions of transformers write them.
_TENSORS = renaming(
    key_map(
        (r"^(?:model\.)?visual\.", "model.visual."),
        (r"^(?:language_model\.)?lm_head\.", "lm_head."),
        (
            r"^(?:model\.language_model|language_model\.model|language_model|model)\.",
            "model.language_model.",
        ),
    )
)


def _check_sections(text: Any) -> None:
    """The numbers that a place's time, row and column get, of each head's, must be all of them."""
    stated = (getattr(text, "rope_parameters", None) or {}).get("mrope_section")
    if stated is None:
        return
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    whole = isinstance(stated, (list, tuple)) and all(type(n) is int and n >= 0 for n in stated)
    if not whole or len(stated) != 3 or sum(stated) != head // 2:
        raise bad_value(
            "config.json: mrope_section", stated, f"three integers that make {head // 2}"
        )


def plan_for(config: Any) -> LoadPlan:
    """How a Qwen2VLConfig or Qwen3VLConfig of transformers becomes a model.

    Raises ModelError BAD_CONFIG.
    """
    from transformers import Qwen2VLForConditionalGeneration, Qwen3VLForConditionalGeneration

    _check_sections(config.text_config)
    two = config.model_type == "qwen2_vl"
    kind = Qwen2VLForConditionalGeneration if two else Qwen3VLForConditionalGeneration
    return LoadPlan(kind, config, _TENSORS)


for _type in ("qwen2_vl", "qwen3_vl"):
    register_layout(
        f"{_type} (official and transformers)",
        model_type(_type),
        lambda config, folder: plan_for(native_config(config)),
    )
