"""PaliGemma configurations: ours and transformers' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from librobot_vlm_ros.models.configuration import FamilyConfig, sizes, strict_config

_VISION: dict[str, Any] = {
    **sizes(hidden=1152, inner=4304, layers=27, heads=16),
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}
_TEXT: dict[str, Any] = {
    **sizes(hidden=2048, inner=16384, layers=18, heads=8, kv_heads=1),
    "vocab_size": 257216,
    "head_dim": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class PaliGemmaConfig(FamilyConfig):
    """A PaliGemma architecture: the published one, and what differs from it.

    `vision_config` and `text_config` take the fields of transformers' SiglipVisionConfig and
    GemmaConfig. Raises ModelError BAD_CONFIG for an unknown variant.
    """

    family: ClassVar = "PaliGemma"
    variants: ClassVar = {"paligemma-3b": (_VISION, _TEXT)}

    variant: str = "paligemma-3b"
    image_token_id: int = 257152
    #: File with the decoder of masks; None takes that of the weights' folder, if there is one.
    mask_decoder: str | None = None

    def to_transformers(self) -> Any:
        """transformers' PaliGemmaConfig."""
        from transformers import GemmaConfig, SiglipVisionConfig
        from transformers import PaliGemmaConfig as NativeConfig

        vision, text = self.variants[self.variant]
        text = {**text, **self.text_config}
        with strict_config("PaliGemma configuration"):
            return NativeConfig(
                vision_config=SiglipVisionConfig(**{**vision, **self.vision_config}),
                text_config=GemmaConfig(**text),
                image_token_index=self.image_token_id,
                projection_dim=text["hidden_size"],
                hidden_size=text["hidden_size"],
                vocab_size=text["vocab_size"],
            )
