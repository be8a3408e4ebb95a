"""LLaVA-1.5 configurations: ours, those of the official checkpoints, and transformers' own.

The official checkpoints (liuhaotian/llava-v1.5-*) carry ``model_type: llava`` too, but are a Llama
configuration with fields of their own, and transformers would silently read them as defaults. They
have no token for the image: transformers marks its places with one, so rows are added behind the
vocabulary, padded to a multiple of 64 as in the published conversions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from librobot_vlm_ros.models.configuration import (
    FamilyConfig,
    bad_config,
    llama_fields,
    published_variants,
    stated,
    strict_config,
    unreadable,
)

_VARIANTS = published_variants(__file__)
#: CLIP ViT-L/14 at 336 pixels: the tower of both published sizes.
CLIP_LARGE_336 = _VARIANTS["llava-v1.5-7b"]["vision_config"]
_VISION_FIELDS = (*CLIP_LARGE_336, "num_channels", "hidden_act", "layer_norm_eps")
_ROW_MULTIPLE = 64


@dataclass(frozen=True)
class LlavaConfig(FamilyConfig):
    """A LLaVA-1.5 architecture: a published variant, and what differs from it.

    `vision_config` and `text_config` take the fields of transformers' CLIPVisionConfig and
    LlamaConfig; `vocab_size` is that of the words, without the image token. Raises ModelError
    BAD_CONFIG for an unknown variant.
    """

    family: ClassVar = "LLaVA"
    variants: ClassVar = _VARIANTS

    variant: str = "llava-v1.5-7b"

    def to_transformers(self) -> Any:
        """transformers' LlavaConfig."""
        return _native(*self.parts(), -2, "default")


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in the layout of the official checkpoints."""
    kinds = config.get("architectures")
    return "mm_projector_type" in config or (
        isinstance(kinds, list) and "LlavaLlamaForCausalLM" in kinds
    )


def original_to_native(config: Mapping[str, Any], vision: Mapping[str, Any]) -> Any:
    """transformers' LlavaConfig for an official config.json and its tower's configuration.

    Raises ModelError BAD_CONFIG for what is missing, and for what LLaVA-1.5 does not have.
    """
    expected = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tie_word_embeddings": False,
    }
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise bad_config(
                f"config.json of a LLaVA: {name} is {config[name]!r}, LLaVA-1.5 has {value!r}"
            )
    with unreadable("config.json of an official LLaVA cannot be read"):
        text = {**llama_fields(config), "vocab_size": int(config["vocab_size"])}
        layer = int(config["mm_vision_select_layer"])
        kind = {"patch": "default", "cls_patch": "full"}[
            config.get("mm_vision_select_feature", "patch")
        ]
        tower = stated(vision, _VISION_FIELDS)
    return _native(tower, text, layer, kind)


def _native(vision: Mapping[str, Any], text: Mapping[str, Any], layer: int, kind: str) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig
    from transformers import LlavaConfig as NativeConfig

    words = int(text["vocab_size"])
    # Behind the words: the image's token and a pad token.
    rows = -(-(words + 2) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    with strict_config("LLaVA configuration"):
        return NativeConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=LlamaConfig(**{**text, "vocab_size": rows, "tie_word_embeddings": False}),
            image_token_index=words,
            vision_feature_layer=layer,
            vision_feature_select_strategy=kind,
            tie_word_embeddings=False,
        )
