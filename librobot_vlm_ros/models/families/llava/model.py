"""LLaVA-1.5 (Liu et al., 2023, arXiv:2310.03744) on transformers' own LLaVA class.

A CLIP tower, two layers between, and Vicuna: a chat about one image. Boxes come as lists of numbers
from 0 to 1 of the padded square (`llava_prompts`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from librobot_vlm_ros.core import (
    ErrorCode,
    InferenceRequest,
    ModelError,
    Region,
)
from librobot_vlm_ros.models.checkpoints.loading import load_module
from librobot_vlm_ros.models.families.causal_lm import CausalParts, CausalVLM
from librobot_vlm_ros.models.families.llava.checkpoint import plan_for
from librobot_vlm_ros.models.families.llava.configuration import LlavaConfig
from librobot_vlm_ros.models.families.llava.processor import (
    BEFORE_IMAGE,
    behind_image,
    pad_to_square,
    parse_boxes,
    question,
)
from librobot_vlm_ros.models.families.preprocess import ImageSettings, squash
from librobot_vlm_ros.models.generation.streaming import TokenSpans
from librobot_vlm_ros.models.making import Loading
from librobot_vlm_ros.models.registry import register_vlm
from librobot_vlm_ros.models.tokenizer import CausalTokenizer

__all__ = ["CLIP_MEAN", "CLIP_STD", "LlavaConfig", "LlavaVLM"]

#: What CLIP was trained with; the official folders state nothing.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@register_vlm("llava-v1.5-7b", "llava-v1.5-13b")
class LlavaVLM(CausalVLM):
    """LLaVA-1.5 of any size. `LlavaVLM(config)` has random weights; see `create_vlm`."""

    family = "llava-1.5"
    config_class = LlavaConfig
    default_name = "llava-v1.5-7b"
    _plan = staticmethod(plan_for)

    @property
    def image_tokens(self) -> int:
        """Vectors of an image: one a patch, and the class token where the model keeps it."""
        vision = self.config.vision_config
        extra = self.config.vision_feature_select_strategy == "full"
        return int((vision.image_size // vision.patch_size) ** 2 + extra)

    # Inside.

    def _images_json(self) -> dict[str, Any]:
        size = {"height": self.images.height, "width": self.images.width}
        return {
            **super()._images_json(),
            "image_processor_type": "LlavaImageProcessor",
            "do_pad": True,
            "size": size,
            "crop_size": size,
        }

    def _regions(
        self, request: InferenceRequest, spans: TokenSpans
    ) -> tuple[tuple[Region, ...], int]:
        frame = request.frame
        return parse_boxes(spans.text, frame.width, frame.height, request.prompt, spans.score)

    def input_size(self, width: int, height: int) -> tuple[int, int] | None:
        """The image's part of the padded square."""
        side = max(width, height)
        return math.ceil(width * self.images.width / side), math.ceil(
            height * self.images.height / side
        )

    def _pixels(self, pixels: npt.NDArray[np.uint8]) -> Any:
        return squash(pad_to_square(pixels, self.images.mean), self.images, self.resizing)

    def _see(self, pixels: Tensor) -> Tensor:
        features = self._loaded().model.get_image_features(pixels).pooler_output
        # One tensor an image in newer versions of transformers, one for all in older ones.
        return features if isinstance(features, Tensor) else torch.stack(list(features))

    def _question(self, task: str, text: str, request: InferenceRequest | None) -> str:
        if request is None:
            return question(task, text, None, 1, 1)
        return question(task, text, request.region, request.frame.width, request.frame.height)

    def _suppressed(self) -> list[int]:
        """Everything behind the words: image, pad, and the padding of the tables."""
        return list(range(self.config.image_token_id, self.config.text_config.vocab_size))

    def _prompt(self, words: str) -> list[int]:
        tokenizer, text = self._words(), self.config.text_config
        before, behind = tokenizer.words(BEFORE_IMAGE), tokenizer.words(behind_image(words))
        return [text.bos_token_id, *before, self.config.image_token_id, *behind]

    @classmethod
    def _read_folder(cls, folder: Path, name: str, loading: Loading) -> CausalParts:
        module = load_module(folder, **vars(loading))
        text = module.config.text_config
        hidden = [text.bos_token_id, text.eos_token_id]
        if text.pad_token_id is not None and text.pad_token_id < module.config.image_token_id:
            hidden.append(text.pad_token_id)
        tokenizer = CausalTokenizer.from_folder(
            folder, hidden=hidden, vocab_size=text.vocab_size, control=("<image>",)
        )
        found = tokenizer.vocabulary.get("<image>", module.config.image_token_id)
        names = {number: token for token, number in tokenizer.vocabulary.items()}
        if found != module.config.image_token_id or names.get(found, "<image>") != "<image>":
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"config.json marks the image with token {module.config.image_token_id}, "
                f"the tokenizer has {found} for it",
                "use the tokenizer that came with the weights",
            )
        return CausalParts(module, LlavaVLM._default_images(module.config), tokenizer)

    @staticmethod
    def _default_images(config: Any) -> ImageSettings:
        side = int(config.vision_config.image_size)
        return ImageSettings(side, side, CLIP_MEAN, CLIP_STD)
