"""A clock and a model that do what the test says, so that no test sleeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from librobot_vlm_ros.core import (
    EngineError,
    ErrorCode,
    Frame,
    InferenceRequest,
    ModelAnswer,
    Result,
    VlmError,
    as_vlm_error,
)
from librobot_vlm_ros.runtime import CameraConfig, Engine, EngineConfig

PATIENCE_S = (
    10.0  # how long a test waits for what must come at once; only a failing test waits it out
)


class TestedEngine(Engine):
    """An engine that a test can wait for, and that looks at the test's clock when told."""

    def drain(self, timeout_s: float) -> bool:
        """Wait until all is done: frames in lock-step, requests, runs, loads. False when time is
        up.
        """
        shared = self._shared
        with shared.lock:
            return shared.idle.wait_for(
                lambda: (
                    not (
                        shared.busy
                        or shared.queue
                        or shared.scheduler._in_order
                        or shared.load
                        or shared.next_load
                    )
                ),
                timeout_s,
            )

    def poke(self) -> None:
        """Look at the clock again."""
        with self._shared.lock:
            self._shared.wake_all()


class Clock:
    """Steady nanoseconds that only `advance` moves; engines made with it are told."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000_000
        self.engines: list[TestedEngine] = []

    def __call__(self) -> int:
        return self.ns

    def advance(self, seconds: float) -> None:
        self.ns += round(seconds * 1e9)
        for engine in self.engines:
            engine.poke()


class ScriptBackend:
    """A model that answers at once, or holds each batch until it is released or told to stop."""

    def __init__(self, name: str = "script") -> None:
        self.name = name
        self.revision = f"{name}-r1"
        self.device = "cpu"
        self.dtype = "float32"
        self.tasks = frozenset({"caption", "detect", "ground", "answer", "region_caption"})
        self.embedding_dim = 4
        self.batches: list[list[InferenceRequest]] = []
        self.answer: Callable[[InferenceRequest], ModelAnswer | VlmError] = lambda request: (
            ModelAnswer(text=f"{request.task} {request.prompt}".strip(), generated_tokens=2)
        )
        self.before_run: Callable[[Sequence[InferenceRequest]], None] = lambda batch: None
        self.tokens: Sequence[str] = ()
        self.closed = False
        self.caches_freed = 0
        self.threads: set[str] = set()
        self.deaf = False  # ignores should_stop, as native code in the middle of a token does
        self._entered = threading.Semaphore(0)
        self._go = threading.Event()
        self._go.set()

    def hold(self) -> None:
        """From now on a batch does not end before `release`."""
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def forget_entered(self) -> None:
        """Wait for batches that begin from now on."""
        while self._entered.acquire(blocking=False):
            pass

    def wait_entered(self) -> None:
        """Until one more batch has begun."""
        assert self._entered.acquire(timeout=PATIENCE_S), "the model was not asked"

    def run(
        self, batch: Sequence[InferenceRequest], *, on_token: Any = None, should_stop: Any = None
    ) -> list[ModelAnswer | VlmError]:
        self.threads.add(threading.current_thread().name)
        self.batches.append(list(batch))
        self._entered.release()
        self.before_run(batch)
        outcomes: list[ModelAnswer | VlmError] = []
        for index, request in enumerate(batch):
            outcomes.append(self._one(index, request, on_token, should_stop))
        return outcomes

    def _one(
        self, index: int, request: InferenceRequest, on_token: Any, should_stop: Any
    ) -> ModelAnswer | VlmError:
        for token in self.tokens:
            if on_token is not None:
                on_token(index, token)
        while not self._go.wait(0.002):
            if should_stop is not None and should_stop(index) and not self.deaf:
                return EngineError(ErrorCode.CANCELLED, "stopped at a token")
        try:
            return self.answer(request)
        except VlmError as error:
            return as_vlm_error(error)

    def free_caches(self) -> None:
        self.caches_freed += 1

    def warm_up(self) -> None:
        self.threads.add(threading.current_thread().name)

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.closed = True

    def memory_bytes(self) -> int:
        return 0 if self.closed else 1000


class Results:
    """What `on_result` was told; can be waited for."""

    def __init__(self) -> None:
        self.all: list[tuple[Result, Frame]] = []
        self._changed = threading.Condition()

    def __call__(self, result: Result, frame: Frame) -> None:
        with self._changed:
            self.all.append((result, frame))
            self._changed.notify_all()

    def all_results(self) -> list[Result]:
        with self._changed:
            return [result for result, _ in self.all]

    def wait(self, count: int) -> list[Result]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.all) >= count, PATIENCE_S), (
                f"{len(self.all)} results came, {count} were expected"
            )
            return [result for result, _ in self.all]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def script() -> type[ScriptBackend]:
    return ScriptBackend


@pytest.fixture
def backend() -> ScriptBackend:
    return ScriptBackend()


@pytest.fixture
def results() -> Results:
    return Results()


@pytest.fixture
def make_frame(clock: Clock) -> Callable[..., Frame]:
    """A small frame received now; each one of a camera is stamped 0.1 s after the one before."""
    made: dict[str, int] = {}

    def make(camera: str = "front", **fields: Any) -> Frame:
        made[camera] = made.get(camera, 0) + 1
        number = made[camera]
        values: dict[str, Any] = {
            "pixels": np.full((4, 6, 3), number % 256, np.uint8),
            "camera": camera,
            "stamp_ns": number * 100_000_000,
            "frame_id": f"{camera}_optical",
            "sequence": number,
            "received_ns": clock.ns,
            "header": ("header", camera, number),
        }
        return Frame(**{**values, **fields})

    return make


@pytest.fixture
def ask(make_frame: Callable[..., Frame]) -> Callable[..., InferenceRequest]:
    """A request on a frame of its own, unless one is given."""
    made: list[int] = []

    def make(request_id: str = "", **fields: Any) -> InferenceRequest:
        made.append(1)
        fields.setdefault("task", "caption")
        frame = fields.pop("frame", None) or make_frame()
        return InferenceRequest(request_id=request_id or f"ask-{len(made)}", frame=frame, **fields)

    return make


@pytest.fixture
def make_engine(
    clock: Clock, backend: ScriptBackend, results: Results
) -> Iterator[Callable[..., TestedEngine]]:
    """Engines on the test's clock and model, with one camera "front"; ended after the test."""
    engines: list[TestedEngine] = []

    def make(
        *,
        load: bool = True,
        start: bool = True,
        cameras: Sequence[str] = ("front",),
        **options: Any,
    ) -> TestedEngine:
        factory = options.pop("factory", lambda name, *, should_cancel, **kw: backend)
        settings = {
            key: options.pop(key)
            for key in list(options)
            if key in EngineConfig.__dataclass_fields__
        }
        engine = TestedEngine(
            factory,
            config=EngineConfig(**settings),
            on_result=results,
            clock=clock,
            **options,
        )
        engines.append(engine)
        clock.engines.append(engine)
        engine.set_cameras(CameraConfig(name, timeout_s=0.0) for name in cameras)
        if load:
            engine.load("script").result(PATIENCE_S)
            if start:
                engine.start()
        return engine

    yield make
    backend.release()
    for engine in engines:
        assert engine.stop(PATIENCE_S), "a thread of the engine did not end"
