"""PaliGemma configurations: ours and transformers' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from librobot_vlm_ros.models.configuration import FamilyConfig, published_variants, strict_config


@dataclass(frozen=True)
class PaliGemmaConfig(FamilyConfig):
    """A PaliGemma architecture: the published one, and what differs from it.

    `vision_config` and `text_config` take the fields of transformers' SiglipVisionConfig and
    GemmaConfig. Raises ModelError BAD_CONFIG for an unknown variant.
    """

    family: ClassVar = "PaliGemma"
    variants: ClassVar = published_variants(__file__)

    variant: str = "paligemma-3b"
    image_token_id: int = 257152
    #: File with the decoder of masks; None takes that of the weights' folder, if there is one.
    mask_decoder: str | None = None

    def to_transformers(self) -> Any:
        """transformers' PaliGemmaConfig."""
        from transformers import GemmaConfig, SiglipVisionConfig
        from transformers import PaliGemmaConfig as NativeConfig

        vision, text = self.parts()
        with strict_config("PaliGemma configuration"):
            return NativeConfig(
                vision_config=SiglipVisionConfig(**vision),
                text_config=GemmaConfig(**text),
                image_token_index=self.image_token_id,
                projection_dim=text["hidden_size"],
                hidden_size=text["hidden_size"],
                vocab_size=text["vocab_size"],
            )
