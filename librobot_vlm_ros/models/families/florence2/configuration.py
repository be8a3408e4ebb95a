"""Florence-2 configurations: ours, those of the official checkpoints, and transformers' own.

The official checkpoints (microsoft/Florence-2-*) carry ``model_type: florence2`` too, but name
their fields otherwise, and transformers would silently read them as defaults. Their text model
has no token for the image: it is inserted as vectors. transformers marks those places with a
token, so one row is added behind the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from librobot_vlm_ros.models.configuration import (
    FamilyConfig,
    bad_config,
    published_variants,
    strict_config,
    unreadable,
)


@dataclass(frozen=True)
class FlorenceConfig(FamilyConfig):
    """A Florence-2 architecture: a published variant, and what differs from it.

    `vision_config` and `text_config` take the fields of transformers' Florence2VisionConfig and
    BartConfig. Raises ModelError BAD_CONFIG for an unknown variant or a bad image size.
    """

    family: ClassVar = "Florence-2"
    variants: ClassVar = published_variants(__file__)

    variant: str = "florence-2-base"
    #: Side of the square input, in pixels.
    image_size: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.image_size, int) or self.image_size < 32:
            raise bad_config(
                f"image_size is {self.image_size!r}, expected an integer of at least 32 pixels"
            )

    def to_transformers(self) -> Any:
        """transformers' Florence2Config; the image token is the last of the vocabulary."""
        vision, text = self.parts()
        return _native(vision, text, text["vocab_size"] - 1)


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in the layout of the official checkpoints."""
    vision = config.get("vision_config")
    return isinstance(vision, Mapping) and (
        vision.get("model_type") == "davit" or "dim_embed" in vision
    )


def original_to_native(config: Mapping[str, Any]) -> Any:
    """transformers' Florence2Config for an official config.json. Raises ModelError BAD_CONFIG."""
    with unreadable("config.json of an official Florence-2 cannot be read"):
        vision = dict(config["vision_config"])
        text = dict(config["text_config"])
        image_token = int(text["vocab_size"])
        sources = vision.pop("image_feature_source", ["spatial_avg_pool", "temporal_avg_pool"])
        if list(sources) != ["spatial_avg_pool", "temporal_avg_pool"]:
            raise ValueError(f"image_feature_source {sources}")
        temporal = vision.pop("visual_temporal_embedding")
        position = vision.pop("image_pos_embed")
        if temporal["type"] != "COSINE" or position["type"] != "learned_abs_2d":
            raise ValueError(f"embeddings {temporal['type']} and {position['type']}")
        vision["embed_dim"] = vision.pop("dim_embed")
        vision["max_temporal_embeddings"] = temporal["max_temporal_embeddings"]
        vision["max_position_embeddings"] = position["max_pos_embeddings"]
    for name in ("model_type", "enable_checkpoint"):
        vision.pop(name, None)
    # How to generate stands in the official text_config; transformers keeps that apart.
    for name in ("model_type", *_GENERATION):
        text.pop(name, None)
    return _native(vision, {**text, "vocab_size": image_token + 1}, image_token)


_GENERATION = (
    "num_beams",
    "no_repeat_ngram_size",
    "early_stopping",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def image_tokens(vision_config: Any, height: int, width: int) -> int:
    """Tokens of an image of height x width pixels: one for the mean, one a cell of the last map.

    Raises ModelError BAD_CONFIG when the map is larger than the table of positions.
    """
    for size, stride, padding in zip(
        vision_config.patch_size,
        vision_config.patch_stride,
        vision_config.patch_padding,
        strict=True,
    ):
        height = (height + 2 * padding - size) // stride + 1
        width = (width + 2 * padding - size) // stride + 1
    limit = vision_config.max_position_embeddings
    if not (1 <= height <= limit and 1 <= width <= limit):
        raise bad_config(
            f"the image gives {height}x{width} cells, the model has positions for 1 to {limit}",
            "use images of the size in preprocessor_config.json",
        )
    return 1 + height * width


def _native(vision: dict[str, Any], text: dict[str, Any], image_token: int) -> Any:
    from transformers import BartConfig, Florence2Config

    with strict_config("Florence-2 configuration"):
        return Florence2Config(
            vision_config=vision,
            # A configuration object, not a dict: a dict would be completed by BART-large's values
            # in some versions of transformers and refused without a model_type in others.
            text_config=BartConfig(**text),
            image_token_id=image_token,
            bos_token_id=text.get("bos_token_id", 0),
            eos_token_id=text.get("eos_token_id", 2),
            pad_token_id=text.get("pad_token_id", 1),
        )
