"""Runs one batch; whatever the backend does, each request gets an answer or a coded error."""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
from collections.abc import Sequence

from librobot_vlm_ros.core import ErrorCode, ModelAnswer, VlmError, as_vlm_error
from librobot_vlm_ros.models.backend import VlmBackend
from librobot_vlm_ros.runtime.loader import forget_tracebacks, free_caches
from librobot_vlm_ros.runtime.pending_request import Outcome, PendingRequest

logger = logging.getLogger("librobot_vlm_ros.runtime")


@dataclasses.dataclass
class Run:
    """What came of a batch: one outcome per request, in order."""

    outcomes: list[Outcome]
    seconds: float
    ran_out_of_memory: bool

    @property
    def failure(self) -> VlmError | None:
        """The model's failure, when no request was served and one failed by the model's fault."""
        if self.served:
            return None
        for error in self.outcomes:
            if isinstance(error, VlmError) and _speaks_against_the_model(error):
                return error
        return None

    @property
    def served(self) -> bool:
        """Whether any request got an answer."""
        return any(isinstance(outcome, ModelAnswer) for outcome in self.outcomes)


def run_batch(backend: VlmBackend, batch: Sequence[PendingRequest]) -> Run:
    """Run requests as one batch; one that runs out of memory is run again one request at a time.

    Never raises. An exception of the backend becomes the error of all requests of the batch.
    """
    started = time.perf_counter()
    outcomes = _run(backend, batch)
    ran_out_of_memory = any(map(_is_out_of_memory, outcomes))
    if ran_out_of_memory:
        free_caches(backend)
        if len(batch) > 1:
            for index, pending in enumerate(batch):
                if not _is_out_of_memory(outcomes[index]) or pending.finished or pending.streamed:
                    continue
                outcomes[index] = _run(backend, [pending])[0]
                if _is_out_of_memory(outcomes[index]):
                    free_caches(backend)
    return Run(outcomes, time.perf_counter() - started, ran_out_of_memory)


def _speaks_against_the_model(error: VlmError) -> bool:
    """As opposed to against the request or its caller."""
    return int(error.code) // 100 in (3, 4) or error.code == ErrorCode.INTERNAL


def _is_out_of_memory(outcome: Outcome) -> bool:
    return isinstance(outcome, VlmError) and outcome.code == ErrorCode.OUT_OF_MEMORY


def _run(backend: VlmBackend, batch: Sequence[PendingRequest]) -> list[Outcome]:
    streaming = any(pending.on_text is not None for pending in batch)

    def on_token(index: int, text: str) -> None:
        pending = batch[index]
        if pending.on_text is None or pending.finished:
            return
        pending.streamed = True
        try:
            pending.on_text(text)
        except Exception:
            pending.on_text = None  # once is enough to know that nobody listens
            logger.exception("on_token of request %r failed", pending.request.request_id)

    def should_stop(index: int) -> bool:
        return batch[index].finished

    try:
        outcomes = list(
            backend.run(
                [pending.request for pending in batch],
                on_token=on_token if streaming else None,
                should_stop=should_stop,
            )
        )
    except BaseException as error:  # a library's panic is no Exception, and would end the thread
        # As text: a log record with the exception itself would hold the model's tensors.
        trace = traceback.format_exc()
        logger.error("model %s failed on %d requests:\n%s", backend.name, len(batch), trace)
        return [forget_tracebacks(as_vlm_error(error))] * len(batch)
    if len(outcomes) != len(batch):
        wrong = f"model {backend.name} gave {len(outcomes)} answers to {len(batch)} requests"
        return [_defect(wrong)] * len(batch)
    return [_checked(backend, outcome) for outcome in outcomes]


def _checked(backend: VlmBackend, outcome: object) -> Outcome:
    if isinstance(outcome, VlmError):
        return forget_tracebacks(outcome)
    if isinstance(outcome, ModelAnswer):
        return outcome
    return _defect(
        f"model {backend.name} answered with a {type(outcome).__name__}, "
        "expected ModelAnswer or VlmError"
    )


def _defect(what: str) -> VlmError:
    return VlmError(
        ErrorCode.INTERNAL,
        what,
        "This is a defect of that model's backend: please report it.",
    )
