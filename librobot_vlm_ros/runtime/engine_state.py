"""What the engine's threads and its callers share, under one lock.

Rules that keep it simple: one lock with four conditions; nobody calls out (callbacks, futures, the
backend) while holding it; a request is finished under the lock by whoever is first, and its result
delivered outside it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from librobot_vlm_ros.core import EngineError, Frame, Result, VlmError, as_vlm_error
from librobot_vlm_ros.runtime.config import EngineConfig, EngineState, to_s
from librobot_vlm_ros.runtime.loader import ExtendedBackend, LoadJob, LoadReport
from librobot_vlm_ros.runtime.pending_request import (
    Outcome,
    PendingRequest,
    make_result,
    not_active,
    shutting_down,
)
from librobot_vlm_ros.runtime.scheduler import Scheduler
from librobot_vlm_ros.runtime.stats import CameraStats, EngineStats, Meter, percentile
from librobot_vlm_ros.runtime.watchdog import CameraEvent, Watchdog

logger = logging.getLogger("librobot_vlm_ros.runtime")

LONGEST_WAIT_S = 3600.0  # a condition cannot wait for ever and a day

OnResult = Callable[[Result, Frame], None]
OnFatal = Callable[[VlmError], None]
OnCamera = Callable[[CameraEvent], None]


class SharedState:
    """The engine's state; where it stands, as one word, is `EngineState`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        clock: Callable[[], int],
        on_result: OnResult | None,
        on_fatal: OnFatal | None,
        on_camera: OnCamera | None,
    ) -> None:
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)  # the model thread waits here
        self.timer = threading.Condition(self.lock)  # the timer thread waits here
        self.prefetch = threading.Condition(self.lock)  # the prefetch thread waits here
        self.idle = threading.Condition(self.lock)  # callers wait here for a run to end
        self.config = config
        self.clock = clock
        self.on_result = on_result
        self.on_fatal = on_fatal
        self.on_camera = on_camera
        self.scheduler = Scheduler(config)
        self.meter = Meter()
        self.watchdog = Watchdog()
        self.running = False
        self.stopped = False
        self.loaded: LoadReport | None = None  # the model itself belongs to its thread alone,
        self.prepares: ExtendedBackend | None = None  # except for preparing frames
        self.sizes: ExtendedBackend | None = None  # and for its input size
        self.preparing = False  # the prefetch thread is in the model
        self.next_load: LoadJob | None = None
        self.load: LoadJob | None = None  # in work
        self.queue: list[PendingRequest] = []  # on-demand requests that wait, oldest first
        self.in_flight: list[PendingRequest] = []
        self.frames_at_once = 1  # in the last batch of standing tasks
        self.busy = False  # the model thread runs a batch or delivers its results
        self.camera_events: deque[CameraEvent] = deque()

    # -- with the lock held ----------------------------------------------------------------

    def load_in_progress(self) -> LoadJob | None:
        """The load that is wanted and not done."""
        for job in (self.load, self.next_load):
            if job is not None and not job.cancelled:
                return job
        return None

    def state(self) -> EngineState:
        """Follows from the flags; there is no second copy to disagree."""
        if self.stopped:
            return EngineState.STOPPED
        if self.load_in_progress() is not None:
            return EngineState.LOADING
        if self.running:
            return EngineState.RUNNING
        return EngineState.UNLOADED if self.loaded is None else EngineState.PAUSED

    @property
    def full(self) -> bool:
        """Whether the next on-demand request is refused as BUSY."""
        return len(self.queue) >= self.config.queue_size

    def unfinished(self) -> list[PendingRequest]:
        """Requests that nobody has answered yet."""
        return self.queue + [pending for pending in self.in_flight if not pending.finished]

    def dequeue(self, requests: Iterable[PendingRequest]) -> None:
        """These wait no more: they have begun, or have finished without beginning."""
        gone = set(requests)
        self.queue = [pending for pending in self.queue if pending not in gone]

    def finish(
        self, requests: Iterable[PendingRequest], outcome: Outcome, batch_size: int = 1
    ) -> list[PendingRequest]:
        """Settle these, unless somebody was first. `deliver` what comes back, without the lock."""
        now_ns = self.clock()
        fresh = [pending for pending in requests if not pending.finished]
        self.dequeue(fresh)
        for pending in fresh:
            pending.finished = True
            pending.result = result = make_result(
                pending.request, outcome, model=self.loaded, now_ns=now_ns, batch_size=batch_size
            )
            camera = result.info.camera
            known = camera if camera in self.scheduler.mailboxes else ""
            self.meter.delivered(known, outcome, result.info.age_s, now_ns)
        return fresh

    def pause(self, error: EngineError | None = None) -> list[PendingRequest]:
        """Take no more work, give up what there is. The results go to `deliver`.

        What a standing task was doing is dropped without a word: it was not asked for by anybody in
        particular.
        """
        if error is None:
            error = shutting_down() if self.stopped else not_active("paused")
        self.running = False
        for pending in self.in_flight:
            if pending.standing:
                pending.finished = True
        finished = self.finish(self.unfinished(), error)
        self.scheduler.pause()
        self.watchdog.pause()
        self.wake_all()
        return finished

    def cancel_load(self, *, roll_back: bool) -> LoadJob | None:
        """Give up the load that is wanted; its future is for the caller to fail, without the lock.

        None when there is none, or when it is settled already.
        """
        for job in (self.load, self.next_load):
            if job is not None:
                job.roll_back = job.roll_back and roll_back
        job = self.load_in_progress()
        if job is None or job.settled:
            return None
        job.cancelled = True
        self.next_load = None
        return job

    def wait_s(self, *at_ns: int | None) -> float | None:
        """Seconds until the first of these times, as a condition takes them; None for no time."""
        times = [at for at in at_ns if at is not None]
        if not times:
            return None
        return min(LONGEST_WAIT_S, max(0.0, to_s(min(times) - self.clock())))

    def wake_all(self) -> None:
        """Something changed that anybody may wait for."""
        self.work.notify_all()
        self.timer.notify_all()
        self.prefetch.notify_all()
        self.idle.notify_all()

    def stats(self) -> EngineStats:
        """The engine's health as one frozen picture."""
        now_ns = self.clock()
        meter, scheduler, watchdog, model = self.meter, self.scheduler, self.watchdog, self.loaded
        mailboxes = scheduler.mailboxes
        ages = {name: window.values(now_ns) for name, window in meter.ages.items()}
        all_ages = [age for of_camera in ages.values() for age in of_camera]
        times = meter.times.values(now_ns)
        cameras = {
            name: CameraStats(
                received=box.received,
                processed=box.processed,
                dropped={reason.value: count for reason, count in box.dropped.items()},
                stale=watchdog.cameras[name].stale,
                silent_s=watchdog.cameras[name].silent_s(now_ns),
                rate_hz=meter.arrivals[name].rate_hz(now_ns),
                age_p50_s=percentile(ages.get(name, ()), 50),
                age_p99_s=percentile(ages.get(name, ()), 99),
            )
            for name, box in mailboxes.items()
        }
        return EngineStats(
            state=self.state(),
            model=model.model if model is not None else "",
            revision=model.revision if model is not None else "",
            device=model.device if model is not None else "",
            dtype=model.dtype if model is not None else "",
            frames_received=scheduler.unknown_frames + sum(b.received for b in mailboxes.values()),
            frames_processed=sum(box.processed for box in mailboxes.values()),
            dropped=scheduler.drops(),
            results=meter.results,
            errors=dict(meter.errors),
            age_p50_s=percentile(all_ages, 50),
            age_p99_s=percentile(all_ages, 99),
            inference_p50_s=percentile(times, 50),
            inference_p99_s=percentile(times, 99),
            tokens_per_s=meter.tokens_per_s(now_ns),
            queue_depth=len(self.queue),
            in_flight=meter.in_flight,
            busy_s=_seconds_since(meter.run_started_ns, now_ns, never=0.0),
            memory_bytes=meter.memory_bytes,
            free_bytes=meter.free_bytes,
            features_shared=meter.frame_counts.get("hits", 0),
            features_computed=meter.frame_counts.get("misses", 0),
            prepared_ahead=meter.frame_counts.get("ahead", 0),
            last_error="" if meter.last_error is None else str(meter.last_error),
            last_error_age_s=_seconds_since(meter.last_error_ns, now_ns, never=math.nan),
            idle_tasks=scheduler.idle,
            cameras=cameras,
        )

    # -- without the lock ------------------------------------------------------------------

    def deliver(self, finished: Iterable[PendingRequest]) -> None:
        """Hand results to whom they are for: the future, or `on_result` when there is none."""
        for pending in finished:
            result = pending.result
            assert result is not None  # `finish` has made one
            if pending.future is not None:
                pending.future.set_result(result)
            elif self.on_result is not None:
                self.call("on_result", partial(self.on_result, result, pending.request.frame))

    def call(self, name: str, callback: Callable[[], None]) -> None:
        """Call out; an exception there is logged and counted and goes no further."""
        try:
            callback()
        except Exception as exc:
            logger.exception("%s failed", name)
            with self.lock:
                self.meter.failed(as_vlm_error(exc), self.clock())


def _seconds_since(start_ns: int | None, now_ns: int, *, never: float) -> float:
    return never if start_ns is None else max(0.0, to_s(now_ns - start_ns))
