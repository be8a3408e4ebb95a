"""InternVL2 configurations: ours, those of the official checkpoints, and transformers' own.

The official ones (OpenGVLab/InternVL2-*, ``internvl_chat``) have an InternViT and, in the sizes
that are known here, an InternLM2: a Llama whose queries, keys and values lie in one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from librobot_vlm_ros.models.configuration import (
    FamilyConfig,
    bad_config,
    check_marks,
    llama_fields,
    published_variants,
    stated,
    strict_config,
    unreadable,
)

#: How many of the added tokens stand behind `<IMG_CONTEXT>` with itself.
_FROM_IMAGE_TOKEN = 7
#: Fields that have the same name in the official configuration of the tower.
_VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "norm_type",
    "attention_dropout",
)
#: The only epsilon that transformers' InternViT has for the norms of queries and keys.
_QK_NORM_EPS = 1e-6


@dataclass(frozen=True)
class InternVLConfig(FamilyConfig):
    """An InternVL2 architecture: a published variant, and what differs from it.

    `vision_config` and `text_config` take the fields of transformers' InternVLVisionConfig and
    LlamaConfig. Raises ModelError BAD_CONFIG for an unknown variant.
    """

    family: ClassVar = "InternVL2"
    variants: ClassVar = published_variants(__file__)

    variant: str = "internvl2-2b"
    #: `<IMG_CONTEXT>`.
    image_token_id: int = 92546
    #: Most tiles of an image, its thumbnail not counted; None means those of the checkpoint.
    max_tiles: int | None = None

    def to_transformers(self) -> Any:
        """transformers' InternVLConfig with a LlamaConfig. Raises ModelError BAD_CONFIG."""
        vision, text = self.parts()
        check_marks({"image_token_id": self.image_token_id}, text["vocab_size"])
        return _native(vision, text, self.image_token_id)


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in the layout of the official checkpoints."""
    return config.get("model_type") == "internvl_chat"


def original_to_native(config: Mapping[str, Any], image_token: int | None) -> Any:
    """transformers' InternVLConfig for an official config.json.

    `image_token`: id of ``<IMG_CONTEXT>``; None means its published place, seventh from the end.
    Raises ModelError BAD_CONFIG for what is missing, and for what InternVL2 does not have.
    """
    with unreadable("config.json of an official InternVL2 cannot be read"):
        vision, text = dict(config["vision_config"]), dict(config["llm_config"])
        _refuse_others(config, vision, text)
        if image_token is None:
            image_token = int(text["vocab_size"]) - _FROM_IMAGE_TOKEN
        extra: dict[str, Any] = {
            "downsample_ratio": float(config.get("downsample_ratio", 0.5)),
            "vision_feature_layer": int(config.get("select_layer", -1)),
        }
        if config.get("system_message"):
            extra["system_message"] = str(config["system_message"])
        native_vision = stated(
            vision,
            _VISION_FIELDS,
            projection_dropout="dropout",
            attention_bias="qkv_bias",
            use_qk_norm="qk_normalization",
        )
        native_text = {**llama_fields(text), **stated(text, (), attention_bias="bias")}
    return _native(native_vision, native_text, image_token, **extra)


def tile_side(config: Any) -> int:
    """Pixels of a tile's side, of transformers' InternVLConfig."""
    height, width = config.vision_config.image_size
    if height != width:
        raise bad_config(f"tiles of {height}x{width} pixels are not square")
    return int(height)


def tile_tokens(config: Any) -> int:
    """Vectors of a tile: a square of patches becomes one. Raises ModelError BAD_CONFIG."""
    ratio, grid = config.downsample_ratio, f"patches of {config.vision_config.patch_size} pixels"
    with unreadable(f"config.json of an InternVL: downsample_ratio is {ratio!r}, {grid}"):
        side, (patch, _) = tile_side(config), config.vision_config.patch_size
        merge = round(1 / ratio)
        if min(patch, merge) < 1 or side % (patch * merge) or merge * ratio != 1:
            raise bad_config(
                f"tiles of {side} pixels are no grid of {merge}x{merge} patches of {patch} pixels"
            )
    return int(side // (patch * merge)) ** 2


def _refuse_others(
    config: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> None:
    """Refuse what transformers' classes would compute otherwise, and other language models."""
    kind = (text.get("architectures") or [text.get("model_type")])[0]
    expected: tuple[tuple[str, Any, Any], ...] = (
        # Version 1 leaves the image transposed; the original's own default is version 1.
        ("ps_version", config.get("ps_version", "v1"), "v2"),
        ("llm_config.architectures", kind, "InternLM2ForCausalLM"),
        ("tie_word_embeddings", bool(config.get("tie_word_embeddings")), False),
        ("llm_config.tie_word_embeddings", bool(text.get("tie_word_embeddings")), False),
        (
            "force_image_size",
            config.get("force_image_size") or vision["image_size"],
            vision["image_size"],
        ),
        ("use_backbone_lora", config.get("use_backbone_lora") or 0, 0),
        ("use_llm_lora", config.get("use_llm_lora") or 0, 0),
    )
    if vision.get("qk_normalization"):
        eps = float(vision.get("layer_norm_eps", _QK_NORM_EPS))
        expected += (("vision_config.layer_norm_eps", eps, _QK_NORM_EPS),)
    for name, found, wanted in expected:
        if found != wanted:
            raise bad_config(
                f"config.json of an InternVL2: {name} is {found!r}, expected {wanted!r}",
                "InternVL2-2B and InternVL2-8B can be loaded",
            )


def _native(
    vision: Mapping[str, Any], text: Mapping[str, Any], image_token: int, **extra: Any
) -> Any:
    from transformers import InternVLConfig as NativeConfig
    from transformers import InternVLVisionConfig, LlamaConfig

    with strict_config("InternVL2 configuration"):
        config = NativeConfig(
            vision_config=InternVLVisionConfig(**vision),
            text_config=LlamaConfig(**{**text, "tie_word_embeddings": False}),
            image_token_id=image_token,
            # Its default is True, and would make the output layer the table of words.
            tie_word_embeddings=False,
            **extra,
        )
    config.image_seq_length = tile_tokens(config)
    return config
