"""InternVL2 (Chen et al., 2024, arXiv:2404.16821) on transformers' own InternVL class.

An InternViT sees each tile of an image, four of its patches become one vector, and an InternLM2
reads them: a chat about one image or several, of any size. Boxes come in thousandths of the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.cache.image_features import ImageFeatures
from librobot_vlm_ros.models.checkpoints.loading import load_module
from librobot_vlm_ros.models.checkpoints.shards import read_config, read_json
from librobot_vlm_ros.models.configuration import tokens
from librobot_vlm_ros.models.families.causal_lm import CausalLM
from librobot_vlm_ros.models.families.internvl2.checkpoint import plan_for
from librobot_vlm_ros.models.families.internvl2.configuration import InternVLConfig, tile_side
from librobot_vlm_ros.models.families.internvl2.processor import (
    BEGIN,
    END,
    IMAGE,
    IMAGE_BEGIN,
    IMAGE_END,
    NOTATION,
    InternVLImages,
    InternVLProcessor,
    internvl_images,
)
from librobot_vlm_ros.models.inputs.preprocess import normalise
from librobot_vlm_ros.models.inputs.tokenizer import CausalTokenizer, added_tokens
from librobot_vlm_ros.models.registry import register_vlm
from librobot_vlm_ros.models.vlm import Loading, Parts

_MARKS = (BEGIN, END, IMAGE_BEGIN, IMAGE, IMAGE_END, *NOTATION)
#: Templates that make the same prompt as internlm2-chat; the later models of the family differ.
_TEMPLATES = ("internlm2-chat", "Hermes-2")
#: Tiles that are looked at together, so that many large images do not need memory all at once.
_AT_ONCE = 32


@register_vlm()
class InternVLVLM(CausalLM):
    """InternVL2 of either size. `InternVLVLM(config)` has random weights; see `create_vlm`."""

    config_class = InternVLConfig
    default_name = "internvl2-2b"
    plan = staticmethod(plan_for)
    processor: InternVLProcessor

    def __init__(
        self, config: Any = None, *, name: str = "", max_tiles: int | None = None, **options: Any
    ) -> None:
        """`max_tiles`: most tiles of an image, the thumbnail not counted, else the checkpoint's."""
        config = self.checked_config(config, name or self.default_name)
        self._max_tiles = config.max_tiles if max_tiles is None else max_tiles
        super().__init__(config, name=name, **options)

    @classmethod
    def read_folder(cls, folder: Path, name: str, loading: Loading) -> Parts:
        """See `AbstractVLM`."""
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
        processor = cls.default_processor(name, module.config)
        processor.tokenizer = _read_tokenizer(folder, module.config)
        path = folder / "preprocessor_config.json"
        settings = read_json(path) if path.is_file() else {}
        processor.images = internvl_images(stated, settings, processor.images)
        return Parts(module, processor)

    @classmethod
    def default_processor(cls, name: str, config: Any) -> InternVLProcessor:
        """See `CausalLM`."""
        return InternVLProcessor(name, config, InternVLImages(tile_side(config)))

    def _take(self, parts: Parts) -> None:
        super()._take(parts)
        if self._max_tiles is not None:
            images = self.processor.images
            self.processor.images = dataclasses.replace(images, max_tiles=self._max_tiles)

    def image_features(self, prepared: Sequence[Any]) -> list[ImageFeatures]:
        """See `AbstractVLM`."""
        device, dtype = self.torch_device, self.torch_dtype
        pixels = torch.cat(
            [
                image.to(device, dtype)
                if isinstance(image, Tensor)
                else normalise(image, self.processor.images, device, dtype)
                for image in prepared
            ]
        )
        features = torch.cat([self.see(part) for part in pixels.split(_AT_ONCE)])
        images = [part.flatten(0, 1) for part in features.split([len(i) for i in prepared])]
        return [ImageFeatures(vectors, (len(vectors),), (None,)) for vectors in images]


def _read_tokenizer(folder: Path, config: Any) -> CausalTokenizer:
    """The folder's tokenizer; what ends an answer is put into `config`."""
    text, added = config.text_config, added_tokens(folder)
    settings = folder / "generation_config.json"
    generation = read_json(settings) if settings.is_file() else {}
    stated = _listed(generation.get("eos_token_id"))
    if stated:
        tokens(f"{settings.name}: eos_token_id", stated, text.vocab_size)
    hidden = [text.bos_token_id, *_listed(text.eos_token_id), *_listed(text.pad_token_id)]
    tokenizer = CausalTokenizer(
        folder, hidden=hidden, vocab_size=text.vocab_size, control=_MARKS, added=added
    )
    missing = [token for token in _MARKS if token not in tokenizer.vocabulary]
    found = tokenizer.vocabulary.get(IMAGE)
    if missing or found != config.image_token_id:
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH,
            f"the tokenizer lacks {', '.join(missing)}"
            if missing
            else f"{IMAGE} is {found} in the tokenizer, {config.image_token_id} by config.json",
            "use tokenizer.model with added_tokens.json, or the tokenizer.json, that came with the "
            "weights",
        )
    # config.json names the end of a document alone; an answer ends before that.
    ends = [tokenizer.vocabulary[END], *stated]
    text.eos_token_id = list(dict.fromkeys([*ends, *_listed(text.eos_token_id)]))
    tokenizer.hide(text.eos_token_id)
    return tokenizer


def _listed(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
