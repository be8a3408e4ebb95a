"""Qwen2-VL (Wang et al., 2024, arXiv:2409.12191) and Qwen3-VL (Qwen Team, 2025,
arXiv:2511.21631) on transformers' own classes: images of any size, position_ids on three axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from librobot_vlm_ros.core import (
    ErrorCode,
    ImageError,
    InferenceRequest,
    ModelError,
    Region,
)
from librobot_vlm_ros.models.cache.image_features import ImageFeatures
from librobot_vlm_ros.models.checkpoints.loading import load_module
from librobot_vlm_ros.models.checkpoints.shards import read_json
from librobot_vlm_ros.models.configuration import tokens
from librobot_vlm_ros.models.families.causal_lm import CausalParts, CausalVLM
from librobot_vlm_ros.models.families.llava.model import CLIP_MEAN, CLIP_STD
from librobot_vlm_ros.models.families.prompts import question
from librobot_vlm_ros.models.families.qwen_vl.checkpoint import plan_for
from librobot_vlm_ros.models.families.qwen_vl.configuration import QwenVLConfig
from librobot_vlm_ros.models.families.qwen_vl.processor import (
    QWEN2_TASKS,
    QWEN3_TASKS,
    QwenImages,
    is_float,
    parse_json_boxes,
    parse_token_boxes,
    patches,
    qwen_images,
    resized,
)
from librobot_vlm_ros.models.generation.constraints.box_syntax import JsonBoxes, TokenBoxes
from librobot_vlm_ros.models.generation.streaming import TokenSpans
from librobot_vlm_ros.models.making import Loading
from librobot_vlm_ros.models.registry import register_vlm
from librobot_vlm_ros.models.tokenizer import CausalTokenizer

__all__ = ["Qwen2VLM", "Qwen3VLM", "QwenVLConfig", "QwenVLM"]

#: Tokens of the notation, and what config.json calls those that it numbers.
_MARKS = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
_BEGIN, _END = "<|im_start|>", "<|im_end|>"


class QwenVLM(CausalVLM):
    """Qwen-VL of either generation."""

    config_class = QwenVLConfig
    one_size = False
    default_new_tokens = 512
    _plan = staticmethod(plan_for)

    #: transformers' name of the generation.
    model_type: ClassVar[str]
    #: What the system says first; "" leaves it out.
    system: ClassVar[str]
    #: A question for each task.
    questions: ClassVar[Mapping[str, str]]
    #: Reads the generation's notation of boxes.
    parse: ClassVar[Callable[..., Any]]

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
        config = self._checked_config(config, name or self.default_name)
        self._bounds = {
            "min_pixels": min_pixels if min_pixels is not None else config.min_pixels,
            "max_pixels": max_pixels if max_pixels is not None else config.max_pixels,
        }
        super().__init__(config, name=name, **options)

    @property
    def vision_encoder(self) -> nn.Module:
        """The tower with the layers that bring its patches into the language model's space."""
        visual: nn.Module = self._loaded().model.visual
        return visual

    def freeze_vision(self) -> None:
        """Keep the vision encoder as it is; the layers that merge its patches still learn."""
        for name, part in self.vision_encoder.named_children():
            if not name.endswith(("merger", "merger_list")):
                part.requires_grad_(False)

    # Inside: images.

    def _regions(
        self, request: InferenceRequest, spans: TokenSpans
    ) -> tuple[tuple[Region, ...], int]:
        size = request.frame.width, request.frame.height
        found: tuple[tuple[Region, ...], int] = type(self).parse(
            spans.text, *size, request.prompt, spans.score
        )
        return found

    def _take(self, parts: CausalParts) -> None:
        super()._take(parts)
        given = {name: value for name, value in self._bounds.items() if value is not None}
        self.images = dataclasses.replace(parts.images, **given)

    def _pixels(self, pixels: Any) -> Any:
        return resized(pixels, self.images, self.resizing)

    def _prepared(self, image: Tensor) -> Any:
        factor = self.images.factor
        height, width = image.shape[1:]
        if height % factor or width % factor or not height or not width:
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"a normalised image is {height}x{width}",
                f"{self.name} takes multiples of {factor}; uint8 images of any size are resized",
            )
        return image

    def _shape(self, prepared: Any) -> tuple[int, int]:
        """Rows and columns of vectors."""
        height, width = prepared.shape[1:] if is_float(prepared) else prepared.shape[:2]
        return int(height) // self.images.factor, int(width) // self.images.factor

    def _count(self, prepared: Any) -> int:
        rows, columns = self._shape(prepared)
        return rows * columns

    def _look(self, prepared: Sequence[Any]) -> list[ImageFeatures]:
        device, merge = self.torch_device, self.images.merge
        shapes = [self._shape(image) for image in prepared]
        grids = [(1, rows * merge, columns * merge) for rows, columns in shapes]
        pixels = [patches(image, self.images, device, self.torch_dtype) for image in prepared]
        output = self.vision_encoder(
            torch.cat(pixels), grid_thw=torch.tensor(grids, device=device), return_dict=True
        )
        counts = [rows * columns for rows, columns in shapes]
        deep = [layer.split(counts) for layer in getattr(output, "deepstack_features", None) or ()]
        return [
            ImageFeatures(vectors, (counts[i],), (shapes[i],), tuple(layer[i] for layer in deep))
            for i, vectors in enumerate(output.pooler_output.split(counts))
        ]

    # Inside: places and words.

    def _places(self, order: Sequence[int], seen: ImageFeatures | None) -> Tensor:
        """Time, row and column of each place; words count on all three axes alike."""
        places: list[Tensor] = []
        shapes = iter(() if seen is None else seen.shapes)
        index = number = 0
        while index < len(order):
            if order[index] >= 0:
                places.append(torch.full((1, 3), number))
                index, number = index + 1, number + 1
                continue
            rows, columns = next(shapes)
            row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            grid = torch.stack([torch.zeros_like(row), row, column], dim=-1)
            places.append(grid.flatten(0, 1) + number)
            index, number = index + rows * columns, number + max(rows, columns)
        return torch.cat(places) if places else torch.zeros((0, 3), dtype=torch.int64)

    def _order(self, row: Sequence[int], counts: Sequence[int]) -> list[int]:
        """As `merge_order` gives it; several views behind one mark get a pair of marks each."""
        order = super()._order(row, counts)
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

    def _image_marks(self) -> set[int]:
        config = self.config
        return {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id}

    def _suppressed(self) -> list[int]:
        return sorted({*super()._suppressed(), int(self.config.video_token_id)})

    def _question(self, task: str, text: str, request: InferenceRequest | None) -> str:
        return question(self.questions, task, text)

    def _prompt(self, words: str) -> list[int]:
        tokenizer, config = self._words(), self.config
        begin, end = (tokenizer.vocabulary[token] for token in (_BEGIN, _END))
        say = tokenizer.words
        line = say("\n")
        head = [begin, *say(f"system\n{self.system}"), end, *line] if self.system else []
        image = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
        asked = [begin, *say("user\n"), *image, *say(words), end, *line]
        return [*head, *asked, begin, *say("assistant\n")]

    # Inside: loading.

    @classmethod
    def _checked_config(cls, config: Any, name: str) -> Any:
        checked = super()._checked_config(config, name)
        if not checked.variant.startswith(cls.default_name[:8]):
            raise ModelError(
                ErrorCode.BAD_CONFIG, f"{checked.variant!r} is no variant of {name!r}'s family"
            )
        return checked

    @classmethod
    def _read_folder(cls, folder: Path, name: str, loading: Loading) -> CausalParts:
        module = load_module(folder, **vars(loading))
        config = module.config
        if config.model_type != cls.model_type:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"{folder} holds a {config.model_type}, expected a {cls.model_type}",
                f"name the model it is, not {cls.default_name}",
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
        tokenizer = CausalTokenizer.from_folder(
            folder, hidden=hidden, vocab_size=text.vocab_size, control=_MARKS
        )
        wanted = {token: getattr(config, name) for token, name in _MARKS.items()}
        missing = [token for token in (_BEGIN, _END) if token not in tokenizer.vocabulary]
        strange = [t for t, number in wanted.items() if tokenizer.vocabulary.get(t) != number]
        if missing or strange:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"the tokenizer does not fit config.json: {', '.join([*missing, *strange])}",
                "use the tokenizer.json that came with the weights",
            )
        stated = folder / "preprocessor_config.json"
        images = cls._default_images(config)
        if stated.is_file():
            images = qwen_images(read_json(stated), images)
        return CausalParts(module, images, tokenizer)

    @staticmethod
    def _grid(config: Any, **rest: Any) -> QwenImages:
        vision = config.vision_config
        return QwenImages(
            patch=int(vision.patch_size),
            merge=int(vision.spatial_merge_size),
            frames=int(vision.temporal_patch_size),
            **rest,
        )


