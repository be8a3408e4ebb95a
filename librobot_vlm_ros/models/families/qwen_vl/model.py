"""Qwen2-VL (Wang et al., 2024, arXiv:2409.12191) and Qwen3-VL (Qwen Team, 2025,
arXiv:2511.21631) on transformers' own classes: images of any size, position_ids on three axes.

In Qwen3-VL features of three layers of the tower are added behind the first layers of the language
model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.cache.image_features import ImageFeatures
from librobot_vlm_ros.models.checkpoints.loading import load_module
from librobot_vlm_ros.models.checkpoints.shards import read_json
from librobot_vlm_ros.models.configuration import tokens
from librobot_vlm_ros.models.families.causal_lm import CausalLM
from librobot_vlm_ros.models.families.qwen_vl.checkpoint import plan_for
from librobot_vlm_ros.models.families.qwen_vl.configuration import QwenVLConfig
from librobot_vlm_ros.models.families.qwen_vl.processor import (
    BEGIN,
    END,
    GENERATIONS,
    QwenImages,
    QwenProcessor,
    patches,
    qwen_images,
)
from librobot_vlm_ros.models.inputs.tokenizer import CausalTokenizer
from librobot_vlm_ros.models.registry import model_info, register_vlm
from librobot_vlm_ros.models.vlm import Loading, Parts

#: Tokens of the notation, and what config.json calls those that it numbers.
_MARKS = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}


@register_vlm()
class QwenVLM(CausalLM):
    """Qwen2-VL or Qwen3-VL of any size. `QwenVLM(config)` has random weights; see `create_vlm`."""

    config_class = QwenVLConfig
    default_name = "qwen2-vl-2b"
    plan = staticmethod(plan_for)
    processor: QwenProcessor

    def __init__(
        self,
        config: Any = None,
        *,
        name: str = "",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **options: Any,
    ) -> None:
        """`min_pixels`, `max_pixels`: bounds of a resized image's area, else the checkpoint's."""
        if not name and isinstance(config, QwenVLConfig):
            name = config.variant
        config = self.checked_config(config, name or self.default_name)
        self._bounds = {
            "min_pixels": min_pixels if min_pixels is not None else config.min_pixels,
            "max_pixels": max_pixels if max_pixels is not None else config.max_pixels,
        }
        super().__init__(config, name=name, **options)

    # Loading.

    @classmethod
    def variant_of(cls, name: str) -> str:
        """See `AbstractVLM`; of the same generation."""
        family = model_info(name).family
        same = [own for own in QwenVLConfig.variants if model_info(own).family == family]
        return name if name in QwenVLConfig.variants or not same else same[0]

    @classmethod
    def checked_config(cls, config: Any, name: str) -> Any:
        """See `AbstractVLM`."""
        checked = super().checked_config(config, name)
        if model_info(checked.variant).family != model_info(name).family:
            raise ModelError(
                ErrorCode.BAD_CONFIG, f"{checked.variant!r} is no variant of {name!r}'s family"
            )
        return checked

    @classmethod
    def read_folder(cls, folder: Path, name: str, loading: Loading) -> Parts:
        """See `AbstractVLM`."""
        module = load_module(folder, **vars(loading))
        config, wanted = module.config, model_info(name).family.replace("-", "_")
        if config.model_type != wanted:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"{folder} holds a {config.model_type}, expected a {wanted}",
                f"name the model it is, not {name}",
            )
        text = config.text_config
        # The words that end an answer are no matter of taste, unlike the sampling beside them.
        settings = folder / "generation_config.json"
        ends = read_json(settings).get("eos_token_id") if settings.is_file() else None
        if ends is not None:
            tokens(f"{settings.name}: eos_token_id", ends, text.vocab_size)
            text.eos_token_id = ends
        hidden = tokens("config.json: eos_token_id", text.eos_token_id, text.vocab_size)
        others = [getattr(text, name, None) for name in ("bos_token_id", "pad_token_id")]
        hidden += [token for token in others if token is not None]
        tokenizer = CausalTokenizer(
            folder, hidden=hidden, vocab_size=text.vocab_size, control=_MARKS
        )
        marks = {token: getattr(config, name) for token, name in _MARKS.items()}
        missing = [token for token in (BEGIN, END) if token not in tokenizer.vocabulary]
        strange = [t for t, number in marks.items() if tokenizer.vocabulary.get(t) != number]
        if missing or strange:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"the tokenizer does not fit config.json: {', '.join([*missing, *strange])}",
                "use the tokenizer.json that came with the weights",
            )
        processor = cls.default_processor(name, config)
        processor.tokenizer = tokenizer
        stated = folder / "preprocessor_config.json"
        if stated.is_file():
            processor.images = qwen_images(read_json(stated), processor.images)
        return Parts(module, processor)

    @classmethod
    def default_processor(cls, name: str, config: Any) -> QwenProcessor:
        """See `CausalLM`."""
        vision = config.vision_config
        images = QwenImages(
            patch=int(vision.patch_size),
            merge=int(vision.spatial_merge_size),
            frames=int(vision.temporal_patch_size),
            **GENERATIONS[config.model_type].images,
        )
        return QwenProcessor(name, config, images)

    def _take(self, parts: Parts) -> None:
        super()._take(parts)
        given: dict[str, Any] = {n: value for n, value in self._bounds.items() if value is not None}
        self.processor.images = dataclasses.replace(self.processor.images, **given)

    # Images.

    @property
    def vision_encoder(self) -> nn.Module:
        """The tower with the layers that bring its patches into the language model's space."""
        visual: nn.Module = self.loaded().model.visual
        return visual

    def freeze_vision(self) -> None:
        """Keep the vision encoder as it is; the layers that merge its patches still learn."""
        for name, part in self.vision_encoder.named_children():
            if not name.endswith(("merger", "merger_list")):
                part.requires_grad_(False)

    def image_features(self, prepared: Sequence[Any]) -> list[ImageFeatures]:
        """See `AbstractVLM`; `shapes` are rows and columns of vectors."""
        device, images = self.torch_device, self.processor.images
        shapes = [self.processor.grid(image) for image in prepared]
        grids = [(1, rows * images.merge, columns * images.merge) for rows, columns in shapes]
        pixels = [patches(image, images, device, self.torch_dtype) for image in prepared]
        output = self.vision_encoder(
            torch.cat(pixels), grid_thw=torch.tensor(grids, device=device), return_dict=True
        )
        counts = [rows * columns for rows, columns in shapes]
        deep = [layer.split(counts) for layer in getattr(output, "deepstack_features", None) or ()]
        return [
            ImageFeatures(vectors, (counts[i],), (shapes[i],), tuple(layer[i] for layer in deep))
            for i, vectors in enumerate(output.pooler_output.split(counts))
        ]

    # Merging.

    def merge_order(self, row: Sequence[int], counts: Sequence[int]) -> list[int]:
        """See `CausalLM`; several views behind one mark get each its own pair of marks."""
        order = super().merge_order(row, counts)
        config = self.config
        at = list(row).index(config.image_token_id) if config.image_token_id in row else 0
        framed = list(row[max(at - 1, 0) : at + 2]) == [
            config.vision_start_token_id,
            config.image_token_id,
            config.vision_end_token_id,
        ]
        if len(counts) < 2 or not framed or list(row).count(config.image_token_id) != 1:
            return order
        views = [place for n in counts for place in (at - 1, *[-1] * n, at + 1)]
        return [*range(at - 1), *views, *range(at + 2, len(row))]

    def position_ids(self, order: Sequence[int], features: ImageFeatures | None) -> Tensor:
        """Time, row and column of each place; words count on all three axes alike."""
        positions: list[Tensor] = []
        shapes = iter(() if features is None else features.shapes)
        index = number = 0
        while index < len(order):
            if order[index] >= 0:
                positions.append(torch.full((1, 3), number))
                index, number = index + 1, number + 1
                continue
            rows, columns = next(shapes)
            row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            grid = torch.stack([torch.zeros_like(row), row, column], dim=-1)
            positions.append(grid.flatten(0, 1) + number)
            index, number = index + rows * columns, number + max(rows, columns)
        return torch.cat(positions) if positions else torch.zeros((0, 3), dtype=torch.int64)
