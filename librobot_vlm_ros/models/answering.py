"""How a model answers requests: what is the same for every family.

Checking, grouping what can be answered together, timing, stopping, streaming, and what to do when
a batch breaks: NaN in a half dtype goes on in a safe one, anything else is tried one by one, so
that a bad request does not take its neighbours with it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from librobot_vlm_ros.core import (
    EmbeddingData,
    ErrorCode,
    Frame,
    GenerationParams,
    InferenceError,
    InferenceRequest,
    Limits,
    ModelAnswer,
    RequestError,
    VlmError,
    as_vlm_error,
)
from librobot_vlm_ros.models.backend import OnToken, ShouldStop, stop_reason
from librobot_vlm_ros.models.cache.image_features import FrameEntry
from librobot_vlm_ros.models.generation.config import Generated, GenerationConfig, TokenConstraint
from librobot_vlm_ros.models.generation.decoder import Decoder
from librobot_vlm_ros.models.generation.loop import generate
from librobot_vlm_ros.models.generation.streaming import TextStream
from librobot_vlm_ros.models.holding import Holding
from librobot_vlm_ros.models.registry import models_with_task

__all__ = ["Answering", "Job", "again_in_safer_dtype"]


@dataclass
class Job:
    """A request on its way through the model."""

    #: Place of the request in its batch.
    index: int
    request: InferenceRequest
    frame: FrameEntry
    #: Token ids of the prompt, without those of the image; () for an embedding.
    prompt: tuple[int, ...]
    preprocess_s: float = 0.0


def again_in_safer_dtype(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is called again in a safer dtype where it ends in NaN, see `Answering`."""

    @functools.wraps(method)
    def guarded(self: Answering, *args: Any, **options: Any) -> Any:
        while True:
            try:
                return method(self, *args, **options)
            except InferenceError as error:
                if error.code != ErrorCode.NAN_LOGITS or not self._to_safer_dtype():
                    raise

    return guarded


