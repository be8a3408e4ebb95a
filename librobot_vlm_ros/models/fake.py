"""A model without a network, for testing everything above models/: its answers follow from pixels
and prompt alone, and it can be told to be slow, to fail, to run out of memory or to give NaN.

It ships with the package as httpx ships MockTransport; nothing uses it unless asked by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from librobot_vlm_ros.core import (
    EmbeddingData,
    ErrorCode,
    InferenceError,
    InferenceRequest,
    ModelAnswer,
    ModelError,
    Region,
    RequestError,
    VlmError,
    as_vlm_error,
)
from librobot_vlm_ros.models.backend import OnToken, ShouldStop, stop_reason
from librobot_vlm_ros.models.configuration import bad_config
from librobot_vlm_ros.models.registry import model_info, register_vlm

#: Loading asks this many times whether it was cancelled.
_LOAD_SLICES = 20
_OPTIONS = ("sleep", "now_ns", "should_cancel")
_LABELS = ("red cube", "blue ball", "green cylinder", "yellow duck", "white mug", "black box")


@dataclass(frozen=True)
class FakeConfig:
    """What the fake model does. Counts refer to requests since it was made, starting with 1."""

    #: Seconds that one request takes, spread over its tokens.
    latency_s: float = 0.0
    #: Seconds that loading takes.
    load_s: float = 0.0
    #: Every n-th request fails with INFERENCE_FAILED; 0 means never.
    fail_every: int = 0
    #: Every n-th request runs out of memory.
    oom_every: int = 0
    #: Every n-th request gives NaN logits.
    nan_every: int = 0
    #: Every n-th call of `run` raises, as a broken model does.
    raise_every: int = 0
    #: Loading fails with this code; 0 means that it succeeds.
    load_error: int = 0
    #: Boxes in an answer.
    regions: int = 2
    #: Tokens that an answer could not parse.
    malformed: int = 0
    embedding_dim: int = 16
    #: Bytes that it says it holds.
    memory_bytes: int = 0
    #: Side of the square to which it says that it brings images; 0 means that it needs them whole.
    input_side: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise bad_config(
                    f"fake model: {field.name} is {value!r}, expected a number of at least 0"
                )


@register_vlm()
class FakeVlm:
    """A `VlmBackend` whose answer is a function of the frame's pixels, the task and the prompt."""

    def __init__(
        self,
        config: FakeConfig | Mapping[str, Any] | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        now_ns: Callable[[], int] = time.monotonic_ns,
        should_cancel: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = _config(config)
        self.name = "fake"
        self.revision = "fake"
        self.device = "cpu"
        self.dtype = "float32"
        self.tasks = frozenset(model_info("fake").tasks)
        self.embedding_dim = self.config.embedding_dim
        self.requests_seen = 0
        self.calls_seen = 0
        self.closed = False
        self._sleep = sleep
        self._now_ns = now_ns
        for _ in range(_LOAD_SLICES if self.config.load_s else 0):
            if should_cancel():
                raise ModelError(ErrorCode.LOAD_CANCELLED, "loading the fake model was cancelled")
            self._sleep(self.config.load_s / _LOAD_SLICES)
        if self.config.load_error:
            raise ModelError(ErrorCode(self.config.load_error), "the fake model was told to fail")

    @classmethod
    def create(cls, name: str, *, config: Any = None, **options: Any) -> FakeVlm:
        """As `create_vlm` calls it; device, dtype, weights and the like mean nothing here."""
        known = {key: options[key] for key in _OPTIONS if options.get(key) is not None}
        return cls(config, **known)

    def run(
        self,
        batch: Sequence[InferenceRequest],
        *,
        on_token: OnToken | None = None,
        should_stop: ShouldStop | None = None,
    ) -> list[ModelAnswer | VlmError]:
        """See `VlmBackend.run`."""
        self.calls_seen += 1
        if _due(self.calls_seen, self.config.raise_every):
            raise RuntimeError("the fake model was told to break")
        entries: list[ModelAnswer | VlmError] = []
        for index, request in enumerate(batch):
            self.requests_seen += 1
            try:
                entries.append(self._answer(index, request, on_token, should_stop))
            except Exception as error:
                entries.append(as_vlm_error(error))
        return entries

    def warm_up(self) -> None:
        """Nothing to warm."""

    def close(self) -> None:
        """From here on requests get MODEL_NOT_LOADED."""
        self.closed = True

    def memory_bytes(self) -> int:
        """What the configuration says."""
        return 0 if self.closed else self.config.memory_bytes

    def input_size(self, width: int, height: int) -> tuple[int, int] | None:
        """What the configuration says."""
        side = self.config.input_side
        return (side, side) if side else None

    def get_embedding_dim(self) -> int:
        """Length of an embedding vector."""
        return self.embedding_dim

    def _answer(
        self,
        index: int,
        request: InferenceRequest,
        on_token: OnToken | None,
        should_stop: ShouldStop | None,
    ) -> ModelAnswer:
        if self.closed:
            raise ModelError(ErrorCode.MODEL_NOT_LOADED, "the fake model is closed")
        if request.task not in self.tasks:
            raise RequestError(ErrorCode.TASK_NOT_SUPPORTED, f"fake cannot {request.task!r}")
        for every, code, what in (
            (self.config.fail_every, ErrorCode.INFERENCE_FAILED, "fail"),
            (self.config.oom_every, ErrorCode.OUT_OF_MEMORY, "run out"),
            (self.config.nan_every, ErrorCode.NAN_LOGITS, "give NaN"),
        ):
            if _due(self.requests_seen, every):
                raise InferenceError(code, f"the fake model was told to {what}")
        started = time.perf_counter()
        digest = _digest(request)
        output = request.spec.output
        regions = self._regions(request, digest) if output == "regions" else ()
        text = "" if output == "embedding" else _text(request, digest, regions)
        words = text.split()
        limit = request.params.max_new_tokens
        words = words if limit is None else words[:limit]
        pause = self.config.latency_s / max(1, len(words))
        for place, word in enumerate(words or [""]):
            stop = stop_reason(request, index, should_stop, self._now_ns)
            if stop is not None:
                raise stop
            self._sleep(pause)
            if on_token is not None and word:
                on_token(index, word if place == 0 else f" {word}")
        return ModelAnswer(
            text=" ".join(words),
            score=0.5 + digest[2] / 512 if output == "text" else math.nan,
            regions=regions,
            malformed=self.config.malformed if output == "regions" else 0,
            embedding=self._embedding(digest) if output == "embedding" else None,
            prompt_tokens=len(request.prompt.split()),
            generated_tokens=len(words),
            inference_s=time.perf_counter() - started,
        )

    def _regions(self, request: InferenceRequest, digest: bytes) -> tuple[Region, ...]:
        width, height = request.frame.width, request.frame.height
        regions = []
        for number in range(self.config.regions):
            seed = hashlib.sha256(digest + number.to_bytes(4, "little")).digest()
            x_min, y_min = seed[0] / 512 * width, seed[1] / 512 * height
            x_max = x_min + (1 + seed[2]) / 512 * width
            y_max = y_min + (1 + seed[3]) / 512 * height
            label = request.prompt or _LABELS[seed[4] % len(_LABELS)]
            outlined = request.task in ("segment", "region_segment", "ocr_with_region")
            polygon = ((x_min, y_min), (x_max, y_min), (x_max, y_max), (x_min, y_max))
            box = x_min, y_min, x_max, y_max
            score = 0.5 + seed[5] / 512
            regions.append(Region(label, score, *box, polygon=polygon if outlined else ()))
        return tuple(regions)

    def _embedding(self, digest: bytes) -> EmbeddingData:
        seed = int.from_bytes(digest[:8], "little")
        values = np.random.default_rng(seed).standard_normal(self.embedding_dim)
        return EmbeddingData(pooling="mean", array=values.astype(np.float32))


def _config(config: FakeConfig | Mapping[str, Any] | None) -> FakeConfig:
    if isinstance(config, FakeConfig):
        return config
    try:
        return FakeConfig(**(config or {}))
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(FakeConfig))
        raise bad_config(f"fake model: {error}", f"settings are: {known}") from error


def _due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0


def _digest(request: InferenceRequest) -> bytes:
    what = hashlib.sha256(np.ascontiguousarray(request.frame.pixels).data)
    what.update(f"{request.task}\0{request.prompt}\0{request.region}".encode())
    return what.digest()


def _text(request: InferenceRequest, digest: bytes, regions: tuple[Region, ...]) -> str:
    if regions:
        return " ".join(region.label for region in regions)
    thing, other = (_LABELS[digest[k] % len(_LABELS)] for k in (0, 1))
    about = f" asked about {request.prompt}" if request.prompt else ""
    return f"a {thing} and a {other}{about}"
