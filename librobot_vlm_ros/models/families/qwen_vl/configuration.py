"""Qwen2-VL and Qwen3-VL configurations and checkpoint layouts, official and transformers' own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.key_mapping import DERIVED, renamed
from librobot_vlm_ros.models.checkpoints.loading import CheckpointLayout, LoadPlan, register_layout
from librobot_vlm_ros.models.configuration import ModelConfig, bad_value

__all__ = ["QwenVLConfig", "plan_for"]

_CHAT_IDS = {"bos_token_id": 151643, "eos_token_id": 151645}
_QWEN2_TEXT: dict[str, Any] = {
    **_CHAT_IDS,
    "num_hidden_layers": 28,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
_QWEN2_VISION: dict[str, Any] = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
_QWEN3_TEXT: dict[str, Any] = {
    **_CHAT_IDS,
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "rope_scaling": {
        "rope_type": "default",
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
#: Text model, vision model, and whether the output layer is the word table.
_VARIANTS: Mapping[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "qwen2-vl-2b": (
        {
            **_QWEN2_TEXT,
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
        {**_QWEN2_VISION, "hidden_size": 1536},
        True,
    ),
    "qwen2-vl-7b": (
        {
            **_QWEN2_TEXT,
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        {**_QWEN2_VISION, "hidden_size": 3584},
        False,
    ),
    "qwen3-vl-4b": (
        {**_QWEN3_TEXT, "hidden_size": 2560, "intermediate_size": 9728},
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        True,
    ),
    "qwen3-vl-8b": (
        {**_QWEN3_TEXT, "hidden_size": 4096, "intermediate_size": 12288},
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        False,
    ),
}


@dataclass(frozen=True)
class QwenVLConfig(ModelConfig):
    """A Qwen2-VL or Qwen3-VL architecture: a published one, and what differs from it.

    `vision_config` and `text_config` take the fields of transformers' Qwen2VLVisionConfig and
    Qwen2VLTextConfig, or Qwen3VLVisionConfig and Qwen3VLTextConfig. Raises ModelError BAD_CONFIG
    for an unknown variant.
    """

    variant: str = "qwen2-vl-2b"
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    #: Layers of the vision and of the text model; None means those of the variant.
    vision_num_layers: int | None = None
    num_hidden_layers: int | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool | None = None
    #: Bounds of a resized image's area in pixels; None means those of the checkpoint.
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {"qwen3-vl-7b": "qwen3-vl-8b"}.get(self.variant, self.variant)
        if named not in _VARIANTS:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"there is no Qwen-VL variant {self.variant!r}",
                f"variants: {', '.join(_VARIANTS)}",
            )
        object.__setattr__(self, "variant", named)
        for part, key, count in (
            ("vision_config", "depth", self.vision_num_layers),
            ("text_config", "num_hidden_layers", self.num_hidden_layers),
        ):
            if count is not None:
                object.__setattr__(self, part, {**getattr(self, part), key: count})

    def to_transformers(self) -> Any:
        """transformers' Qwen2VLConfig or Qwen3VLConfig."""
        text, vision, tied = _VARIANTS[self.variant]
        text, vision = {**text, **self.text_config}, {**vision, **self.vision_config}
        if self.variant.startswith("qwen2"):
            vision["hidden_size"] = text["hidden_size"]
        else:
            vision["out_hidden_size"] = text["hidden_size"]
        marks = {
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
        }
        if beyond := [name for name, token in marks.items() if token >= text["vocab_size"]]:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"{beyond[0]} is {marks[beyond[0]]}, the vocabulary has {text['vocab_size']}",
                f"give a smaller vocabulary its own {', '.join(marks)}",
            )
        return _native(
            {
                "model_type": "qwen2_vl" if self.variant.startswith("qwen2") else "qwen3_vl",
                "text_config": text,
                "vision_config": vision,
                "tie_word_embeddings": tied
                if self.tie_word_embeddings is None
                else self.tie_word_embeddings,
                **marks,
            }
        )


def _native(config: dict[str, Any]) -> Any:
    import transformers

    kind = {"qwen2_vl": "Qwen2VLConfig", "qwen3_vl": "Qwen3VLConfig"}[config["model_type"]]
    try:
        return getattr(transformers, kind).from_dict(config)
    except Exception as error:  # transformers' strict configs raise errors of their own kinds
        raise ModelError(ErrorCode.BAD_CONFIG, f"config.json of a Qwen-VL: {error}") from error


_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:model\.)?visual\.", "model.visual."),
        (r"^(?:language_model\.)?lm_head\.", "lm_head."),
        (
            r"^(?:model\.language_model|language_model\.model|language_model|model)\.",
            "model.language_model.",
        ),
    )
)


def _tensors(key: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Names as published with either family, and as newer versions of transformers write them."""
    if not DERIVED.search(key):
        yield renamed(key, _NAMES), value


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
    return LoadPlan(kind, config, _tensors)


def _plan(config: dict[str, Any], folder: Path) -> LoadPlan:
    return plan_for(_native(config))


for _family in ("qwen2_vl", "qwen3_vl"):
    register_layout(
        CheckpointLayout(
            f"{_family} (official and transformers)",
            lambda config, family=_family: config.get("model_type") == family,  # type: ignore[misc]
            _plan,
        )
    )
