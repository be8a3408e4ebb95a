"""The words of such a model's prompts: cleaned, put into the family's chat, and made ids."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.core import (
    ErrorCode,
    InferenceRequest,
    ModelError,
    RequestError,
    clean_prompt,
    get_task,
)
from librobot_vlm_ros.models.causal_images import CausalImages
from librobot_vlm_ros.models.causal_tokenizer import CausalTokenizer

__all__ = ["CausalWords"]


class CausalWords(CausalImages):
    """The half of `CausalTensors` that deals with words."""

    config: Any
    tokenizer: CausalTokenizer | None

    # What a family fills in.

    @abstractmethod
    def _question(self, task: str, text: str, request: InferenceRequest | None) -> str:
        """A task's words around the user's. `request` has the region and the frame's size."""

    @abstractmethod
    def _prompt(self, words: str) -> list[int]:
        """Ids of a whole prompt, one token standing for the image."""

    # What follows from it.

    def _words(self) -> CausalTokenizer:
        if self.tokenizer is None:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{self.name} was built from a config and has no tokenizer",
                "pass token ids, or load it from a folder with a tokenizer",
            )
        return self.tokenizer

    def _suppressed(self) -> list[int]:
        """Rows of the vocabulary that are no words: the image token, and padding behind it."""
        size = int(self.config.text_config.vocab_size)
        image = int(self.config.image_token_id)
        first = size if self.tokenizer is None else min(size, self.tokenizer.size)
        return sorted({image, *range(first, size)})

    def _image_marks(self) -> set[int]:
        """Tokens of a prompt that make no sense without an image."""
        return {int(self.config.image_token_id)}

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
            marks = set() if seeing else self._image_marks()
            return [[token for token in row if token not in marks] for row in rows]
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
