"""Qwen2-VL and Qwen3-VL configurations: ours and transformers' own, which the official ones are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from librobot_vlm_ros.models.configuration import (
    FamilyConfig,
    check_marks,
    from_dict,
    published_variants,
)


@dataclass(frozen=True)
class QwenVLConfig(FamilyConfig):
    """A Qwen2-VL or Qwen3-VL architecture: a published one, and what differs from it.

    `vision_config` and `text_config` take the fields of transformers' Qwen2VLVisionConfig and
    Qwen2VLTextConfig, or Qwen3VLVisionConfig and Qwen3VLTextConfig. Raises ModelError BAD_CONFIG
    for an unknown variant.
    """

    family: ClassVar = "Qwen-VL"
    variants: ClassVar = published_variants(__file__)

    variant: str = "qwen2-vl-2b"
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
        if self.variant == "qwen3-vl-7b":
            object.__setattr__(self, "variant", "qwen3-vl-8b")
        super().__post_init__()
        for part, key, count in (
            ("vision_config", "depth", self.vision_num_layers),
            ("text_config", "num_hidden_layers", self.num_hidden_layers),
        ):
            if count is not None:
                object.__setattr__(self, part, {**getattr(self, part), key: count})

    def to_transformers(self) -> Any:
        """transformers' Qwen2VLConfig or Qwen3VLConfig."""
        vision, text = self.parts()
        published = self.variants[self.variant]
        second = published["model_type"] == "qwen2_vl"
        vision["hidden_size" if second else "out_hidden_size"] = text["hidden_size"]
        tied = self.tie_word_embeddings
        marks = {
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
        }
        check_marks(marks, text["vocab_size"])
        return native_config(
            {
                **published,
                "text_config": text,
                "vision_config": vision,
                "tie_word_embeddings": published["tie_word_embeddings"] if tied is None else tied,
                **marks,
            }
        )


def native_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration of a config.json. Raises ModelError BAD_CONFIG."""
    kind = {"qwen2_vl": "Qwen2VLConfig", "qwen3_vl": "Qwen3VLConfig"}[config["model_type"]]
    return from_dict(kind, config, "a Qwen-VL")
