"""InternVL2 (Chen et al., 2024, arXiv:2404.16821) on transformers' own InternVL class.

An InternViT sees each tile of an image, four of its patches become one vector, and an InternLM2
reads them: a chat about one image or several, of any size. Boxes come in thousandths of the image
(`internvl_prompts`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, InferenceRequest, ModelError, Region
from librobot_vlm_ros.models.checkpoints.loading import load_module
from librobot_vlm_ros.models.checkpoints.shards import read_config, read_json
from librobot_vlm_ros.models.configuration import tokens
from librobot_vlm_ros.models.families.causal_lm import CausalParts, CausalVLM
from librobot_vlm_ros.models.families.internvl2.checkpoint import plan_for
from librobot_vlm_ros.models.families.internvl2.configuration import (
    InternVLConfig,
    tile_side,
    tile_tokens,
)
from librobot_vlm_ros.models.families.internvl2.processor import (
    NOTATION,
    SYSTEM,
    InternVLImages,
    float_tiles,
    internvl_images,
    parse_boxes,
    question,
    tiles,
)
from librobot_vlm_ros.models.families.preprocess import normalise
from librobot_vlm_ros.models.generation.constraints.box_syntax import ListBoxes
from librobot_vlm_ros.models.generation.streaming import TokenSpans
from librobot_vlm_ros.models.making import Loading
from librobot_vlm_ros.models.registry import register_vlm
from librobot_vlm_ros.models.tokenizer import CausalTokenizer, added_tokens

__all__ = ["InternVLConfig", "InternVLVLM"]

_BEGIN, _END, _IMAGE = "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>"
_IMAGE_BEGIN, _IMAGE_END = "<img>", "</img>"
_MARKS = (_BEGIN, _END, _IMAGE_BEGIN, _IMAGE, _IMAGE_END, *NOTATION)
_SPLIT = re.compile(f"({'|'.join(map(re.escape, NOTATION))})")
#: Templates that make the same prompt as internlm2-chat; the later models of the family differ.
_TEMPLATES = ("internlm2-chat", "Hermes-2")
#: Tiles that are looked at together, so that many large images do not need memory all at once.
_AT_ONCE = 32


@register_vlm("internvl2-2b", "internvl2-8b")
class InternVLVLM(CausalVLM):
    """InternVL2 of either size. `InternVLVLM(config)` has random weights; see `create_vlm`."""

    family = "internvl2"
    config_class = InternVLConfig
    default_name = "internvl2-2b"
    one_size = False
    box_syntax = ListBoxes()
    _plan = staticmethod(plan_for)

    def __init__(
        self, config: Any = None, *, name: str = "", max_tiles: int | None = None, **options: Any
    ) -> None:
        """`max_tiles`: most tiles of an image, the thumbnail not counted, else the checkpoint's."""
        config = self._checked_config(config, name or self.default_name)
        self._max_tiles = config.max_tiles if max_tiles is None else max_tiles
        super().__init__(config, name=name, **options)

    @property
    def image_tokens(self) -> int:
        """Vectors of one tile."""
        return tile_tokens(self.config)

    # Inside: images. A prepared one is its tiles, uint8 [N, side, side, 3] or normalised floats
    # [N, 3, side, side].

    def _regions(
        self, request: InferenceRequest, spans: TokenSpans
    ) -> tuple[tuple[Region, ...], int]:
        frame = request.frame
        return parse_boxes(spans.text, frame.width, frame.height, request.prompt, spans.score)

    def _take(self, parts: CausalParts) -> None:
        super()._take(parts)
        most = self._max_tiles
        if most is not None:
            self.images = dataclasses.replace(parts.images, max_tiles=most)

    def _pixels(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return tiles(pixels, self.images, self.resizing)

    def _prepared(self, image: Tensor) -> Tensor:
        return float_tiles(image, self.images)

    def _count(self, prepared: Any) -> int:
        return len(prepared) * self.image_tokens

    def _see(self, pixels: Tensor) -> Tensor:
        features = self._loaded().model.get_image_features(pixels).pooler_output
        # One tensor an image in newer versions of transformers, one for all in older ones.
        return features if isinstance(features, Tensor) else torch.stack(list(features))

    def _see_all(self, prepared: Sequence[Any]) -> list[Tensor]:
        device, dtype = self.torch_device, self.torch_dtype
        pixels = torch.cat(
            [
                image.to(device, dtype)
                if isinstance(image, Tensor)
                else normalise(image, self.images, device, dtype)
                for image in prepared
            ]
        )
        features = torch.cat([self._see(part) for part in pixels.split(_AT_ONCE)])
        return [part.flatten(0, 1) for part in features.split([len(i) for i in prepared])]

    # Inside: words.

    def _question(self, task: str, text: str, request: InferenceRequest | None) -> str:
        if request is None:
            return question(task, text, None, 1, 1)
        return question(task, text, request.region, request.frame.width, request.frame.height)

    def _prompt(self, words: str) -> list[int]:
        return self._prompt_of(words, 1)

    def _prompt_of(self, words: str, views: int) -> list[int]:
        """The template internlm2-chat; several images are numbered, as the model learnt them."""
        tokenizer, config = self._words(), self.config
        say, known = tokenizer.words, tokenizer.vocabulary
        begin, end = known[_BEGIN], known[_END]
        image = [known[_IMAGE_BEGIN], config.image_token_id, known[_IMAGE_END]]
        system = getattr(config, "system_message", None) or SYSTEM
        head = [config.text_config.bos_token_id, begin, *say(f"system\n{system}"), end]
        before, asked = "user\n", [begin]
        for view in range(views):
            asked += say(before + (f"Image-{view + 1}: " if views > 1 else "")) + image
            before = "\n"
        for piece in _SPLIT.split(before + words):
            asked += [known[piece]] if piece in NOTATION else say(piece)
        return [*head, *asked, end, begin, *say("assistant\n")]

    # Inside: loading.

    @classmethod
    def _read_folder(cls, folder: Path, name: str, loading: Loading) -> CausalParts:
        stated = read_config(folder)
        template = stated.get("template", _TEMPLATES[0])
        if template not in _TEMPLATES:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"config.json names the prompt template {template!r}, InternVL2 has "
                f"{_TEMPLATES[0]!r}",
                "InternVL2-2B and InternVL2-8B can be loaded",
            )
        module = load_module(folder, **vars(loading))
        if module.config.model_type != "internvl":
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"{folder} holds a {module.config.model_type}, expected an InternVL2",
                "name the model it is",
            )
        tokenizer = _read_tokenizer(folder, module.config)
        settings = folder / "preprocessor_config.json"
        images = internvl_images(
            stated,
            read_json(settings) if settings.is_file() else {},
            InternVLVLM._default_images(module.config),
        )
        return CausalParts(module, images, tokenizer)

    @staticmethod
    def _default_images(config: Any) -> InternVLImages:
        return InternVLImages(tile_side(config))