@register_vlm("qwen2-vl-2b", "qwen2-vl-7b")
class Qwen2VLM(QwenVLM):
    """Qwen2-VL of any size. `Qwen2VLM(config)` has random weights; see `create_vlm`."""

    family = "qwen2-vl"
    default_name = "qwen2-vl-2b"
    model_type = "qwen2_vl"
    system = "You are a helpful assistant."
    questions = QWEN2_TASKS
    box_syntax = TokenBoxes()
    parse = staticmethod(parse_token_boxes)

    @staticmethod
    def _default_images(config: Any) -> QwenImages:
        bounds = {"min_pixels": 3136, "max_pixels": 12845056}
        return QwenVLM._grid(config, **bounds, mean=CLIP_MEAN, std=CLIP_STD)


_HALF = (0.5, 0.5, 0.5)


@register_vlm("qwen3-vl-4b", "qwen3-vl-8b")
class Qwen3VLM(QwenVLM):
    """Qwen3-VL of any size. `Qwen3VLM(config)` has random weights; see `create_vlm`."""

    family = "qwen3-vl"
    default_name = "qwen3-vl-4b"
    model_type = "qwen3_vl"
    system = ""
    questions = QWEN3_TASKS
    box_syntax = JsonBoxes()
    parse = staticmethod(parse_json_boxes)

    @staticmethod
    def _default_images(config: Any) -> QwenImages:
        bounds = {"min_pixels": 65536, "max_pixels": 16777216}
        return QwenVLM._grid(config, **bounds, mean=_HALF, std=_HALF)
