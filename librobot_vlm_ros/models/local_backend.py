"""A model on this machine, for the runtime: `LocalBackend` answers requests with a VLM.

It checks, groups what can be answered together, times, stops, streams, keeps what was computed of
the newest frames, and says what to do when a batch breaks: NaN in a half dtype goes on in a safer
one, anything else is tried one by one, so that a bad request does not take its neighbours with it.
It knows no family.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
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
    ModelAnswer,
    RequestError,
    VlmError,
    as_vlm_error,
)
from librobot_vlm_ros.models.backend import OnToken, ShouldStop, stop_reason
from librobot_vlm_ros.models.cache.image_features import FrameCache, FrameEntry, ImageFeatures
from librobot_vlm_ros.models.cache.prefix import PrefixCache
from librobot_vlm_ros.models.generation.decoder import Decoder
from librobot_vlm_ros.models.generation.loop import generate
from librobot_vlm_ros.models.generation.streaming import TextStream
from librobot_vlm_ros.models.inputs.preprocess import ahead_of
from librobot_vlm_ros.models.placement import free_bytes, usable_cores

_POOLINGS = ("mean", "none")


@dataclass
class PreparedRequest:
    """A request on its way through the model."""

    #: Place of the request in its batch.
    index: int
    request: InferenceRequest
    frame: FrameEntry
    #: Token ids of the prompt, the image's as one token; () for an embedding.
    prompt: tuple[int, ...]
    preprocess_s: float = 0.0


class LocalBackend:
    """A `VlmBackend` over an `AbstractVLM`. One thread at a time may use it, but for
    `prepare_frame`.

    `embedding_pooling` of the task embed: "mean", or "none" for a vector a place. Raises
    RequestError BAD_PARAMETER for another.
    """

    #: Rows that are decoded together at most.
    max_batch = 16

    def __init__(self, vlm: Any, embedding_pooling: str = "mean") -> None:
        if embedding_pooling not in _POOLINGS:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"embedding_pooling is {embedding_pooling!r}, expected 'mean' or 'none'",
            )
        self.vlm = vlm
        self.embedding_pooling = embedding_pooling
        self.frames = FrameCache()
        self.prefixes = PrefixCache()
        #: The weights that the features in `frames` were computed with.
        self._computed_with: Any = None

    @property
    def name(self) -> str:
        """See `VlmBackend`."""
        return str(self.vlm.name)

    @property
    def revision(self) -> str:
        """See `VlmBackend`."""
        return str(self.vlm.revision)

    @property
    def device(self) -> str:
        """See `VlmBackend`."""
        return str(self.vlm.device)

    @property
    def dtype(self) -> str:
        """See `VlmBackend`."""
        return str(self.vlm.dtype)

    @property
    def tasks(self) -> frozenset[str]:
        """See `VlmBackend`."""
        return frozenset(self.vlm.tasks)

    @property
    def embedding_dim(self) -> int:
        """See `VlmBackend`."""
        return int(self.vlm.get_embedding_dim())

    # Answering.

    def run(
        self,
        batch: Sequence[InferenceRequest],
        *,
        on_token: OnToken | None = None,
        should_stop: ShouldStop | None = None,
    ) -> list[ModelAnswer | VlmError]:
        """See `VlmBackend.run`."""
        entries: dict[int, ModelAnswer | VlmError] = {}
        groups: dict[Any, list[PreparedRequest]] = {}
        with self.vlm.inference():
            if self._computed_with is not self.vlm.weights:  # trained, adapted or loaded since
                self.frames.clear()
                self._computed_with = self.vlm.weights
            for index, request in enumerate(batch):
                try:
                    prepared = self.prepare(index, request)
                    groups.setdefault(_group_key(request), []).append(prepared)
                except Exception as error:
                    entries[index] = as_vlm_error(error)
            for requests in groups.values():
                for begin in range(0, len(requests), self.max_batch):
                    part = requests[begin : begin + self.max_batch]
                    entries.update(self._answer_safely(part, on_token, should_stop))
        return [entries[index] for index in range(len(batch))]

    def warm_up(self) -> None:
        """Answer one caption on a blank frame, raising what goes wrong."""
        frame = Frame(np.zeros((64, 64, 3), dtype=np.uint8), camera="", stamp_ns=0)
        task = "caption" if "caption" in self.tasks else "embed"
        params = GenerationParams(max_new_tokens=3)
        (entry,) = self.run([InferenceRequest("warm-up", frame, task, params=params)])
        self.frames.clear()
        if isinstance(entry, VlmError):
            raise entry

    def prepare(self, index: int, request: InferenceRequest) -> PreparedRequest:
        """Tokenise the prompt and bring the frame's pixels to the model's size.

        Raises VlmError for a request that the model cannot take.
        """
        vlm, processor = self.vlm, self.vlm.processor
        vlm.loaded()
        processor.refuse_unable(request.task)
        wanted = request.params.max_new_tokens
        if wanted is not None and wanted > vlm.limits.max_new_tokens:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"max_new_tokens is {wanted}, at most {vlm.limits.max_new_tokens} are allowed",
            )
        started = time.perf_counter()
        prompt = processor.request_ids(request)
        answer = processor.generation_config(request.params).max_new_tokens if prompt else 0
        entry = self.frames.entry(request.frame, vlm.torch_dtype)
        features = entry.features if entry.has_features(vlm.torch_dtype) else None
        pixels = entry.ready(vlm.pixels) if features is None else None
        if prompt:
            image = processor.count(pixels) if features is None else len(features.vectors)
            processor.refuse_too_long(image, len(prompt), answer)
        return PreparedRequest(index, request, entry, tuple(prompt), time.perf_counter() - started)

    def start(self, requests: Sequence[PreparedRequest]) -> tuple[Decoder, Tensor]:
        """Take in the prompts of requests that decode alike: the decoder, and int64 [B, H] that
        the answers go on from.
        """
        vlm = self.vlm
        config = vlm.processor.generation_config(requests[0].request.params)
        frames = [one.frame for one in requests]
        decoder, history = vlm.start(
            self._features(requests),
            [one.prompt for one in requests],
            config.max_new_tokens,
            (self.prefixes, frames),
        )
        return decoder, history

    def _features(self, requests: Sequence[PreparedRequest]) -> list[ImageFeatures]:
        """Vision features of each request's frame, computed once a frame."""
        dtype = self.vlm.torch_dtype
        new = {id(one.frame): one.frame for one in requests if not one.frame.has_features(dtype)}
        if new:
            prepared = [entry.ready(self.vlm.pixels) for entry in new.values()]
            found = self.vlm.image_features(prepared)
            for entry, features in zip(new.values(), found, strict=True):
                entry.features, entry.pixels = features, None
        return [features for one in requests if (features := one.frame.features) is not None]

    def _answer_safely(
        self,
        requests: Sequence[PreparedRequest],
        on_token: OnToken | None,
        should_stop: ShouldStop | None,
    ) -> dict[int, ModelAnswer | VlmError]:
        """Answers of a group. What breaks it is tried again in a safe dtype, or one by one."""
        told = False

        def tell(index: int, text: str) -> None:
            nonlocal told
            told = True
            assert on_token is not None
            on_token(index, text)

        try:
            return self._answer(requests, tell if on_token else None, should_stop)
        except Exception as problem:
            error = as_vlm_error(problem)
        # A second try streams only if nothing was heard of the first: text is never taken back.
        on_token = None if told else on_token
        if self.vlm.torch_device.type == "cuda":
            torch.cuda.empty_cache()
        if error.code == ErrorCode.NAN_LOGITS and self.vlm.to_safer_dtype():
            return self._answer_safely(requests, on_token, should_stop)
        if len(requests) == 1:
            return {requests[0].index: error}
        entries: dict[int, ModelAnswer | VlmError] = {}
        for one in requests:
            entries.update(self._answer_safely([one], on_token, should_stop))
        return entries

    def _answer(
        self,
        requests: Sequence[PreparedRequest],
        on_token: OnToken | None,
        should_stop: ShouldStop | None,
    ) -> dict[int, ModelAnswer | VlmError]:
        started = time.perf_counter()
        if requests[0].request.spec.output == "embedding":
            entries = self._embeddings(requests, should_stop)
        else:
            entries = self._texts(requests, on_token, should_stop)
        spent = time.perf_counter() - started
        for one in requests:
            entry = entries[one.index]
            if isinstance(entry, ModelAnswer):
                entries[one.index] = dataclasses.replace(
                    entry, preprocess_s=one.preprocess_s, inference_s=spent
                )
        return entries

    def _embeddings(
        self, requests: Sequence[PreparedRequest], should_stop: ShouldStop | None
    ) -> dict[int, ModelAnswer | VlmError]:
        entries: dict[int, ModelAnswer | VlmError] = {}
        for one, features in zip(requests, self._features(requests), strict=True):
            stop = stop_reason(one.request, one.index, should_stop)
            if stop is not None:
                entries[one.index] = stop
                continue
            vectors = features.vectors
            values = vectors if self.embedding_pooling == "none" else vectors.float().mean(dim=0)
            # numpy has no bfloat16; float32 holds every value of it.
            values = values.to(torch.float16 if vectors.dtype == torch.float16 else torch.float32)
            if not bool(torch.isfinite(values).all()):
                raise InferenceError(ErrorCode.NAN_LOGITS, "the embedding is not finite")
            array = values.cpu().numpy()
            entries[one.index] = ModelAnswer(embedding=EmbeddingData(self.embedding_pooling, array))
        return entries

    def _texts(
        self,
        requests: Sequence[PreparedRequest],
        on_token: OnToken | None,
        should_stop: ShouldStop | None,
    ) -> dict[int, ModelAnswer | VlmError]:
        processor = self.vlm.processor
        decoder, history = self.start(requests)
        streams = [TextStream(processor.decode) for _ in requests]

        def tell(row: int, ids: list[int]) -> None:
            text = streams[row].feed(ids)
            if text and on_token is not None:
                on_token(requests[row].index, text)

        generated = generate(
            decoder,
            processor.generation_config(requests[0].request.params),
            history,
            stop=lambda row: stop_reason(requests[row].request, requests[row].index, should_stop),
            tell=tell if on_token is not None else None,
            seeds=[one.request.params.seed for one in requests],
            constraints=[processor.constraint(one.request.task) for one in requests],
            again=lambda rows: self.start([requests[row] for row in rows]),
        )
        entries: dict[int, ModelAnswer | VlmError] = {}
        for one, row, stream in zip(requests, generated, streams, strict=True):
            if isinstance(row, VlmError):
                entries[one.index] = row
                continue
            if on_token is not None and (rest := stream.finish()):
                on_token(one.index, rest)
            try:
                answer = processor.read(one.request, row)
            except Exception as error:
                entries[one.index] = as_vlm_error(error)
                continue
            entries[one.index] = dataclasses.replace(
                answer, prompt_tokens=len(one.prompt), generated_tokens=len(row.ids)
            )
        return entries

    # Frames and memory.

    @property
    def prepares_ahead(self) -> bool:
        """Whether preparing frames beside `run` pays: on a GPU, and where torch leaves a core."""
        on_cpu = self.vlm.torch_device.type == "cpu"
        return not on_cpu or bool(torch.get_num_threads() < usable_cores())

    def prepare_frame(self, frame: Frame) -> None:
        """Make the frame's pixels ready before a request asks for them. The one method that may be
        called while another thread is in `run`. Raises what `prepare` would raise for the frame.
        """
        with torch.inference_mode(), ahead_of(self.vlm.torch_device):
            self.frames.lookup(frame).prepare(self.vlm.pixels)

    def input_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Width and height that an image of this size is brought to; None where the number of
        vectors depends on the image.
        """
        size: tuple[int, int] | None = self.vlm.processor.input_size(width, height)
        return size

    def frame_counts(self) -> Mapping[str, int]:
        """Requests that shared features of their frame (`hits`) and that had them computed
        (`misses`), frames prepared before their first request (`ahead`).
        """
        frames = self.frames
        return {"hits": frames.hits, "misses": frames.misses, "ahead": frames.prefetched}

    def free_caches(self) -> None:
        """Give back what is only kept to be quick: features of frames, and on a GPU buffers and
        the memory that torch holds for the next request. Answers stay the same.
        """
        self.frames.clear()
        self.vlm.free_caches()

    def free_memory(self) -> int | None:
        """Bytes free where the weights lie; None where that is not known, and once closed."""
        return None if self.vlm.module is None else free_bytes(self.vlm.torch_device)

    def memory_bytes(self) -> int:
        """See `VlmBackend`."""
        return int(self.vlm.memory_bytes())

    def close(self) -> None:
        """Free the weights; requests get MODEL_NOT_LOADED from here on."""
        self.frames.clear()
        self.vlm.close()


def _group_key(request: InferenceRequest) -> Any:
    """Requests with equal keys can be answered together."""
    if request.spec.output == "embedding":
        return "embedding"
    return dataclasses.replace(request.params, seed=None)