def _read_tokenizer(folder: Path, config: Any) -> CausalTokenizer:
    """The folder's tokenizer; what ends an answer is put into `config`."""
    text, added = config.text_config, added_tokens(folder)
    settings = folder / "generation_config.json"
    generation = read_json(settings) if settings.is_file() else {}
    stated = _listed(generation.get("eos_token_id"))
    if stated:
        tokens(f"{settings.name}: eos_token_id", stated, text.vocab_size)
    hidden = [text.bos_token_id, *_listed(text.eos_token_id), *_listed(text.pad_token_id)]
    tokenizer = CausalTokenizer.from_folder(
        folder, hidden=hidden, vocab_size=text.vocab_size, control=_MARKS, added=added
    )
    missing = [token for token in _MARKS if token not in tokenizer.vocabulary]
    found = tokenizer.vocabulary.get(_IMAGE)
    if missing or found != config.image_token_id:
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH,
            f"the tokenizer lacks {', '.join(missing)}"
            if missing
            else f"{_IMAGE} is {found} in the tokenizer, {config.image_token_id} by config.json",
            "use tokenizer.model with added_tokens.json, or the tokenizer.json, that came with the "
            "weights",
        )
    # config.json names the end of a document alone; an answer ends before that.
    ends = [tokenizer.vocabulary[_END], *stated]
    text.eos_token_id = list(dict.fromkeys([*ends, *_listed(text.eos_token_id)]))
    tokenizer.hide(text.eos_token_id)
    return tokenizer


def _listed(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
