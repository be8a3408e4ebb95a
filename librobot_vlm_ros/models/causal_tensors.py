"""Models that continue a row of image vectors and words, as tensors in and tensors out.

Encoding, forward with a loss, generate: what is the same for all such families.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import (
    ErrorCode,
    GenerationParams,
    ImageError,
    InferenceRequest,
    ModelError,
    RequestError,
    clean_prompt,
    get_task,
)
from librobot_vlm_ros.models.abstract import AbstractVLM
from librobot_vlm_ros.models.causal_decoder import CausalDecoder, embed_row, pad_rows, weave
from librobot_vlm_ros.models.causal_tokenizer import CausalTokenizer
from librobot_vlm_ros.models.decode import Decoder, Generated, decode
from librobot_vlm_ros.models.preprocess import ImageSettings, as_pixels, to_views

__all__ = ["CausalParts", "CausalTensors"]


@dataclass(frozen=True)
class CausalParts:
    """Everything that such a model is made of."""

    module: Any
    images: ImageSettings
    tokenizer: CausalTokenizer | None = None


class CausalTensors(AbstractVLM):
    """The learner's side of such a model; `CausalVLM` adds the robot's.

    The transformers model has `.model.language_model`, `.model.vision_tower` and `.lm_head`.
    """

    #: Tokens of an answer where a request does not say.
    default_new_tokens = 512
    #: Number of the first position.
    first_place = 0
    #: Whether every place of a prompt sees all of it, and only the answer is read in order.
    prefix_attention = False
    #: Whether the image stands in front of the begin token, too.
    image_leads = False

    def _take(self, parts: CausalParts) -> None:
        self.module = parts.module
        self.images = parts.images
        self.tokenizer = parts.tokenizer
        self.config = parts.module.config

    # What a family fills in.

    @abstractmethod
    def _pixels(self, pixels: Any) -> Any:
        """uint8 [H, W, 3] of any size to [images.height, images.width, 3]."""

    @abstractmethod
    def _see(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] to projected features [B, N, D]."""

    @abstractmethod
    def _question(self, task: str, text: str, request: InferenceRequest | None) -> str:
        """A task's words around the user's. `request` has the region and the frame's size."""

    @abstractmethod
    def _prompt(self, words: str) -> list[int]:
        """Ids of a whole prompt, one token standing for the image."""

    @property
    @abstractmethod
    def image_tokens(self) -> int:
        """Vectors N that an image becomes."""

    # The learner's side.

    def encode_image(self, images: Any) -> Tensor:
        """[B, N, D]; of several views the tokens stand one view after the other."""
        views = self._views(images)
        height, width = views.shape[-2:]
        if (height, width) != (self.images.height, self.images.width):
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"normalised images are {height}x{width}",
                f"{self.name} takes {self.images.height}x{self.images.width}; uint8 images of any "
                "size are resized",
            )
        features = self._see(views.flatten(0, 1))
        return features.unflatten(0, views.shape[:2]).flatten(1, 2)

    def encode_text(self, text: Any) -> Tensor:
        """The language model's last states of words alone, [B, T, D], padded at the end."""
        hidden, _ = self._read_rows(None, self._ids(text, None, seeing=False))
        return hidden

    def forward(
        self,
        images: Any = None,
        text: Sequence[str] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """The language model over image and words; T is the length with the image's vectors.

        `text`: questions; or `input_ids` int64 [B, L] with `attention_mask`. The image stands where
        the ids have its token, or in front. `labels` int64 [B, L]: the ids to learn, each predicted
        from those before it; -100 is not learnt, and the image never is. Tokens that are no words
        have no part in the loss.
        """
        source = text if text is not None else input_ids
        if text is not None and labels is not None:
            raise RequestError(ErrorCode.BAD_PARAMETER, "labels go with input_ids, not with text")
        if labels is not None and (input_ids is None or labels.shape != input_ids.shape):
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"labels are {list(labels.shape)}, expected the shape of input_ids",
            )
        rows = self._ids(source, attention_mask, seeing=images is not None)
        features = list(self.encode_image(images)) if images is not None else None
        learnt = None if labels is None else self._kept(labels, attention_mask)
        hidden, orders = self._read_rows(features, rows, learnt)
        logits = self._loaded().lm_head(hidden)
        result = {"embeddings": hidden, "logits": logits}
        if learnt is not None:
            targets = [
                torch.tensor([row[i] if i >= 0 else -100 for i in order])
                for row, order in zip(learnt, orders, strict=True)
            ]
            wanted = pad_sequence(targets, batch_first=True, padding_value=-100)[:, 1:]
            words = logits[:, :-1].float()
            unused = torch.tensor(self._suppressed(), device=words.device)
            words = words.index_fill(2, unused, torch.finfo(words.dtype).min)
            result["loss"] = functional.cross_entropy(
                words.flatten(0, 1), wanted.flatten().to(words.device), ignore_index=-100
            )
        return result

    def generate(  # type: ignore[override]
        self,
        images: Any = None,
        input_ids: Any = None,
        *,
        text: Any = None,
        task: str | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Answers as token ids int64 [B, L], padded at the end; `decode_text` makes words of them.

        `input_ids` (tensor [B, L] taken as it is, or strings) or `text`: strings are questions, put
        into the family's chat; with a `task` into its sentence.
        """
        rules = self.rules(GenerationParams(max_new_tokens, num_beams, temperature, top_p, seed))
        words = text if text is not None else input_ids
        with self._answering():
            features = list(self.encode_image(images)) if images is not None else None
            if task is not None:
                rows = self._task_ids(task, words, len(features) if features is not None else 1)
            else:
                rows = self._ids(words, attention_mask, seeing=features is not None)
            decoder, history = self._start(features, rows)
            seeds = [None if seed is None else seed + row for row in range(len(rows))]
            generated = decode(decoder, rules, history, seeds=seeds)
        ids = [torch.tensor(g.ids) for g in generated if isinstance(g, Generated)]
        padded = pad_sequence(ids, batch_first=True, padding_value=rules.pad)
        return padded.to(self.torch_device)

    def get_embedding_dim(self) -> int:
        """D of image features and text features alike."""
        return int(self.config.text_config.hidden_size)

    @property
    def vision_encoder(self) -> nn.Module:
        """The tower, without the projection."""
        tower: nn.Module = self._loaded().model.vision_tower
        return tower

    @property
    def language_model(self) -> nn.Module:
        """The layers that read and write; the output layer stands beside it."""
        model: nn.Module = self._loaded().model.language_model
        return model

    def freeze_language(self) -> None:
        """Keep the language model and its output layer as they are."""
        super().freeze_language()
        self._loaded().lm_head.requires_grad_(False)

    # Inside.

    def _words(self) -> CausalTokenizer:
        if self.tokenizer is None:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{self.name} was built from a config and has no tokenizer",
                "pass token ids, or load it from a folder with a tokenizer",
            )
        return self.tokenizer

    def _views(self, images: Any) -> Tensor:
        return to_views(self._fitted(images), self.images, self.torch_device, self.torch_dtype)

    def _fitted(self, images: Any) -> Any:
        """The same lists of images, all of those in uint8 brought to the model's size."""
        if isinstance(images, Tensor) and images.is_floating_point():
            return images
        many = isinstance(images, (Tensor, np.ndarray)) and images.ndim > 3
        if many or isinstance(images, (list, tuple)):
            return [self._fitted(image) for image in images]
        return self._pixels(as_pixels(images))

    def _suppressed(self) -> list[int]:
        """Rows of the vocabulary that are no words: the image token, and padding behind it."""
        size = int(self.config.text_config.vocab_size)
        image = int(self.config.image_token_id)
        first = size if self.tokenizer is None else min(size, self.tokenizer.size)
        return sorted({image, *range(first, size)})

    def _clean(self, text: str, required: bool) -> str:
        control = self._words().control_tokens
        return clean_prompt(text, required=required, limits=self.limits, control_tokens=control)

    def _kept(self, rows: Any, attention_mask: Tensor | None) -> list[list[int]]:
        lists: list[list[int]] = torch.as_tensor(rows).tolist()
        if attention_mask is None:
            return lists
        masks = attention_mask.tolist()
        return [
            [token for token, keep in zip(row, mask, strict=True) if keep]
            for row, mask in zip(lists, masks, strict=True)
        ]

    def _ids(
        self, text: Any, attention_mask: Tensor | None, *, seeing: bool = True
    ) -> list[list[int]]:
        """Rows of ids: strings as questions in the family's chat, ids without padding.

        Not `seeing`, a question has no place for an image.
        """
        if isinstance(text, str):
            text = [text]
        if text is None or len(text) == 0:
            raise RequestError(ErrorCode.EMPTY_PROMPT, "neither text nor input_ids were given")
        if isinstance(text[0], str):
            rows = [self._prompt(self._clean(row, True)) for row in text]
            image = None if seeing else self.config.image_token_id
            return [[token for token in row if token != image] for row in rows]
        return self._kept(text, attention_mask)

    def _task_ids(self, task: str, words: Any, count: int) -> list[list[int]]:
        name = get_task(task).name
        if name not in self.tasks or name == "embed" or get_task(name).needs_region:
            raise RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"{self.name} cannot {task!r} here, it can: {', '.join(sorted(self.tasks))}",
            )
        texts = [words or ""] * count if words is None or isinstance(words, str) else list(words)
        if not all(isinstance(row, str) for row in texts):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, "with a task the prompts are strings, not ids"
            )
        return [self._prompt(self._question(name, self._clean(r, False), None)) for r in texts]

    def _rows(
        self, features: Sequence[Tensor] | None, rows: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[list[int]]]:
        """Vectors [T, D] of each row, and where each comes from (see `weave`)."""
        if features is not None and len(features) != len(rows):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, f"{len(features)} images for {len(rows)} prompts"
            )
        table = self._loaded().get_input_embeddings()
        image = self.config.image_token_id
        begin = None if self.image_leads else self.config.text_config.bos_token_id
        seen: list[Tensor | None] = [None] * len(rows) if features is None else [*features]
        counts = [0 if found is None else len(found) for found in seen]
        orders = [weave(row, n, image, begin) for row, n in zip(rows, counts, strict=True)]
        vectors = [
            embed_row(table, row, order, found)
            for row, order, found in zip(rows, orders, seen, strict=True)
        ]
        return vectors, orders

    def _read_rows(
        self,
        features: Sequence[Tensor] | None,
        rows: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, list[list[int]]]:
        """Last states [B, T, D], padded at the end, and where each place comes from."""
        vectors, orders = self._rows(features, rows)
        inputs, mask = pad_rows(vectors, "right")
        types = {}
        if self.prefix_attention:
            # 0 is read as a whole, 1 in order: from the first label on, or a model would see it.
            kinds = torch.zeros_like(mask)
            for row, (given, order) in enumerate(zip(labels or [], orders, strict=bool(labels))):
                learnt = [place for place, i in enumerate(order) if i >= 0 and given[i] != -100]
                kinds[row, min(learnt, default=len(order)) :] = 1
            types["token_type_ids"] = kinds
        output = self._reader(inputs_embeds=inputs, attention_mask=mask, use_cache=False, **types)
        return output.last_hidden_state, orders

    def _start(
        self, features: Sequence[Tensor] | None, rows: Sequence[Sequence[int]]
    ) -> tuple[Decoder, Tensor]:
        vectors, _ = self._rows(features, rows)
        history = torch.zeros((len(rows), 0), dtype=torch.int64, device=self.torch_device)
        decoder = CausalDecoder(
            self._reader,
            self.module.lm_head,
            vectors,
            first_place=self.first_place,
            prefix=self.prefix_attention,
        )
        return decoder, history

    @property
    def _reader(self) -> Any:
        """What takes rows of vectors and gives their last states."""
        return self.language_model
