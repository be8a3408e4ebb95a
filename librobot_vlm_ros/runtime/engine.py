"""The engine: one thread owns the model, everybody else hands in frames and requests and gets
results.

Nothing here blocks its caller except where a timeout is named (and `offer` in lock-step with a full
queue).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from librobot_vlm_ros.core import (
    ErrorCode,
    Frame,
    InferenceRequest,
    RequestError,
    Result,
    VlmError,
)
from librobot_vlm_ros.runtime.config import CameraConfig, DropReason, EngineConfig, EngineState
from librobot_vlm_ros.runtime.engine_state import OnCamera, OnFatal, OnResult, Shared
from librobot_vlm_ros.runtime.health import take_stats
from librobot_vlm_ros.runtime.life import EngineLife
from librobot_vlm_ros.runtime.loader import BackendFactory, Loader, LoadReport
from librobot_vlm_ros.runtime.model_thread import ModelThread
from librobot_vlm_ros.runtime.prefetch import AheadThread
from librobot_vlm_ros.runtime.requests import (
    OnText,
    Ticket,
    busy,
    cancelled,
    not_active,
    shutting_down,
    too_late,
)
from librobot_vlm_ros.runtime.standing import StandingTask
from librobot_vlm_ros.runtime.stats import EngineStats
from librobot_vlm_ros.runtime.timer_thread import TimerThread

# Settings that hold for an engine's whole life: changing them would mix two kinds of counting or
# order.
_FIXED = ("lock_step", "stats_window_s", "warm_up")


class Engine(EngineLife):
    """Loads a model and answers with it: standing tasks on frames of cameras, and requests on
    demand.

    Args:
        factory: makes the backend, on the model thread.
        config: limits and modes.
        on_result: called with each standing task's result and its frame, on the model thread.
        on_fatal: called when the model failed `config.fatal_after` times in a row, or was lost in a
            failed switch; the engine has paused itself by then. On the model thread: don't wait in
            it for the engine.
        on_camera: called when a camera falls silent or comes back, on the timer thread.
        clock: steady nanoseconds; frames' `received_ns` and requests' `deadline_ns` are on the same
        clock. free_memory: free bytes where models live; default: this machine's, for models on the
        CPU.
    """

    def __init__(
        self,
        factory: BackendFactory,
        *,
        config: EngineConfig | None = None,
        on_result: OnResult | None = None,
        on_fatal: OnFatal | None = None,
        on_camera: OnCamera | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        free_memory: Callable[[], int | None] | None = None,
    ) -> None:
        config = config if config is not None else EngineConfig()
        shared = Shared(
            config, clock=clock, on_result=on_result, on_fatal=on_fatal, on_camera=on_camera
        )
        loader = Loader(factory, free_memory=free_memory, warm_up=config.warm_up)
        super().__init__(
            shared,
            model=ModelThread(shared, loader).thread,
            timer=TimerThread(shared).thread,
            ahead=AheadThread(shared).thread,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def state(self) -> EngineState:
        """Where the engine stands."""
        with self._shared.lock:
            return self._shared.state()

    @property
    def config(self) -> EngineConfig:
        """Limits and modes now in force."""
        return self._shared.config

    @property
    def loaded(self) -> LoadReport | None:
        """What is loaded now; None when nothing is."""
        with self._shared.lock:
            return self._shared.loaded

    @property
    def full(self) -> bool:
        """Whether a request handed in now would be refused as BUSY."""
        with self._shared.lock:
            return self._shared.queue.full

    def now_ns(self) -> int:
        """The steady clock."""
        return self._shared.clock()

    def stats(self) -> EngineStats:
        """Health, now. Never waits for the model."""
        return take_stats(self._shared)

    def reconfigure(self, **changes: Any) -> None:
        """Change limits while the engine works. Raises `RequestError` BAD_PARAMETER; nothing
        changes then.
        """
        shared = self._shared
        fixed = sorted(set(changes) & set(_FIXED))
        known = {field.name for field in dataclasses.fields(EngineConfig)} - set(_FIXED)
        if not set(changes) <= known:
            wrong = ", ".join(fixed or sorted(set(changes) - known))
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"cannot change {wrong} of an engine",
                f"These can be changed: {', '.join(sorted(known))}.",
            )
        with shared.lock:
            shared.config = dataclasses.replace(shared.config, **changes)
            shared.queue.size = shared.config.queue_size
            shared.scheduler.reconfigure(shared.config)
            shared.wake()

    # -- cameras and standing tasks ----------------------------------------------------------

    def set_cameras(self, cameras: Iterable[CameraConfig]) -> None:
        """Declare the cameras; frames of others are refused. Those that stay keep frames and
        counts.
        """
        shared = self._shared
        declared = list({camera.name: camera for camera in cameras}.values())
        with shared.lock:
            shared.scheduler.set_cameras(declared)
            shared.watchdog.set_cameras(declared, shared.clock())
            shared.meter.keep_cameras(camera.name for camera in declared)
            shared.wake()

    def set_standing_tasks(self, tasks: Iterable[StandingTask]) -> None:
        """Replace what is asked of every frame, at any time. Raises `RequestError` UNKNOWN_CAMERA,
        BAD_PARAMETER; nothing changes then. Tasks that cannot run are listed in
        `stats().idle_tasks`.
        """
        shared = self._shared
        wanted = list(tasks)
        with shared.lock:
            shared.scheduler.set_tasks(wanted)
            shared.wake()

    def offer(self, frame: Frame) -> bool:
        """A frame has come. False when it is not taken, which is counted by reason.

        In lock-step with a bounded queue this waits until there is room.
        """
        shared = self._shared
        with shared.lock:
            if not self._heard(frame.camera):
                return False
            scheduler = shared.scheduler
            if shared.config.lock_step:
                shared.idle.wait_for(lambda: scheduler.room or not shared.running)
            if not shared.running or frame.camera not in scheduler.mailboxes:
                scheduler.refuse(frame.camera, DropReason.NOT_ACTIVE)
                return False
            now_ns = shared.clock()
            limit_s = 0.0 if shared.config.lock_step else shared.config.max_frame_age_s
            if limit_s > 0 and frame.age_s(now_ns) > limit_s:
                scheduler.refuse(frame.camera, DropReason.TOO_OLD)
                return False
            scheduler.offer(frame, now_ns)
            shared.work.notify_all()
            shared.ahead.notify_all()
        return True

    def count_drop(self, camera: str, reason: DropReason = DropReason.BAD_IMAGE) -> None:
        """An image came that never became a frame; it counts, also as a sign of life."""
        shared = self._shared
        with shared.lock:
            if self._heard(camera):
                shared.scheduler.refuse(camera, reason)

    def latest(self, camera: str = "", max_age_s: float | None = None) -> Frame:
        """The newest frame of a camera ("" = the only one), at most `max_age_s` old (default: the
        engine's limit; 0 = any age). Raises `RequestError` UNKNOWN_CAMERA, NO_FRAME, FRAME_TOO_OLD.
        """
        shared = self._shared
        with shared.lock:
            limit_s = shared.config.max_frame_age_s if max_age_s is None else max_age_s
            return shared.scheduler.mailbox(camera).latest(shared.clock(), limit_s)

    def frame_at(self, camera: str, stamp_ns: int, tolerance_s: float = 0.0) -> Frame:
        """The frame of a stamp from the camera's short history. Raises `RequestError`
        UNKNOWN_CAMERA, NO_FRAME.
        """
        shared = self._shared
        with shared.lock:
            return shared.scheduler.mailbox(camera).at(stamp_ns, tolerance_s)

    def input_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Width and height to which the loaded model brings an image of this size; None where that
        is not known or the model needs the whole image.
        """
        with self._shared.lock:
            model = self._shared.sizes
        try:
            return None if model is None else model.input_size(width, height)
        except VlmError:
            return None  # it is being freed

    # -- requests on demand ------------------------------------------------------------------

    def submit(
        self,
        request: InferenceRequest,
        on_token: OnText | None = None,
        max_frame_age_s: float | None = None,
    ) -> Future[Result]:
        """Ask once. The future always gives a `Result`, never raises: BUSY, NOT_ACTIVE,
        DEADLINE_EXCEEDED, FRAME_TOO_OLD, TASK_NOT_SUPPORTED and so on are its `error`.

        Args:
            on_token: called with each new piece of text, on the model thread; not after the future
            is done. max_frame_age_s: refuse when the frame is older by the time the model gets to
            it; default: any age.
        """
        shared = self._shared
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()  # Future.cancel() would leave the model working
        ticket = Ticket(
            request, future=future, on_text=on_token, max_frame_age_s=max_frame_age_s or 0.0
        )
        with shared.lock:
            refusal = self._refusal(request)
            if refusal is None:
                shared.queue.put(ticket)
                shared.work.notify_all()
                shared.ahead.notify_all()
                shared.timer.notify_all()
                ended = []
            else:
                ended = shared.end([ticket], refusal)
        shared.complete(ended)
        return future

    def cancel(self, request_id: str) -> bool:
        """Give up a request: its future gives CANCELLED now, the model stops at its next token.
        False when no such request waits or runs.
        """
        shared = self._shared
        with shared.lock:
            meant = [
                ticket
                for ticket in shared.waiting_tickets()
                if ticket.request.request_id == request_id and not ticket.standing
            ]
            ended = shared.end(meant, cancelled(request_id))
        shared.complete(ended)
        return bool(ended)

    def drain(self, timeout_s: float) -> bool:
        """Wait until all is done: frames in lock-step, requests, runs, loads. False when time is
        up.
        """
        shared = self._shared
        return self._wait_idle(
            lambda: (
                not (
                    shared.busy
                    or len(shared.queue)
                    or shared.scheduler.waiting
                    or shared.jobs
                    or shared.job
                )
            ),
            timeout_s,
        )

    def poke(self) -> None:
        """Look at the clock again: for tests with a clock of their own."""
        with self._shared.lock:
            self._shared.wake()

    # -- inside ------------------------------------------------------------------------------

    def _refusal(self, request: InferenceRequest) -> VlmError | None:
        shared = self._shared
        if shared.stopped:
            return shutting_down()
        if not shared.running:
            return not_active(shared.state().value)
        if shared.loaded is not None and request.task not in shared.loaded.tasks:
            able = ", ".join(sorted(shared.loaded.tasks))
            return RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"model {shared.loaded.model} cannot do {request.task!r}",
                f"It can do: {able}.",
            )
        if request.deadline_ns is not None and shared.clock() >= request.deadline_ns:
            return too_late(request.request_id)
        return busy(shared.queue.size) if shared.queue.full else None

    def _heard(self, camera: str) -> bool:
        shared = self._shared
        if camera not in shared.scheduler.mailboxes:
            shared.scheduler.refuse(camera, DropReason.UNKNOWN_CAMERA)
            return False
        now_ns = shared.clock()
        shared.meter.arrived(camera, now_ns)
        event = shared.watchdog.heard(camera, now_ns)
        if event is not None:
            shared.events.append(event)
            shared.timer.notify_all()
        return True
