"""The engine: one thread owns the model, everybody else hands in frames and requests and gets
results.

Nothing here blocks its caller except where a timeout is named. Whoever waits is answered at once
when the engine is paused or stopped; the model thread follows at its next token. Three threads run:
the model's (`model_thread.py`), one that prepares frames (`prefetch.py`) and one that keeps time
(`TimerThread`).
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from librobot_vlm_ros.core import (
    EngineError,
    ErrorCode,
    Frame,
    InferenceRequest,
    ModelError,
    RequestError,
    Result,
    VlmError,
)
from librobot_vlm_ros.runtime.config import (
    CameraConfig,
    DropReason,
    EngineConfig,
    EngineState,
)
from librobot_vlm_ros.runtime.engine_state import (
    OnCamera,
    OnFatal,
    OnResult,
    SharedState,
)
from librobot_vlm_ros.runtime.loader import (
    BackendFactory,
    Loader,
    LoadJob,
    LoadReport,
    load_cancelled,
)
from librobot_vlm_ros.runtime.model_thread import ModelThread
from librobot_vlm_ros.runtime.pending_request import (
    OnText,
    PendingRequest,
    busy,
    cancelled,
    not_active,
    shutting_down,
    too_late,
)
from librobot_vlm_ros.runtime.prefetch import PrefetchThread
from librobot_vlm_ros.runtime.scheduler import StandingTask
from librobot_vlm_ros.runtime.stats import EngineStats
from librobot_vlm_ros.runtime.watchdog import CameraEvent


class Engine:
    """Loads a model and answers with it: standing tasks on frames of cameras, and requests on
    demand.

    Args:
        factory: makes the backend, on the model thread.
        config: limits and modes.
        on_result: called with each standing task's result and its frame, on the model thread.
        on_fatal: called when the model failed several times in a row, or was lost in a failed
            switch; the engine has paused itself by then. On the model thread: don't wait in it for
            the engine.
        on_camera: called when a camera falls silent or comes back, on the timer thread.
        clock: steady nanoseconds; frames' `received_ns` and requests' `deadline_ns` are on the same
            clock.
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
    ) -> None:
        config = config if config is not None else EngineConfig()
        self._shared = shared = SharedState(
            config, clock=clock, on_result=on_result, on_fatal=on_fatal, on_camera=on_camera
        )
        loops: dict[str, Callable[[], None]] = {
            "vlm-model": ModelThread(shared, Loader(factory, warm_up=config.warm_up)).run,
            "vlm-prefetch": PrefetchThread(shared).run,
            "vlm-timer": TimerThread(shared).run,
        }
        self._threads = {
            name: threading.Thread(target=loop, name=name, daemon=True)
            for name, loop in loops.items()
        }
        for thread in self._threads.values():
            thread.start()

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
            return self._shared.full

    def now_ns(self) -> int:
        """The steady clock."""
        return self._shared.clock()

    def stats(self) -> EngineStats:
        """Health, now. Never waits for the model."""
        with self._shared.lock:
            return self._shared.stats()

    def reconfigure(self, *, queue_size: int, max_frame_age_s: float) -> None:
        """Change limits while at work. Raises `RequestError` BAD_PARAMETER, changing nothing."""
        shared = self._shared
        with shared.lock:
            shared.config = shared.scheduler.config = dataclasses.replace(
                shared.config, queue_size=queue_size, max_frame_age_s=max_frame_age_s
            )
            shared.wake_all()

    # -- loading, starting, pausing, stopping --------------------------------------------------

    def load(
        self, name: str, *, required_bytes: int | None = None, **options: Any
    ) -> Future[LoadReport]:
        """Load a model, in place of the present one if there is one, without losing what waits.

        The present one is kept until the new one is warm if there is memory for both
        (`required_bytes` of the new one, default: as much as the present one), else closed first.
        After a failure the present one is back. The future raises `VlmError`: what the loader says,
        LOAD_CANCELLED, BUSY while another load runs, SHUTTING_DOWN.
        """
        shared = self._shared
        job = LoadJob(name, options, required_bytes)
        job.future.set_running_or_notify_cancel()
        error: VlmError | None = None
        with shared.lock:
            if shared.stopped:
                error = shutting_down()
            elif shared.load_in_progress() is not None:
                error = EngineError(
                    ErrorCode.BUSY, "a model is being loaded", "Wait for it, or cancel it."
                )
            else:
                shared.next_load = job
                shared.wake_all()
        if error is not None:
            job.future.set_exception(error)
        return job.future

    def cancel_load(self, future: Future[LoadReport] | None = None) -> bool:
        """Give up the load in progress (with `future`: only if it is that one). Its future raises
        LOAD_CANCELLED at once, and what the loader still brings is thrown away. False when there is
        none.
        """
        shared = self._shared
        with shared.lock:
            job = shared.load_in_progress()
            if job is None or (future is not None and job.future is not future):
                return False
            job = shared.cancel_load(roll_back=True)
            shared.wake_all()
        if job is not None:
            job.future.set_exception(load_cancelled(job.name))
        return job is not None

    def start(self) -> None:
        """Begin to work, if not at it. Raises `VlmError`: MODEL_NOT_LOADED, SHUTTING_DOWN."""
        shared = self._shared
        with shared.lock:
            if shared.stopped:
                raise shutting_down()
            if shared.loaded is None:
                raise ModelError(
                    ErrorCode.MODEL_NOT_LOADED,
                    "no model is loaded",
                    "Configure the node, or load one.",
                )
            if not shared.running:
                shared.running = True
                shared.meter.consecutive_failures = 0
                shared.watchdog.start(shared.clock())
            shared.wake_all()

    def pause(self, timeout_s: float = 5.0) -> bool:
        """Stop working and keep the model: all requests are answered NOT_ACTIVE now, the model is
        told to stop at its next token. True once nothing runs: no `on_result` comes after that.
        """
        shared = self._shared
        with shared.lock:
            finished = shared.pause()
        shared.deliver(finished)
        if threading.current_thread() is self._threads["vlm-model"]:
            return True  # called from a callback: what runs is the caller itself
        with shared.lock:
            return shared.idle.wait_for(lambda: not shared.busy, timeout_s)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End: everything that waits is answered SHUTTING_DOWN, the model is freed, all threads
        end. True once they have; false when the model did not let go in time. May be called again.
        """
        shared = self._shared
        until = time.monotonic() + timeout_s
        with shared.lock:
            shared.stopped = True
            finished = shared.pause()
            job = shared.cancel_load(roll_back=False)
            shared.wake_all()
        shared.deliver(finished)
        if job is not None:
            job.future.set_exception(shutting_down())
        threads = self._threads.values()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    # -- cameras and standing tasks ------------------------------------------------------------

    def set_cameras(self, cameras: Iterable[CameraConfig]) -> None:
        """Declare the cameras, others are refused; those that stay keep frames and counts."""
        shared = self._shared
        declared = list({camera.name: camera for camera in cameras}.values())
        with shared.lock:
            shared.scheduler.set_cameras(declared)
            shared.watchdog.set_cameras(declared, shared.clock())
            shared.meter.keep_cameras(camera.name for camera in declared)
            shared.wake_all()

    def set_standing_tasks(self, tasks: Iterable[StandingTask]) -> None:
        """Replace what is asked of every frame, at any time. Raises `RequestError` UNKNOWN_CAMERA,
        BAD_PARAMETER; nothing changes then. Tasks that cannot run are listed in
        `stats().idle_tasks`.
        """
        shared = self._shared
        wanted = list(tasks)
        with shared.lock:
            shared.scheduler.set_tasks(wanted)
            shared.wake_all()

    def offer(self, frame: Frame) -> bool:
        """A frame has come. False when it is not accepted, which is counted by reason."""
        shared = self._shared
        with shared.lock:
            if not self._heard(frame.camera):
                return False
            if not shared.running:
                shared.scheduler.refuse(frame.camera, DropReason.NOT_ACTIVE)
                return False
            now_ns = shared.clock()
            limit_s = 0.0 if shared.config.lock_step else shared.config.max_frame_age_s
            if limit_s > 0 and frame.age_s(now_ns) > limit_s:
                shared.scheduler.refuse(frame.camera, DropReason.TOO_OLD)
                return False
            shared.scheduler.offer(frame, now_ns)
            shared.work.notify_all()
            shared.prefetch.notify_all()
        return True

    def count_drop(self, camera: str, reason: DropReason) -> None:
        """An image came that never became a frame; it counts, also as a sign of life."""
        shared = self._shared
        with shared.lock:
            if self._heard(camera):
                shared.scheduler.refuse(camera, reason)

    def latest(self, camera: str, max_age_s: float) -> Frame:
        """The newest frame of a camera, at most `max_age_s` old (0 = any age). Raises
        `RequestError` UNKNOWN_CAMERA, NO_FRAME, FRAME_TOO_OLD.
        """
        shared = self._shared
        with shared.lock:
            return shared.scheduler.mailbox(camera).latest(shared.clock(), max_age_s)

    def frame_at(self, camera: str, stamp_ns: int) -> Frame:
        """The camera's frame of that stamp. Raises `RequestError` UNKNOWN_CAMERA, NO_FRAME."""
        with self._shared.lock:
            return self._shared.scheduler.mailbox(camera).at(stamp_ns)

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

    def _heard(self, camera: str) -> bool:
        """Note a sign of life, with the lock held; false for a camera that was not declared."""
        shared = self._shared
        if camera not in shared.scheduler.mailboxes:
            shared.scheduler.refuse(camera, DropReason.UNKNOWN_CAMERA)
            return False
        now_ns = shared.clock()
        shared.meter.arrivals[camera].add(now_ns, 1.0)
        event = shared.watchdog.heard(camera, now_ns)
        if event is not None:
            shared.camera_events.append(event)
            shared.timer.notify_all()
        return True

    # -- requests on demand --------------------------------------------------------------------

    def submit(self, request: InferenceRequest, on_token: OnText | None = None) -> Future[Result]:
        """Ask once. The future always gives a `Result`, never raises: BUSY, NOT_ACTIVE,
        DEADLINE_EXCEEDED, TASK_NOT_SUPPORTED and so on are its `error`.

        Args:
            on_token: called with each new piece of text, on the model thread; not after the future
                is done.
        """
        shared = self._shared
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()  # Future.cancel() would leave the model working
        pending = PendingRequest(request, future, on_token)
        finished: list[PendingRequest] = []
        with shared.lock:
            refusal = self._refusal(request)
            if refusal is None:
                shared.queue.append(pending)
                shared.work.notify_all()
                shared.prefetch.notify_all()
                shared.timer.notify_all()
            else:
                finished = shared.finish([pending], refusal)
        shared.deliver(finished)
        return future

    def cancel(self, request_id: str) -> bool:
        """Give up a request: its future gives CANCELLED now, the model stops at its next token.
        False when no such request waits or runs.
        """
        shared = self._shared
        with shared.lock:
            meant = [
                pending
                for pending in shared.unfinished()
                if pending.request.request_id == request_id and not pending.standing
            ]
            finished = shared.finish(meant, cancelled(request_id))
        shared.deliver(finished)
        return bool(finished)

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
        if _expired(request, shared.clock()):
            return too_late(request.request_id)
        return busy(shared.config.queue_size) if shared.full else None


