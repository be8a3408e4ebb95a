"""Runs one batch on a backend so that whatever the backend does, each request gets an answer or a
coded error.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from librobot_vlm_ros.core import (
    ErrorCode,
    ModelAnswer,
    VlmError,
    as_vlm_error,
)
from librobot_vlm_ros.models.backend import VlmBackend
from librobot_vlm_ros.runtime.garbage import collect
from librobot_vlm_ros.runtime.requests import Ticket, is_model_failure

logger = logging.getLogger("librobot_vlm_ros.runtime")

Outcome = ModelAnswer | VlmError


@runtime_checkable
class FreesCaches(Protocol):
    """A backend that can give back memory which it keeps between requests."""

    def free_caches(self) -> None:
        """Drop caches; the next request is slower, its answer the same."""


@dataclasses.dataclass
class Run:
    """What came of a batch: one outcome per ticket, in order."""

    outcomes: list[Outcome]
    seconds: float
    batch_size: int
    ran_out_of_memory: bool = False

    @property
    def failure(self) -> VlmError | None:
        """The model's failure when no request of the batch was served and one failed for the
        model's sake.
        """
        failed = [outcome for outcome in self.outcomes if isinstance(outcome, VlmError)]
        if len(failed) < len(self.outcomes):
            return None
        return next((error for error in failed if is_model_failure(error)), None)

    @property
    def served(self) -> bool:
        """Whether any request got an answer."""
        return any(isinstance(outcome, ModelAnswer) for outcome in self.outcomes)


def run_batch(
    backend: VlmBackend,
    tickets: Sequence[Ticket],
    *,
    counter: Callable[[], float] = time.perf_counter,
) -> Run:
    """Run `tickets` as one batch; one that runs out of memory is run again one request at a time.

    Never raises. An exception of the backend becomes the error of all requests of the batch.
    """
    started = counter()
    outcomes = _run(backend, tickets)
    run = Run(outcomes, 0.0, len(tickets))
    run.ran_out_of_memory = any(map(_is_out_of_memory, outcomes))
    if run.ran_out_of_memory:
        free_memory(backend)
        if len(tickets) > 1:
            for index, ticket in enumerate(tickets):
                if not _is_out_of_memory(outcomes[index]) or ticket.ended or ticket.texts_sent:
                    continue
                outcomes[index] = _run(backend, [ticket])[0]
                if _is_out_of_memory(outcomes[index]):
                    free_memory(backend)
    run.seconds = counter() - started
    return run


def forget_frames(error: VlmError) -> VlmError:
    """`error` without the tracebacks in its chain: they would keep models and tensors alive as long
    as somebody holds the error (statistics keep the last one).
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def free_memory(backend: object) -> None:
    """Give back what can be given back; errors are logged, not raised."""
    if isinstance(backend, FreesCaches):
        try:
            backend.free_caches()
        except Exception as error:
            logger.error("freeing the model's caches failed: %s", as_vlm_error(error))
    collect()


def _is_out_of_memory(outcome: Outcome) -> bool:
    return isinstance(outcome, VlmError) and outcome.code == ErrorCode.OUT_OF_MEMORY


def _run(backend: VlmBackend, tickets: Sequence[Ticket]) -> list[Outcome]:
    streaming = any(ticket.on_text is not None for ticket in tickets)

    def on_token(index: int, text: str) -> None:
        ticket = tickets[index]
        if ticket.on_text is None or ticket.ended:
            return
        ticket.texts_sent += 1
        try:
            ticket.on_text(text)
        except Exception:
            ticket.on_text = None  # once is enough to know that nobody listens
            logger.exception("on_token of request %r failed", ticket.request.request_id)

    def should_stop(index: int) -> bool:
        return tickets[index].ended

    try:
        outcomes = list(
            backend.run(
                [ticket.request for ticket in tickets],
                on_token=on_token if streaming else None,
                should_stop=should_stop,
            )
        )
    except BaseException as error:  # a library's panic is no Exception, and would end the thread
        # As text: a log record with the exception itself would hold the model's tensors.
        trace = traceback.format_exc()
        logger.error("model %s failed on %d requests:\n%s", backend.name, len(tickets), trace)
        return [forget_frames(as_vlm_error(error))] * len(tickets)
    if len(outcomes) != len(tickets):
        error_ = VlmError(
            ErrorCode.INTERNAL,
            f"model {backend.name} gave {len(outcomes)} answers to {len(tickets)} requests",
            "This is a defect of that model's backend: please report it.",
        )
        return [error_] * len(tickets)
    return [_checked(backend, outcome) for outcome in outcomes]


def _checked(backend: VlmBackend, outcome: object) -> Outcome:
    if isinstance(outcome, VlmError):
        return forget_frames(outcome)
    if isinstance(outcome, ModelAnswer):
        return outcome
    return VlmError(
        ErrorCode.INTERNAL,
        f"model {backend.name} answered with a {type(outcome).__name__}, "
        "expected ModelAnswer or VlmError",
        "This is a defect of that model's backend: please report it.",
    )
