"""One piece of work and its way to an end: exactly one result, whoever ends it first.

Not thread-safe: the engine's lock guards tickets and queue. Futures are completed outside that
lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from librobot_vlm_ros.core import (
    EngineError,
    ErrorCode,
    InferenceRequest,
    Result,
    VlmError,
)

OnText = Callable[[str], None]


class Ticket:
    """A request on its way through the engine.

    `ended` turns true once, under the engine's lock, by whoever settles the outcome: the model's
    answer, a cancellation, a deadline, a pause. From then on the model is told to stop at its next
    token and whatever it still says is thrown away.
    """

    def __init__(
        self,
        request: InferenceRequest,
        *,
        future: Future[Result] | None = None,
        on_text: OnText | None = None,
        max_frame_age_s: float = 0.0,
    ) -> None:
        self.request = request
        self.future = future
        self.on_text = on_text
        self.max_frame_age_s = max_frame_age_s
        self.ended = False
        self.texts_sent = 0

    @property
    def standing(self) -> bool:
        """Whether it comes from a standing task (its result goes to `on_result`)."""
        return self.future is None

    def expired(self, now_ns: int) -> bool:
        """Whether its deadline has passed (steady clock)."""
        deadline_ns = self.request.deadline_ns
        return deadline_ns is not None and now_ns >= deadline_ns


class RequestQueue:
    """On-demand requests that wait, oldest first, bounded."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._waiting: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether the next one is refused."""
        return len(self._waiting) >= self.size

    def put(self, ticket: Ticket) -> None:
        """Wait in line."""
        self._waiting.append(ticket)

    def head(self) -> Ticket | None:
        """The one that waits longest."""
        return self._waiting[0] if self._waiting else None

    def take(self, tickets: list[Ticket]) -> None:
        """These have begun, or have ended without beginning."""
        gone = {id(ticket) for ticket in tickets}
        self._waiting = deque(ticket for ticket in self._waiting if id(ticket) not in gone)

    def tickets(self) -> list[Ticket]:
        """Those that wait, oldest first."""
        return list(self._waiting)


def busy(size: int) -> EngineError:
    """The queue is full."""
    return EngineError(
        ErrorCode.BUSY,
        f"{size} requests wait already",
        "Ask again later, less often, or raise queue_size.",
    )


def cancelled(request_id: str) -> EngineError:
    """Somebody cancelled it."""
    return EngineError(ErrorCode.CANCELLED, f"request {request_id!r} was cancelled")


def too_late(request_id: str) -> EngineError:
    """Its deadline passed."""
    return EngineError(
        ErrorCode.DEADLINE_EXCEEDED,
        f"request {request_id!r} was not answered before its deadline",
        "Allow more time, ask for fewer tokens (max_new_tokens), or use a smaller model.",
    )


def not_active(state: str) -> EngineError:
    """The engine does not run."""
    return EngineError(
        ErrorCode.NOT_ACTIVE,
        f"the engine is {state}, not running",
        "Activate the node and ask again.",
    )


def shutting_down() -> EngineError:
    """The engine ends."""
    return EngineError(ErrorCode.SHUTTING_DOWN, "the engine is shutting down")


def is_model_failure(error: VlmError) -> bool:
    """Does this error speak against the model, as opposed to the request or its caller?"""
    return int(error.code) // 100 in (3, 4) or error.code == ErrorCode.INTERNAL
