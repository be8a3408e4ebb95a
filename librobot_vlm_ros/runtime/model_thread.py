"""The thread that owns the model: loads it, runs it, frees it, one thing after the other.

Loading comes first; which batch is run after it, `BatchSelector` chooses.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import cast

from librobot_vlm_ros.core import ModelAnswer, VlmError, as_vlm_error
from librobot_vlm_ros.models.backend import VlmBackend
from librobot_vlm_ros.runtime.batch_executor import Run, run_batch
from librobot_vlm_ros.runtime.batching import Batch, BatchPlanner, BatchSelector
from librobot_vlm_ros.runtime.config import to_ns
from librobot_vlm_ros.runtime.engine_state import SharedState
from librobot_vlm_ros.runtime.loader import ExtendedBackend, Loader, LoadJob, free_memory_of
from librobot_vlm_ros.runtime.pending_request import PendingRequest

logger = logging.getLogger("librobot_vlm_ros.runtime")

# Failures of the model in a row before `on_fatal`.
FATAL_AFTER = 3
MEASURE_MEMORY_EVERY_NS = to_ns(1.0)
# Preparing a frame takes milliseconds; a model is not kept from going by one that hangs.
PREPARING_S = 5.0


class ModelThread:
    """Runs until the engine stops; then frees the model and ends."""

    def __init__(self, shared: SharedState, loader: Loader) -> None:
        self._shared = shared
        self._loader = loader
        self._planner = BatchPlanner()
        self._selector = BatchSelector(shared, self._planner)
        self._memory_measured_ns = 0

    # -- the loop --------------------------------------------------------------------------

    def run(self) -> None:
        """The thread's loop."""
        shared = self._shared
        while True:
            with shared.lock:
                action = self._next()
                while action is None and not shared.stopped:
                    shared.idle.notify_all()
                    shared.work.wait(self._selector.wait_s())
                    action = self._next()
                if shared.stopped or action is None:
                    break
                if isinstance(action, LoadJob):
                    shared.load = action
                else:
                    shared.busy = True
            try:
                if isinstance(action, LoadJob):
                    self._load(action)
                else:
                    self._run(action)
            except BaseException as exc:  # a defect of ours must not take the node down
                self._survive(as_vlm_error(exc))
            del action  # it holds frames: not while waiting for the next
            with shared.lock:
                shared.load = None
                shared.busy = False
                shared.in_flight = []
                shared.idle.notify_all()
        self._end_prefetching()
        self._loader.unload()
        with shared.lock:
            self._show_model()

    def _next(self) -> LoadJob | Batch | None:
        shared = self._shared
        if shared.next_load is not None:
            job, shared.next_load = shared.next_load, None
            return job
        return self._selector.next_batch()

    # -- running batches, without the lock ---------------------------------------------------

    def _run(self, batch: Batch) -> None:
        shared, backend = self._shared, self._loader.backend
        assert backend is not None  # nothing is selected without a model
        most = shared.config.max_batch
        for start in range(0, len(batch.requests), most):
            part = [one for one in batch.requests[start : start + most] if not one.finished]
            if not part:
                continue
            with shared.lock:
                shared.meter.run_began(len(part), shared.clock())
                shared.prefetch.notify_all()
            run = run_batch(backend, part)
            self._account(batch, part, run, _frame_counts(backend))
            for pending, outcome in zip(part, run.outcomes, strict=True):
                with shared.lock:
                    finished = shared.finish([pending], outcome, len(part))
                shared.deliver(finished)

    def _account(
        self, batch: Batch, part: list[PendingRequest], run: Run, frame_counts: Mapping[str, int]
    ) -> None:
        """Learn from a run; after too many failures in a row pause the engine and say so."""
        shared, meter = self._shared, self._shared.meter
        answers = [outcome for outcome in run.outcomes if isinstance(outcome, ModelAnswer)]
        failure = run.failure
        fatal = False
        finished: list[PendingRequest] = []
        with shared.lock:
            now_ns = shared.clock()
            meter.run_ended(run.seconds, sum(one.generated_tokens for one in answers), now_ns)
            meter.frame_counts = frame_counts
            if run.ran_out_of_memory:
                self._planner.ran_out_of_memory(batch.kind, batch.frames, now_ns)
            elif batch.kind is not None and len(answers) == len(batch.requests):
                self._planner.took(batch.kind, batch.frames, run.seconds, now_ns)
            if failure is not None:
                meter.consecutive_failures += 1
                fatal = shared.running and meter.consecutive_failures >= FATAL_AFTER
            elif run.served:
                meter.consecutive_failures = 0
            if fatal:
                for pending, outcome in zip(part, run.outcomes, strict=True):
                    finished += shared.finish([pending], outcome, len(part))
                finished += shared.pause()
        if now_ns - self._memory_measured_ns > MEASURE_MEMORY_EVERY_NS:
            self._measure_memory(now_ns)
        shared.deliver(finished)
        if failure is not None and fatal:
            self._tell_fatal(failure)

    def _tell_fatal(self, error: VlmError) -> None:
        shared = self._shared
        logger.error(
            "the model failed %d times in a row; last: %s", shared.meter.consecutive_failures, error
        )
        if shared.on_fatal is not None:
            on_fatal = shared.on_fatal
            shared.call("on_fatal", lambda: on_fatal(error))

    def _measure_memory(self, now_ns: int) -> None:
        self._memory_measured_ns = now_ns
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

    # -- loading -----------------------------------------------------------------------------

    def _load(self, job: LoadJob) -> None:
        shared = self._shared

        def commit() -> bool:
            with shared.lock:
                job.settled = not job.cancelled
            return job.settled

        self._end_prefetching()
        error: VlmError | None = None
        try:
            report = self._loader.perform(job, commit)
        except BaseException as exc:
            error = as_vlm_error(exc)
        model_lost = False
        finished: list[PendingRequest] = []
        with shared.lock:
            had_model = shared.loaded is not None
            self._show_model()
            if error is None:
                self._planner.forget()
                shared.meter.another_model()
            else:
                shared.meter.failed(error, shared.clock())
                model_lost = had_model and shared.loaded is None and job.roll_back
                if model_lost:
                    finished = shared.pause()
            told = job.cancelled  # whoever cancelled it has failed the future
            job.settled = not told
            shared.load = None
        self._measure_memory(shared.clock())
        shared.deliver(finished)
        if error is None:
            job.future.set_result(report)
            return
        if not told:
            job.future.set_exception(error)
        if model_lost:
            self._tell_fatal(error)

    def _end_prefetching(self) -> None:
        """No frame is prepared from now on, and none is being prepared: the model may go."""
        shared = self._shared
        with shared.lock:
            shared.prepares = shared.sizes = None
            if not shared.idle.wait_for(lambda: not shared.preparing, PREPARING_S):
                logger.warning("the model is still preparing a frame after %g s", PREPARING_S)

    def _show_model(self) -> None:
        """Let everybody see which model there is now, with the lock held."""
        shared, report, backend = self._shared, self._loader.report, self._loader.backend
        shared.loaded = report
        more = cast(ExtendedBackend, backend)
        shared.prepares = more if getattr(backend, "prepares_ahead", False) else None
        shared.sizes = more if hasattr(backend, "input_size") else None
        shared.scheduler.set_supported(report.tasks if report is not None else None)

    def _survive(self, error: VlmError) -> None:
        logger.error("the engine failed: %s", error, exc_info=error.__cause__)
        shared = self._shared
        with shared.lock:
            shared.meter.run_abandoned()
            asked = [pending for pending in shared.in_flight if not pending.standing]
            finished = shared.finish(asked, error)
            for pending in shared.in_flight:
                pending.finished = True
            job = shared.load
            told = job is None or job.cancelled
        shared.deliver(finished)
        if job is not None and not told and not job.future.done():
            job.future.set_exception(error)


def _frame_counts(backend: VlmBackend) -> Mapping[str, int]:
    if not hasattr(backend, "frame_counts"):
        return {}
    try:
        return dict(cast(ExtendedBackend, backend).frame_counts())
    except Exception as error:
        logger.warning("the model cannot tell its counts: %s", as_vlm_error(error))
        return {}
