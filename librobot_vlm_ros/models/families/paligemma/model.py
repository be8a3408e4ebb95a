"""PaliGemma (Beyer et al., 2024, arXiv:2407.07726) on transformers' own PaliGemma class.

A SigLIP tower, one layer between, and Gemma, which reads image and prompt as a whole and writes its
answer in order. Boxes come as location tokens (`paligemma_prompts`), masks as codes for a decoder
that is not part of the checkpoint (`paligemma_masks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, InferenceRequest, ModelError, Region
from librobot_vlm_ros.models.cache.image_features import FrameEntry
from librobot_vlm_ros.models.checkpoints.loading import load_module
from librobot_vlm_ros.models.checkpoints.shards import read_json
from librobot_vlm_ros.models.families.causal_lm import CausalParts, CausalVLM
from librobot_vlm_ros.models.families.paligemma.checkpoint import plan_for
from librobot_vlm_ros.models.families.paligemma.configuration import PaliGemmaConfig
from librobot_vlm_ros.models.families.paligemma.masks import (
    MaskDecoder,
    Outline,
    draw,
    find_mask_decoder,
    missing_mask_decoder,
    read_mask_decoder,
    write_mask_decoder,
)
from librobot_vlm_ros.models.families.paligemma.processor import (
    BINS,
    parse_locations,
    parse_masks,
    question,
)
from librobot_vlm_ros.models.families.preprocess import ImageSettings, image_settings, squash
from librobot_vlm_ros.models.generation.config import TokenConstraint
from librobot_vlm_ros.models.generation.constraints.location_tokens import BoxConstraint
from librobot_vlm_ros.models.generation.streaming import TokenSpans
from librobot_vlm_ros.models.making import Loading
from librobot_vlm_ros.models.registry import register_vlm
from librobot_vlm_ros.models.tokenizer import CausalTokenizer

__all__ = ["PaliGemmaConfig", "PaliGemmaVLM"]

_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class PaliGemmaParts(CausalParts):
    """With the decoder of masks that lay beside the checkpoint, if any."""

    masks: MaskDecoder | None = None


@register_vlm("paligemma-3b")
class PaliGemmaVLM(CausalVLM):
    """PaliGemma of any size. `PaliGemmaVLM(config)` has random weights; see `create_vlm`."""

    family = "paligemma"
    default_new_tokens = 256
    first_position = 1
    prefix_attention = True
    image_leads = True
    config_class = PaliGemmaConfig
    default_name = "paligemma-3b"
    _plan = staticmethod(plan_for)
    _given_masks: MaskDecoder | None
    _masks: MaskDecoder | None

    def __init__(
        self,
        config: Any = None,
        *,
        name: str = "",
        mask_decoder: str | Path | None = None,
        **options: Any,
    ) -> None:
        """`mask_decoder`: the weights that segmenting needs (vae-oid.npz as published, or
        safetensors), where they do not lie in the folder of the weights.
        """
        config = self._checked_config(config, name or self.default_name)
        path = mask_decoder if mask_decoder is not None else config.mask_decoder
        given = None if path is None else read_mask_decoder(Path(path).expanduser())
        # No submodules: it is no part of what is trained, counted or moved.
        self.__dict__["_given_masks"] = self.__dict__["_masks"] = given
        super().__init__(config, name=name, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in transformers' native layout; the decoder of masks goes with it."""
        super().save_pretrained(folder)
        if self._masks is not None:
            write_mask_decoder(Path(folder), self._masks)

    @property
    def image_tokens(self) -> int:
        """Vectors of an image: one a patch."""
        vision = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def prepare(self, request: InferenceRequest) -> tuple[FrameEntry, tuple[int, ...]]:
        """See `AbstractVLM.prepare`. Raises ModelError WEIGHTS_NOT_FOUND for masks without their
        decoder.
        """
        if request.task == "segment" and self._masks is None:
            raise missing_mask_decoder(f"{self.name} has no decoder for its masks")
        return super().prepare(request)

    def grammar(self, request: InferenceRequest) -> TokenConstraint | None:
        """Whole boxes; y and x in turn, so the second corner's bounds are the first one's, too."""
        if self.tokenizer is None or request.spec.output == "text":
            return None
        return BoxConstraint(self.tokenizer.vocabulary["<loc0000>"], BINS)

    # Inside.

    def _images_json(self) -> dict[str, Any]:
        return {**super()._images_json(), "image_processor_type": "SiglipImageProcessor"}

    def _regions(
        self, request: InferenceRequest, spans: TokenSpans
    ) -> tuple[tuple[Region, ...], int]:
        size = request.frame.width, request.frame.height
        if request.task == "segment":
            return parse_masks(spans.text, *size, self._outlines, request.prompt, spans.score)
        return parse_locations(spans.text, *size, request.prompt, spans.score)

    def _take(self, parts: CausalParts) -> None:
        super()._take(parts)
        beside = getattr(parts, "masks", None)
        self.__dict__["_masks"] = self._given_masks if self._given_masks is not None else beside

    def _outlines(self, codes: Sequence[Sequence[int]]) -> list[list[Outline]]:
        assert self._masks is not None  # asked for in `prepare`
        return draw(self._masks, codes)

    @property
    def _reader(self) -> Any:
        return self._loaded().model

    def input_size(self, width: int, height: int) -> tuple[int, int] | None:
        """The same for all images."""
        return self.images.width, self.images.height

    def _pixels(self, pixels: npt.NDArray[np.uint8]) -> Any:
        return squash(pixels, self.images, self.resizing)

    def _see(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._loaded().model.get_image_features(pixels).pooler_output
        return features

    def _question(self, task: str, text: str, request: InferenceRequest | None) -> str:
        return question(task, text)

    def _prompt(self, words: str) -> list[int]:
        ids = self._words().words(words + "\n")
        return [self.config.image_token_id, self.config.text_config.bos_token_id, *ids]

    @classmethod
    def _read_folder(cls, folder: Path, name: str, loading: Loading) -> CausalParts:
        module = load_module(folder, **vars(loading))
        config, text = module.config, module.config.text_config
        hidden = [text.bos_token_id, text.eos_token_id, text.pad_token_id]
        tokenizer = CausalTokenizer.from_folder(
            folder, hidden=hidden, vocab_size=text.vocab_size, control=("<image>",)
        )
        names = {number: token for token, number in tokenizer.vocabulary.items()}
        first = tokenizer.vocabulary.get("<loc0000>", -1)
        locations = all(names.get(first + i) == f"<loc{i:04}>" for i in range(1024))
        if names.get(config.image_token_id, "<image>") != "<image>" or first < 0 or not locations:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"the tokenizer does not fit config.json: token {config.image_token_id} must be "
                "<image>, and <loc0000> to <loc1023> must stand in a row",
                "use the tokenizer.json that came with the weights",
            )
        stated = folder / "preprocessor_config.json"
        images = (
            image_settings(read_json(stated))
            if stated.is_file()
            else PaliGemmaVLM._default_images(config)
        )
        beside = find_mask_decoder(folder)
        masks = None if beside is None else read_mask_decoder(beside)
        return PaliGemmaParts(module, images, tokenizer, masks)

    @staticmethod
    def _default_images(config: Any) -> ImageSettings:
        side = int(config.vision_config.image_size)
        return ImageSettings(side, side, _HALF, _HALF)
