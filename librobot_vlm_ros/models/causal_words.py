"""The words of such a model's prompts: cleaned, put into the family's chat, and made ids."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

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
from librobot_vlm_ros.models.registry import models_with_task
from librobot_vlm_ros.models.token_rows import token_rows

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

    def _prompt_of(self, words: str, views: int) -> list[int]:
        """Ids of a whole prompt about so many images; one token may stand for all of them."""
        prompt, marks = self._prompt(words), set() if views else self._image_marks()
        return [token for token in prompt if token not in marks]

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

    def _kept(
        self, rows: Any, attention_mask: Tensor | None, also: tuple[int, ...] = ()
    ) -> list[list[int]]:
        size, image = int(self.config.text_config.vocab_size), int(self.config.image_token_id)
        return token_rows(rows, attention_mask, size, (image, *also))

    def _ids(
        self, text: Any, attention_mask: Tensor | None, views: Sequence[int] | None
    ) -> list[list[int]]:
        """Rows of ids: strings as questions in the family's chat, ids without padding.

        `views`: images of each row; None for words alone, whose chat has no place for an image.
        """
        if isinstance(text, str):
            text = [text]
        if text is None or len(text) == 0:
            raise RequestError(ErrorCode.EMPTY_PROMPT, "neither text nor input_ids were given")
        if isinstance(text[0], str):
            counts = [0] * len(text) if views is None else views
            if len(counts) != len(text):
                raise RequestError(
                    ErrorCode.BAD_PARAMETER, f"{len(counts)} images for {len(text)} prompts"
                )
            return [
                self._prompt_of(self._clean(row, True), count)
                for row, count in zip(text, counts, strict=True)
            ]
        return self._kept(text, attention_mask)

    def _task_ids(self, task: str, words: Any, views: Sequence[int]) -> list[list[int]]:
        name = get_task(task).name
        if name not in self.tasks:
            able = models_with_task(name)
            raise RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"{self.name} cannot {task!r}, it can: {', '.join(sorted(self.tasks))}",
                f"models that can: {', '.join(able) or 'none of the registered ones'}",
            )
        if name == "embed" or get_task(name).needs_region:
            raise RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"{self.name} cannot {task!r} here",
                "use encode_image for embeddings, and a request with a region for such tasks",
            )
        alike = words is None or isinstance(words, str)
        texts = [words or ""] * len(views) if alike else list(words)
        if not all(isinstance(row, str) for row in texts):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, "with a task the prompts are strings, not ids"
            )
        if len(texts) != len(views):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, f"{len(views)} images for {len(texts)} prompts"
            )
        asked = [self._question(name, self._clean(row, False), None) for row in texts]
        return [self._prompt_of(row, count) for row, count in zip(asked, views, strict=True)]
