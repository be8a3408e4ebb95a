"""PaliGemma configurations and its checkpoint layout, which is transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.key_mapping import native_tensors
from librobot_vlm_ros.models.checkpoints.loading import CheckpointLayout, LoadPlan, register_layout
from librobot_vlm_ros.models.configuration import ModelConfig

__all__ = ["PaliGemmaConfig", "plan_for"]

_VISION: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 257216,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_VARIANTS = ("paligemma-3b",)


@dataclass(frozen=True)
class PaliGemmaConfig(ModelConfig):
    """A PaliGemma architecture: the published one, and what differs from it.

    `vision_config` and `text_config` take the fields of transformers' SiglipVisionConfig and
    GemmaConfig. Raises ModelError BAD_CONFIG for an unknown variant.
    """

    variant: str = "paligemma-3b"
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    image_token_id: int = 257152
    #: File with the decoder of masks; None takes that of the weights' folder, if there is one.
    mask_decoder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _VARIANTS:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"there is no PaliGemma variant {self.variant!r}",
                f"variants: {', '.join(_VARIANTS)}",
            )

    def to_transformers(self) -> Any:
        """transformers' PaliGemmaConfig."""
        from transformers import GemmaConfig, SiglipVisionConfig
        from transformers import PaliGemmaConfig as NativeConfig

        text = {**_TEXT, **self.text_config}
        try:
            return NativeConfig(
                vision_config=SiglipVisionConfig(**{**_VISION, **self.vision_config}),
                text_config=GemmaConfig(**text),
                image_token_index=self.image_token_id,
                projection_dim=text["hidden_size"],
                hidden_size=text["hidden_size"],
                vocab_size=text["vocab_size"],
            )
        except Exception as error:  # transformers' strict configs raise errors of their own kinds
            raise ModelError(ErrorCode.BAD_CONFIG, f"PaliGemma configuration: {error}") from error


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


def _plan(config: dict[str, Any], folder: Path) -> LoadPlan:
    from transformers import PaliGemmaConfig as NativeConfig

    try:
        return plan_for(NativeConfig.from_dict(config))
    except Exception as error:  # transformers' strict configs raise errors of their own kinds
        raise ModelError(ErrorCode.BAD_CONFIG, f"config.json of a PaliGemma: {error}") from error


def _matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "paligemma"


register_layout(CheckpointLayout("paligemma (transformers)", _matches, _plan))
