"""Chooses what the model runs next: on-demand requests first, but never so long that standing tasks
starve.

While a standing task waits, no more than `requests_before_standing` on-demand batches go before it,
so that a flood of requests does not blind the robot. Everything here is called with the engine's
lock held.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from librobot_vlm_ros.core import ErrorCode, InferenceRequest, RequestError
from librobot_vlm_ros.runtime.batching import BatchPlanner, companions, kind_of
from librobot_vlm_ros.runtime.config import to_s
from librobot_vlm_ros.runtime.engine_state import Ended, Shared
from librobot_vlm_ros.runtime.requests import Ticket
from librobot_vlm_ros.runtime.results import make_refusal
from librobot_vlm_ros.runtime.scheduler import Work

LONGEST_WAIT_S = 3600.0  # a condition cannot wait for ever and a day


@dataclass
class Batch:
    """Requests to run now, and refusals found while making them."""

    tickets: list[Ticket]
    refused: list[Ended]
    kind: Hashable = None
    """Set where its time teaches the planner something."""
    frames: int = 1


class Selector:
    """Makes batches of what waits."""

    def __init__(self, shared: Shared, planner: BatchPlanner) -> None:
        self._shared = shared
        self._planner = planner
        self._requests_in_a_row = 0
        self._standing_made = 0

    def take(self) -> Batch | None:
        """The next batch, which counts as begun; None when there is nothing to run now."""
        shared = self._shared
        if not shared.running or shared.loaded is None:
            return None
        now_ns = shared.clock()
        standing = shared.scheduler.anything(now_ns)
        turn = self._requests_in_a_row < shared.config.requests_before_standing
        if len(shared.queue) and (turn or not standing):
            self._requests_in_a_row = self._requests_in_a_row + 1 if standing else 0
            return self._requests(now_ns)
        self._requests_in_a_row = 0
        return self._standing(now_ns) if standing else None

    def wait_s(self) -> float | None:
        """Seconds until something that is here becomes due; None = not before something comes."""
        shared = self._shared
        if not shared.running or shared.loaded is None:
            return None
        now_ns = shared.clock()
        due_ns = shared.scheduler.next_due_ns(now_ns)
        return None if due_ns is None else min(LONGEST_WAIT_S, max(0.0, to_s(due_ns - now_ns)))

    def _requests(self, now_ns: int) -> Batch:
        shared = self._shared
        waiting = shared.queue.tickets()
        kind = kind_of(waiting[0])
        most = shared.config.max_batch
        chosen = companions(waiting, frames=self._planner.frames(kind, most, now_ns), most=most)
        old = [ticket for ticket in chosen if _too_old(ticket, now_ns)]
        refused = [
            ended
            for ticket in old
            for ended in shared.end([ticket], _frame_too_old(ticket, now_ns))
        ]
        begun = [ticket for ticket in chosen if not ticket.ended]
        shared.queue.take(begun)
        shared.in_flight = begun
        frames = len({id(ticket.request.frame) for ticket in begun})
        simple = frames == len(begun) and all(kind_of(ticket) == kind for ticket in begun)
        return Batch(begun, refused, kind if simple else None, frames)

    def _standing(self, now_ns: int) -> Batch:
        shared = self._shared
        config = shared.config
        frames = 1
        ready = () if config.lock_step else shared.scheduler.ready(now_ns)
        if ready and config.batch_cameras and len(ready) > 1:
            names = ready[0].names
            most = min(len(ready), max(1, config.max_batch // len(names)))
            frames = self._planner.frames(names, most, now_ns)
        works = shared.scheduler.take(now_ns, frames)
        if config.lock_step:
            shared.idle.notify_all()  # there is room for another frame
        tickets: list[Ticket] = []
        refused: list[Ended] = []
        for work in works:
            self._make_tickets(work, tickets, refused)
        shared.in_flight = tickets
        shared.frames_at_once = max(1, len(works))
        return Batch(tickets, refused, works[0].names if works else None, len(works))

    def _make_tickets(self, work: Work, tickets: list[Ticket], refused: list[Ended]) -> None:
        for task in work.tasks:
            self._standing_made += 1
            request_id = f"{task.name}@{work.camera}#{self._standing_made}"
            try:
                request = InferenceRequest(
                    request_id=request_id,
                    frame=work.frame,
                    task=task.task,
                    prompt=task.prompt,
                    region=task.region,
                    params=task.params,
                    instruction_id=task.instruction_id,
                )
            except RequestError as error:  # a region outside this camera's image
                now_ns = self._shared.clock()
                result = make_refusal(request_id, work.frame, task, error, now_ns)
                self._shared.meter.failed(error, now_ns)
                refused.append(Ended(result, work.frame))
            else:
                tickets.append(Ticket(request))


def _too_old(ticket: Ticket, now_ns: int) -> bool:
    limit_s = ticket.max_frame_age_s
    return limit_s > 0 and ticket.request.frame.age_s(now_ns) > limit_s


def _frame_too_old(ticket: Ticket, now_ns: int) -> RequestError:
    return RequestError(
        ErrorCode.FRAME_TOO_OLD,
        f"the frame of request {ticket.request.request_id!r} is "
        f"{ticket.request.frame.age_s(now_ns):.2f} s old, "
        f"the limit is {ticket.max_frame_age_s:.2f} s",
        "The engine is behind: ask less often, or raise the limit.",
    )
