"""What the engine's two threads and its callers share, under one lock.

Rules that keep it simple: one lock with three conditions; nobody calls out (callbacks, futures, the
backend) while holding it; a ticket is ended under the lock by whoever is first, and completed
outside it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from librobot_vlm_ros.core import (
    EngineError,
    ErrorCode,
    Frame,
    ModelAnswer,
    ModelError,
    Result,
    VlmError,
    as_vlm_error,
)
from librobot_vlm_ros.runtime.config import EngineConfig, EngineState
from librobot_vlm_ros.runtime.loader import LoadJob, LoadReport, UnloadJob, load_cancelled
from librobot_vlm_ros.runtime.requests import RequestQueue, Ticket, not_active, shutting_down
from librobot_vlm_ros.runtime.results import make_result
from librobot_vlm_ros.runtime.scheduler import Scheduler
from librobot_vlm_ros.runtime.stats import Meter
from librobot_vlm_ros.runtime.watchdog import CameraEvent, Watchdog

if TYPE_CHECKING:
    from librobot_vlm_ros.runtime.prefetch import KnowsInputSize, PreparesFrames

logger = logging.getLogger("librobot_vlm_ros.runtime")

OnResult = Callable[[Result, Frame], None]
OnFatal = Callable[[VlmError], None]
OnCamera = Callable[[CameraEvent], None]


@dataclass(frozen=True)
class Ended:
    """A result that is settled and has to be told: to the future, or to `on_result` when there is
    none.
    """

    result: Result
    frame: Frame
    future: Future[Result] | None = None


class Shared:
    """The engine's state. Methods that say so are called with `lock` held."""

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
        self.ahead = threading.Condition(self.lock)  # the thread that prepares frames waits here
        self.idle = threading.Condition(self.lock)  # callers wait here for a run to end
        self.config = config
        self.clock = clock
        self.on_result = on_result
        self.on_fatal = on_fatal
        self.on_camera = on_camera
        self.scheduler = Scheduler(config)
        self.queue = RequestQueue(config.queue_size)
        self.meter = Meter(config.stats_window_s)
        self.watchdog = Watchdog()
        self.running = False
        self.stopped = False
        self.loaded: LoadReport | None = None  # the model itself belongs to its thread alone,
        self.prepares: PreparesFrames | None = None  # except for preparing frames
        self.sizes: KnowsInputSize | None = None  # and for its input size
        self.preparing = False  # the ahead thread is in the model
        self.frames_at_once = 1  # in the last batch of standing tasks
        self.jobs: deque[LoadJob | UnloadJob] = deque()
        self.job: LoadJob | UnloadJob | None = None
        self.in_flight: list[Ticket] = []
        self.busy = False  # the model thread runs a batch or tells its results
        self.events: deque[CameraEvent] = deque()

    # -- with the lock held ----------------------------------------------------------------

    def load_in_progress(self) -> LoadJob | None:
        """The load or switch that is wanted and not done."""
        for job in (self.job, *self.jobs):
            if isinstance(job, LoadJob) and not job.cancelled:
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

    def waiting_tickets(self) -> list[Ticket]:
        """Those that nobody has answered yet."""
        unended = (ticket for ticket in self.in_flight if not ticket.ended)
        return [*self.queue.tickets(), *unended]

    def end(
        self,
        tickets: Iterable[Ticket],
        outcome: ModelAnswer | VlmError,
        batch_size: int = 1,
    ) -> list[Ended]:
        """Settle these, unless somebody was first. Pass what comes back to `complete`, without the
        lock.
        """
        now_ns = self.clock()
        fresh = [ticket for ticket in tickets if not ticket.ended]
        self.queue.take(fresh)
        ended = []
        for ticket in fresh:
            ticket.ended = True
            result = make_result(
                ticket.request,
                outcome,
                model=self.loaded,
                now_ns=now_ns,
                batch_size=batch_size,
            )
            camera = ticket.request.frame.camera
            known = camera if camera in self.scheduler.mailboxes else ""
            self.meter.delivered(known, outcome, result.info.age_s, now_ns)
            ended.append(Ended(result, ticket.request.frame, ticket.future))
        return ended

    def hold(self, error: EngineError | None = None) -> list[Ended]:
        """Take no more work, give up what there is. The result goes to `complete`.

        What a standing task was doing is dropped without a word: it was not asked for by anybody in
        particular.
        """
        if error is None:
            error = shutting_down() if self.stopped else not_active("paused")
        self.running = False
        for ticket in self.in_flight:
            if ticket.standing:
                ticket.ended = True
        ended = self.end(self.waiting_tickets(), error)
        self.scheduler.hold()
        self.watchdog.pause()
        self.wake()
        return ended

    def cancel_loads(self, *, roll_back: bool) -> list[LoadJob]:
        """Give up loads; pass them to `fail_loads`, without the lock."""
        given_up = []
        for job in (self.job, *self.jobs):
            if isinstance(job, LoadJob):
                job.roll_back = job.roll_back and roll_back
                if not job.settled and not job.cancelled:
                    job.cancelled = True
                    given_up.append(job)
        self.jobs = deque(
            job for job in self.jobs if not (isinstance(job, LoadJob) and job.cancelled)
        )
        return given_up

    def wake(self) -> None:
        """Something changed that anybody may wait for."""
        self.work.notify_all()
        self.timer.notify_all()
        self.ahead.notify_all()
        self.idle.notify_all()

    # -- without the lock ------------------------------------------------------------------

    def complete(self, ended: Iterable[Ended]) -> None:
        """Tell results to whom they are for."""
        for item in ended:
            if item.future is not None:
                item.future.set_result(item.result)
            elif self.on_result is not None:
                self.call("on_result", partial(self.on_result, item.result, item.frame))

    def fail_loads(self, jobs: Iterable[LoadJob], error: VlmError | None = None) -> None:
        """Tell those who wait for a load that was given up."""
        for job in jobs:
            job.future.set_exception(error or load_cancelled(job.name))

    def call(self, name: str, callback: Callable[[], None]) -> None:
        """Call out; an exception there is logged and counted and goes no further."""
        try:
            callback()
        except Exception as exc:
            logger.exception("%s failed", name)
            with self.lock:
                self.meter.failed(as_vlm_error(exc), self.clock())


def no_model() -> ModelError:
    """Nothing is loaded."""
    return ModelError(
        ErrorCode.MODEL_NOT_LOADED, "no model is loaded", "Configure the node, or load one."
    )
