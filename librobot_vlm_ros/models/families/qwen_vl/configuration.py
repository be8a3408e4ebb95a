"""Qwen2-VL and Qwen3-VL configurations: ours and transformers' own, which the official ones are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from librobot_vlm_ros.models.configuration import FamilyConfig, check_marks, from_dict, sizes

_QWEN2_TEXT: dict[str, Any] = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
_QWEN2_VISION: dict[str, Any] = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
_QWEN3_TEXT: dict[str, Any] = {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vocab_size": 151936,
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


def _qwen3_vision(depth: int, width: int, inner: int, deep: list[int]) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_heads": 16,
        "deepstack_visual_indexes": deep,
    }


#: Text model, vision model, and whether the output layer is the word table.
_VARIANTS: Mapping[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "qwen2-vl-2b": (
        {**_QWEN2_TEXT, "vocab_size": 151936, **sizes(1536, 8960, 28, heads=12, kv_heads=2)},
        _QWEN2_VISION,
        True,
    ),
    "qwen2-vl-7b": (
        {**_QWEN2_TEXT, "vocab_size": 152064, **sizes(3584, 18944, 28, heads=28, kv_heads=4)},
        _QWEN2_VISION,
        False,
    ),
    "qwen3-vl-4b": (
        {**_QWEN3_TEXT, **sizes(2560, 9728, 36, heads=32, kv_heads=8)},
        _qwen3_vision(24, 1024, 4096, deep=[5, 11, 17]),
        True,
    ),
    "qwen3-vl-8b": (
        {**_QWEN3_TEXT, **sizes(4096, 12288, 36, heads=32, kv_heads=8)},
        _qwen3_vision(27, 1152, 4304, deep=[8, 16, 24]),
        False,
    ),
}


@dataclass(frozen=True)
class QwenVLConfig(FamilyConfig):
    """A Qwen2-VL or Qwen3-VL architecture: a published one, and what differs from it.

    `vision_config` and `text_config` take the fields of transformers' Qwen2VLVisionConfig and
    Qwen2VLTextConfig, or Qwen3VLVisionConfig and Qwen3VLTextConfig. Raises ModelError BAD_CONFIG
    for an unknown variant.
    """

    family: ClassVar = "Qwen-VL"
    variants: ClassVar = _VARIANTS

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
        check_marks(marks, text["vocab_size"])
        return native_config(
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


def native_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration of a config.json. Raises ModelError BAD_CONFIG."""
    kind = {"qwen2_vl": "Qwen2VLConfig", "qwen3_vl": "Qwen3VLConfig"}[config["model_type"]]
    return from_dict(kind, config, "a Qwen-VL")