class TimerThread:
    """Ends requests that are past their deadline and reports silent cameras, however long the model
    takes. Sleeps until the next deadline or camera timeout; ends when the engine stops.
    """

    def __init__(self, shared: SharedState) -> None:
        self._shared = shared

    def run(self) -> None:
        """The thread's loop."""
        shared = self._shared
        while True:
            with shared.lock:
                finished, events = self._due()
                while not finished and not events:
                    if shared.stopped:
                        return
                    shared.timer.wait(self._wait_s())
                    finished, events = self._due()
            shared.deliver(finished)
            if shared.on_camera is not None:
                for event in events:
                    shared.call("on_camera", partial(shared.on_camera, event))
            del finished, events  # they hold frames: not while waiting for the next

    def _due(self) -> tuple[list[PendingRequest], list[CameraEvent]]:
        shared = self._shared
        now_ns = shared.clock()
        finished = [
            one
            for pending in shared.unfinished()
            if _expired(pending.request, now_ns)
            for one in shared.finish([pending], too_late(pending.request.request_id))
        ]
        events = [*shared.camera_events, *shared.watchdog.check(now_ns)]
        shared.camera_events.clear()
        return finished, events

    def _wait_s(self) -> float | None:
        shared = self._shared
        deadlines = [pending.request.deadline_ns for pending in shared.unfinished()]
        return shared.wait_s(*deadlines, shared.watchdog.next_ns())


def _expired(request: InferenceRequest, now_ns: int) -> bool:
    return request.deadline_ns is not None and now_ns >= request.deadline_ns
