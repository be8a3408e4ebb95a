"""What of a model is no arithmetic: its prompts, its pixels, its notation of answers.

A family's processor is the only place that knows them. It has the tokenizer and the settings of
images, and no weights.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from librobot_vlm_ros.core import (
    DEFAULT_LIMITS,
    ErrorCode,
    GenerationParams,
    InferenceRequest,
    Limits,
    ModelAnswer,
    ModelError,
    Region,
    RequestError,
    clean_prompt,
    get_task,
)
from librobot_vlm_ros.models.generation.config import (
    CoordinateBins,
    Generated,
    GenerationConfig,
    NumberTokens,
    TokenConstraint,
)
from librobot_vlm_ros.models.generation.scores import AnswerText, geometric_mean
from librobot_vlm_ros.models.registry import model_info, models_with_task

#: Box in pixels of the source image, and width and height of that.
Box = Sequence[float]
Size = tuple[int, int]

_NUMBER_PIECE = re.compile(r"\s*[(\[,:]*[0-9.]+[)\],:\s]*")


class Processor(ABC):
    """A family's processor, on the methods that the family fills in.

    `config` is that of the transformers model, `images` says how an image becomes pixels.
    """

    #: Tokens of an answer where a request does not say.
    default_new_tokens: ClassVar[int] = 512

    def __init__(
        self,
        name: str,
        config: Any,
        images: Any,
        tokenizer: Any = None,
        *,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.name, self.config, self.limits = name, config, limits
        self.images, self.tokenizer = images, tokenizer
        self.tasks = frozenset(model_info(name).tasks)

    # What a family fills in: pixels.

    @abstractmethod
    def pixels(self, image: Any, how: Any) -> Any:
        """uint8 [H, W, 3] of any size, prepared for the model; called from any thread.

        `how`: the `Resizing` to use.
        """

    def input_size(self, width: int, height: int) -> Size | None:
        """Width and height that an image of this size is brought to; None where the number of
        vectors depends on the image.
        """
        return None

    @abstractmethod
    def count(self, prepared: Any) -> int:
        """Vectors N that a prepared image becomes in the language model."""

    # Prompts.

    @abstractmethod
    def chat(self, words: str, views: int = 1) -> list[int]:
        """Token ids of a question in the family's chat, about so many images."""

    @abstractmethod
    def prompt(
        self, task: str, text: str, region: Box | None, size: Size | None, views: int = 1
    ) -> list[int]:
        """Token ids of a task's prompt around the user's cleaned `text`.

        `region` in pixels of an image of `size`. Raises RequestError EMPTY_PROMPT, BAD_REGION, or
        BAD_PARAMETER for text that nobody would read.
        """

    # Answers.

    def coordinates(self) -> CoordinateBins | NumberTokens | None:
        """The tokens that coordinates are written with; None without a tokenizer.

        Location tokens where a family has them; here: numbers as text.
        """
        if self.tokenizer is None:
            return None
        return NumberTokens(tuple(number_texts(self.tokenizer)))

    def constraint(self, task: str) -> TokenConstraint | None:
        """Which tokens may follow which in an answer to this task; None where anything may."""
        return None

    @abstractmethod
    def regions(
        self, request: InferenceRequest, answer: AnswerText
    ) -> tuple[tuple[Region, ...], int]:
        """The answer's regions in pixels of the source image, and how many could not be read."""

    @abstractmethod
    def generation_config(self, params: GenerationParams) -> GenerationConfig:
        """How to decode: the published settings where `params` leaves them open."""

    @abstractmethod
    def refuse_too_long(self, image: int, prompt: int, answer: int) -> None:
        """Raises RequestError PROMPT_TOO_LONG where the model has no room for `image` vectors,
        `prompt` tokens and `answer` new ones.
        """

    def suppressed(self) -> list[int]:
        """Rows of the vocabulary that are no words: the image token, and padding behind it."""
        size = int(self.config.text_config.vocab_size)
        first = size if self.tokenizer is None else min(size, self.tokenizer.size)
        return sorted({int(self.config.image_token_id), *range(first, size)})

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write tokenizer and settings beside the weights, in transformers' native layout."""

    # What follows from it.

    def words(self) -> Any:
        """The tokenizer. Raises ModelError TOKENIZER_MISMATCH where there is none."""
        if self.tokenizer is None:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{self.name} was built from a config and has no tokenizer",
                "pass token ids, or load it from a folder with a tokenizer",
            )
        return self.tokenizer

    def clean(self, text: str, required: bool) -> str:
        """Text from people, fit for the tokenizer; see `clean_prompt`."""
        control = self.words().control_tokens
        return clean_prompt(text, required=required, limits=self.limits, control_tokens=control)

    def request_ids(self, request: InferenceRequest) -> list[int]:
        """Token ids of a request's prompt; [] for an embedding."""
        if request.spec.output == "embedding":
            return []
        text = self.clean(request.prompt, request.spec.needs_text)
        size = request.frame.width, request.frame.height
        return self.prompt(request.task, text, request.region, size)

    def writes_regions(self, task: str) -> bool:
        """Whether an answer to the task is read into regions; without a tokenizer none is."""
        return self.tokenizer is not None and get_task(task).output == "regions"

    def task_ids(self, task: str, words: Any, views: Sequence[int]) -> list[list[int]]:
        """Rows of ids: the prompt of a task for each string of `words`, about `views` images each.

        Raises RequestError TASK_NOT_SUPPORTED or BAD_PARAMETER.
        """
        name = get_task(task).name
        self.refuse_unable(name)
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
        return [
            self.prompt(name, self.clean(row, False), None, None, count)
            for row, count in zip(texts, views, strict=True)
        ]

    def refuse_unable(self, task: str) -> None:
        """Raises RequestError TASK_NOT_SUPPORTED for a task that the model cannot do."""
        if task not in self.tasks:
            able = models_with_task(task)
            raise RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"{self.name} cannot {task!r}, it can: {', '.join(sorted(self.tasks))}",
                f"models that can: {', '.join(able) or 'none of the registered ones'}",
            )

    def asked(self, params: GenerationParams, *, beams: int, tokens: int) -> tuple[int, int]:
        """Beams and most tokens of an answer: what `params` asks for, else these as far as there is
        room. Raises RequestError BAD_PARAMETER; sampling means one beam.
        """
        beams = params.num_beams or beams
        if params.temperature > 0 and beams > 1:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"temperature {params.temperature} and num_beams {beams} exclude each other",
                "sample with num_beams 1, or search with temperature 0",
            )
        room = min(self.config.text_config.max_position_embeddings, self.limits.max_new_tokens)
        wanted = params.max_new_tokens or min(tokens, room)
        if wanted > room:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"max_new_tokens is {wanted}, {self.name} has room for {room}",
            )
        return beams, wanted

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text: control tokens of the notation kept; begin, end and pad left out."""
        text: str = self.words().decode(ids)
        return text

    def read(self, request: InferenceRequest, generated: Generated) -> ModelAnswer:
        """Tokens to text, and for tasks with regions to those; `scores` says what scores mean."""
        score = geometric_mean(generated.log_probs)
        if request.spec.output == "text":
            return ModelAnswer(text=self.plain_text(self.decode(generated.ids)), score=score)
        words = self.words()
        bins = isinstance(self.coordinates(), CoordinateBins)
        texts = () if bins else tuple(number_texts(words).values())
        answer = AnswerText(generated, words.decode, words.control_ids, texts)
        regions, malformed = self.regions(request, answer)
        return ModelAnswer(text=answer.text, score=score, regions=regions, malformed=malformed)

    def plain_text(self, text: str) -> str:
        """The words of an answer that is text."""
        return text.strip()


def number_texts(tokenizer: Any) -> dict[int, str]:
    """Tokens that numbers can be written with, in order, and what each adds to a text.

    Digits and points, also where a vocabulary has several in one token, or signs and blanks around
    them. Found once a tokenizer.
    """
    found: dict[int, str] | None = tokenizer.constraint_cache.get(number_texts)
    if found is None:
        anchor = tokenizer.words("0")
        before = len(tokenizer.decode(anchor))
        found = {}
        for piece, token in sorted(tokenizer.vocabulary.items(), key=lambda item: item[1]):
            if re.search(r"[0-9.]", piece) and token not in tokenizer.control_ids:
                text = tokenizer.decode([*anchor, token])[before:]
                if _NUMBER_PIECE.fullmatch(text):
                    found[token] = text
        tokenizer.constraint_cache[number_texts] = found
    return found
