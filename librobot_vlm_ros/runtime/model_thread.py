"""The thread that owns the model: loads it, runs it, frees it, one thing after the other.

Loading and freeing come first; what is run after them, `selection` chooses.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from librobot_vlm_ros.core import (
    ModelAnswer,
    VlmError,
    as_vlm_error,
)
from librobot_vlm_ros.models.backend import VlmBackend
from librobot_vlm_ros.runtime.batch_executor import Run, run_batch
from librobot_vlm_ros.runtime.batching import BatchPlanner
from librobot_vlm_ros.runtime.config import to_ns
from librobot_vlm_ros.runtime.engine_state import Ended, Shared, no_model
from librobot_vlm_ros.runtime.loader import Loader, LoadJob, UnloadJob, free_memory_of
from librobot_vlm_ros.runtime.prefetch import CountsFrames, KnowsInputSize, PreparesFrames
from librobot_vlm_ros.runtime.requests import Ticket
from librobot_vlm_ros.runtime.selection import Batch, Selector

logger = logging.getLogger("librobot_vlm_ros.runtime")

MEMORY_LOOK_NS = to_ns(1.0)
# Preparing a frame takes milliseconds; a model is not kept from going by one that hangs.
PREPARING_S = 5.0


class ModelThread:
    """Runs until the engine stops; then frees the model and ends."""

    def __init__(self, shared: Shared, loader: Loader) -> None:
        self._shared = shared
        self._loader = loader
        self._planner = BatchPlanner()
        self._selector = Selector(shared, self._planner)
        self._memory_seen_ns = 0
        self.thread = threading.Thread(target=self._main, name="vlm-model", daemon=True)

    # -- the loop --------------------------------------------------------------------------

    def _main(self) -> None:
        shared = self._shared
        while True:
            with shared.lock:
                action = self._next()
                while action is None and not shared.stopped:
                    shared.idle.notify_all()
                    shared.work.wait(self._selector.wait_s())
                    action = self._next()
                if shared.stopped:
                    break
                if isinstance(action, Batch):
                    shared.busy = True
                else:
                    shared.job = action
            try:
                if isinstance(action, LoadJob):
                    self._load(action)
                elif isinstance(action, UnloadJob):
                    self._unload(action)
                elif isinstance(action, Batch):
                    self._run(action)
            except BaseException as exc:  # a defect of ours must not take the node down
                self._survive(as_vlm_error(exc))
            del action  # it holds frames: not while waiting for the next
            with shared.lock:
                shared.job = None
                shared.busy = False
                shared.in_flight = []
                shared.idle.notify_all()
        self._have_it_alone()
        self._loader.unload()
        with shared.lock:
            self._show_model()
            shared.scheduler.clear()

    def _next(self) -> LoadJob | UnloadJob | Batch | None:
        jobs = self._shared.jobs
        return jobs.popleft() if jobs else self._selector.take()

    # -- doing, without the lock -------------------------------------------------------------

    def _run(self, batch: Batch) -> None:
        shared = self._shared
        shared.complete(batch.refused)
        backend = self._loader.backend
        if backend is None:
            with shared.lock:
                ended = shared.end(batch.tickets, no_model())
            shared.complete(ended)
            return
        most = shared.config.max_batch
        for start in range(0, len(batch.tickets), most):
            tickets = [ticket for ticket in batch.tickets[start : start + most] if not ticket.ended]
            if not tickets:
                continue
            with shared.lock:
                shared.meter.run_began(len(tickets), shared.clock())
                shared.ahead.notify_all()
            run = run_batch(backend, tickets)
            self._account(batch, tickets, run, _frame_counts(backend))
            for ticket, outcome in zip(tickets, run.outcomes, strict=True):
                with shared.lock:
                    ended = shared.end([ticket], outcome, run.batch_size)
                shared.complete(ended)

    def _account(
        self, batch: Batch, tickets: list[Ticket], run: Run, frame_counts: Mapping[str, int]
    ) -> None:
        shared = self._shared
        answers = [outcome for outcome in run.outcomes if isinstance(outcome, ModelAnswer)]
        fatal: VlmError | None = None
        ended: list[Ended] = []
        with shared.lock:
            now_ns = shared.clock()
            tokens = sum(answer.generated_tokens for answer in answers)
            shared.meter.run_ended(run.seconds, tokens, now_ns)
            shared.meter.frame_counts = frame_counts
            if run.ran_out_of_memory:
                self._planner.ran_out_of_memory(batch.kind, batch.frames, now_ns)
            elif batch.kind is not None and len(answers) == len(batch.tickets):
                self._planner.took(batch.kind, batch.frames, run.seconds, now_ns)
            failure = run.failure
            if failure is not None:
                shared.meter.consecutive_failures += 1
            elif run.served:
                shared.meter.consecutive_failures = 0
            if failure is not None and (
                shared.meter.consecutive_failures >= shared.config.fatal_after and shared.running
            ):
                fatal = failure
                for ticket, outcome in zip(tickets, run.outcomes, strict=True):
                    ended += shared.end([ticket], outcome, run.batch_size)
                ended += shared.hold()
        if now_ns - self._memory_seen_ns > MEMORY_LOOK_NS:
            self._look_at_memory(now_ns)
        shared.complete(ended)
        if fatal is not None:
            self._tell_fatal(fatal)

    def _tell_fatal(self, error: VlmError) -> None:
        shared = self._shared
        logger.error(
            "the model failed %d times in a row; last: %s", shared.meter.consecutive_failures, error
        )
        if shared.on_fatal is not None:
            on_fatal = shared.on_fatal
            shared.call("on_fatal", lambda: on_fatal(error))

    def _look_at_memory(self, now_ns: int) -> None:
        self._memory_seen_ns = now_ns
        backend = self._loader.backend
        try:
            held = backend.memory_bytes() if backend is not None else 0
            free = free_memory_of(backend) if backend is not None else None
        except Exception as exc:
            logger.warning("the model cannot tell its memory: %s", as_vlm_error(exc))
            return
        with self._shared.lock:
            self._shared.meter.memory_bytes = held
            self._shared.meter.free_bytes = free

    # -- loading and freeing -----------------------------------------------------------------

    def _load(self, job: LoadJob) -> None:
        shared = self._shared

        def commit() -> bool:
            with shared.lock:
                job.settled = not job.cancelled
            return job.settled

        self._have_it_alone()
        error: VlmError | None = None
        try:
            report = self._loader.perform(job, commit)
        except BaseException as exc:
            error = as_vlm_error(exc)
        fatal: VlmError | None = None
        ended: list[Ended] = []
        with shared.lock:
            had_model = shared.loaded is not None
            self._show_model()
            if error is None:
                shared.meter.consecutive_failures = 0
                self._planner.forget()
                shared.meter.another_model()
            elif had_model and shared.loaded is None and job.roll_back:
                fatal = error
                ended = shared.hold()
            if error is not None:
                shared.meter.failed(error, shared.clock())
            told = job.cancelled  # whoever cancelled it has told the future
            job.settled = not told
            shared.job = None
        self._look_at_memory(shared.clock())
        shared.complete(ended)
        if error is None:
            job.future.set_result(report)
        elif not told:
            job.future.set_exception(error)
        if fatal is not None:
            self._tell_fatal(fatal)

    def _unload(self, job: UnloadJob) -> None:
        shared = self._shared
        self._have_it_alone()
        self._loader.unload()
        with shared.lock:
            self._show_model()
            shared.scheduler.clear()
            shared.meter.consecutive_failures = 0
            self._planner.forget()
            shared.meter.another_model()
            shared.job = None
        self._look_at_memory(shared.clock())
        job.future.set_result(None)

    def _have_it_alone(self) -> None:
        """No frame is prepared from now on, and none is being prepared."""
        shared = self._shared
        with shared.lock:
            shared.prepares = shared.sizes = None
            if not shared.idle.wait_for(lambda: not shared.preparing, PREPARING_S):
                logger.warning("the model is still preparing a frame after %g s", PREPARING_S)

    def _show_model(self) -> None:
        report, backend = self._loader.report, self._loader.backend
        self._shared.loaded = report
        self._shared.prepares = _preparing(backend)
        self._shared.sizes = backend if isinstance(backend, KnowsInputSize) else None
        self._shared.scheduler.set_supported(report.tasks if report is not None else None)

    def _survive(self, error: VlmError) -> None:
        logger.error("the engine failed: %s", error, exc_info=error.__cause__)
        shared = self._shared
        with shared.lock:
            shared.meter.run_abandoned()
            ended = shared.end([t for t in shared.in_flight if not t.standing], error)
            for ticket in shared.in_flight:
                ticket.ended = True
            job = shared.job
            told = job is None or (isinstance(job, LoadJob) and job.cancelled)
        shared.complete(ended)
        if job is not None and not told and not job.future.done():
            job.future.set_exception(error)


def _frame_counts(backend: VlmBackend) -> Mapping[str, int]:
    if not isinstance(backend, CountsFrames):
        return {}
    try:
        return dict(backend.frame_counts())
    except Exception as error:
        logger.warning("the model cannot tell its counts: %s", as_vlm_error(error))
        return {}


def _preparing(backend: object) -> PreparesFrames | None:
    if isinstance(backend, PreparesFrames) and backend.prepares_ahead:
        return backend
    return None