class Answering(Holding):
    """The `VlmBackend` side of `AbstractVLM`, on the methods that a family fills in."""

    #: Rows that are decoded together at most.
    max_batch = 16

    name: str
    revision: str
    tasks: frozenset[str]
    limits: Limits
    embedding_pooling: str

    # What a family fills in.

    @abstractmethod
    def prepare(self, request: InferenceRequest) -> tuple[FrameEntry, tuple[int, ...]]:
        """Tokenise the prompt and bring the frame's pixels into `FrameEntry.pixels`.

        Raises VlmError for a request that the model cannot take.
        """

    @abstractmethod
    def start(self, jobs: Sequence[Job]) -> tuple[Decoder, Tensor]:
        """Take in the prompts; gives the decoder and the history for `decode` (see there)."""

    @abstractmethod
    def rules(self, params: GenerationParams) -> GenerationConfig:
        """How to decode: the published settings where `params` leaves them open."""

    @abstractmethod
    def read(self, request: InferenceRequest, generated: Generated) -> ModelAnswer:
        """Tokens to text, regions and scores."""

    @abstractmethod
    def embed(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Image features of each job, [T, D]."""

    @abstractmethod
    def decode_text(self, ids: Sequence[int]) -> str:
        """Token ids to text, control tokens of the notation kept, begin, end and pad left out."""

    def grammar(self, request: InferenceRequest) -> TokenConstraint | None:
        """Which tokens may follow which in an answer to this; None where anything may."""
        return None

    # What follows from it.

    def run(
        self,
        batch: Sequence[InferenceRequest],
        *,
        on_token: OnToken | None = None,
        should_stop: ShouldStop | None = None,
    ) -> list[ModelAnswer | VlmError]:
        """See `VlmBackend.run`."""
        entries: dict[int, ModelAnswer | VlmError] = {}
        groups: dict[Any, list[Job]] = {}
        with self._answering():
            for index, request in enumerate(batch):
                try:
                    job = self._job(index, request)
                    groups.setdefault(_group_key(request), []).append(job)
                except Exception as error:
                    entries[index] = as_vlm_error(error)
            for jobs in groups.values():
                for begin in range(0, len(jobs), self.max_batch):
                    part = jobs[begin : begin + self.max_batch]
                    entries.update(self._answer_safely(part, on_token, should_stop))
        return [entries[index] for index in range(len(batch))]

    def warm_up(self) -> None:
        """Answer one caption on a blank frame, raising what goes wrong."""
        frame = Frame(np.zeros((64, 64, 3), dtype=np.uint8), camera="", stamp_ns=0)
        task = "caption" if "caption" in self.tasks else "embed"
        request = InferenceRequest(
            "warm-up", frame, task, params=GenerationParams(max_new_tokens=3)
        )
        entry = self.run([request])[0]
        self.frames.clear()
        if isinstance(entry, VlmError):
            raise entry

    def _job(self, index: int, request: InferenceRequest) -> Job:
        self._loaded()
        if request.task not in self.tasks:
            able = models_with_task(request.task)
            raise RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"{self.name} cannot {request.task!r}, it can: {', '.join(sorted(self.tasks))}",
                f"models that can: {', '.join(able) or 'none of the registered ones'}",
            )
        wanted = request.params.max_new_tokens
        if wanted is not None and wanted > self.limits.max_new_tokens:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"max_new_tokens is {wanted}, at most {self.limits.max_new_tokens} are allowed",
            )
        started = time.perf_counter()
        frame, prompt = self.prepare(request)
        return Job(index, request, frame, prompt, time.perf_counter() - started)

    def _answer_safely(
        self, jobs: Sequence[Job], on_token: OnToken | None, should_stop: ShouldStop | None
    ) -> dict[int, ModelAnswer | VlmError]:
        """Answers of a group. What breaks it is tried again in a safe dtype, or one by one."""
        told = False

        def tell(index: int, text: str) -> None:
            nonlocal told
            told = True
            assert on_token is not None
            on_token(index, text)

        try:
            return self._answer(jobs, tell if on_token else None, should_stop)
        except Exception as problem:
            error = as_vlm_error(problem)
        # A second try streams only if nothing was heard of the first: text is never taken back.
        on_token = None if told else on_token
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()
        if error.code == ErrorCode.NAN_LOGITS and self._to_safer_dtype():
            return self._answer_safely(jobs, on_token, should_stop)
        if len(jobs) == 1:
            return {jobs[0].index: error}
        entries: dict[int, ModelAnswer | VlmError] = {}
        for job in jobs:
            entries.update(self._answer_safely([job], on_token, should_stop))
        return entries

    def _answer(
        self, jobs: Sequence[Job], on_token: OnToken | None, should_stop: ShouldStop | None
    ) -> dict[int, ModelAnswer | VlmError]:
        started = time.perf_counter()
        if jobs[0].request.spec.output == "embedding":
            entries = self._embeddings(jobs, should_stop)
        else:
            entries = self._texts(jobs, on_token, should_stop)
        spent = time.perf_counter() - started
        for job in jobs:
            entry = entries[job.index]
            if isinstance(entry, ModelAnswer):
                entries[job.index] = dataclasses.replace(
                    entry, preprocess_s=job.preprocess_s, inference_s=spent
                )
        return entries

    def _embeddings(
        self, jobs: Sequence[Job], should_stop: ShouldStop | None
    ) -> dict[int, ModelAnswer | VlmError]:
        entries: dict[int, ModelAnswer | VlmError] = {}
        for job, tokens in zip(jobs, self.embed(jobs), strict=True):
            stop = stop_reason(job.request, job.index, should_stop)
            if stop is not None:
                entries[job.index] = stop
                continue
            values = tokens if self.embedding_pooling == "none" else tokens.float().mean(dim=0)
            # numpy has no bfloat16; float32 holds every value of it.
            values = values.to(torch.float16 if tokens.dtype == torch.float16 else torch.float32)
            if not bool(torch.isfinite(values).all()):
                raise InferenceError(ErrorCode.NAN_LOGITS, "the embedding is not finite")
            array = values.cpu().numpy()
            entries[job.index] = ModelAnswer(embedding=EmbeddingData(self.embedding_pooling, array))
        return entries

    def _texts(
        self, jobs: Sequence[Job], on_token: OnToken | None, should_stop: ShouldStop | None
    ) -> dict[int, ModelAnswer | VlmError]:
        rules = self.rules(jobs[0].request.params)
        decoder, history = self.start(jobs)
        streams = [TextStream(self.decode_text) for _ in jobs]

        def tell(row: int, ids: list[int]) -> None:
            text = streams[row].feed(ids)
            if text and on_token is not None:
                on_token(jobs[row].index, text)

        generated = generate(
            decoder,
            rules,
            history,
            stop=lambda row: stop_reason(jobs[row].request, jobs[row].index, should_stop),
            tell=tell if on_token is not None else None,
            seeds=[job.request.params.seed for job in jobs],
            grammars=[self.grammar(job.request) for job in jobs],
            again=lambda rows: self.start([jobs[row] for row in rows]),
        )
        entries: dict[int, ModelAnswer | VlmError] = {}
        for job, row, stream in zip(jobs, generated, streams, strict=True):
            if isinstance(row, VlmError):
                entries[job.index] = row
                continue
            if on_token is not None and (rest := stream.finish()):
                on_token(job.index, rest)
            try:
                answer = self.read(job.request, row)
            except Exception as error:
                entries[job.index] = as_vlm_error(error)
                continue
            entries[job.index] = dataclasses.replace(
                answer, prompt_tokens=len(job.prompt), generated_tokens=len(row.ids)
            )
        return entries


def _group_key(request: InferenceRequest) -> Any:
    """Requests with equal keys can be answered together."""
    if request.spec.output == "embedding":
        return "embedding"
    return dataclasses.replace(request.params, seed=None)
