"""Chooses the next batch: what goes before what, and what goes to the model together.

On-demand requests go first, but never so long that standing tasks starve: a flood of requests must
not blind the robot. Tasks on one frame always go together (the backend computes the frame's vision
features once). Several frames go together only where that was seen to give more frames a second: on
a GPU it often does, on a CPU it seldom does and only makes everybody's answer older.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import median

from librobot_vlm_ros.core import InferenceRequest
from librobot_vlm_ros.runtime.config import NANOSECONDS
from librobot_vlm_ros.runtime.engine_state import SharedState
from librobot_vlm_ros.runtime.pending_request import PendingRequest

# On-demand batches that are served in a row while a standing task waits.
REQUESTS_BEFORE_STANDING = 4
# A batch of n frames pays when it takes less than this fraction of n single runs.
PAYS_BELOW = 0.75
# Single runs seen before the first try of a larger batch: early ones include warming up.
SAMPLES_BEFORE_TRIAL = 5
FIRST_PAUSE_NS = 10 * NANOSECONDS
LONGEST_PAUSE_NS = 600 * NANOSECONDS
MAX_KINDS = 32


class _Kind:
    """Measured times of one kind of work, by the number of frames in the batch."""

    def __init__(self) -> None:
        self.times_s: dict[int, deque[float]] = {}
        self.best = 1
        self.next_trial_ns = 0
        self.pause_ns = FIRST_PAUSE_NS

    def time_s(self, frames: int) -> float:
        return median(self.times_s[frames])


class BatchPlanner:
    """Learns how many frames to put into a batch, per kind of work (the tasks that are run).

    One trial of one more frame at a time; a trial that does not pay is not repeated before a pause
    that doubles each time, so that trials cost next to nothing where batching never pays.
    """

    def __init__(self) -> None:
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()

    def frames(self, kind: Hashable, most: int, now_ns: int) -> int:
        """How many frames to take, 1 to `most`."""
        known = self._kind(kind)
        wanted = known.best
        singles = known.times_s.get(1)
        if singles and len(singles) >= SAMPLES_BEFORE_TRIAL and now_ns >= known.next_trial_ns:
            wanted += 1
        return max(1, min(most, wanted))

    def took(self, kind: Hashable, frames: int, seconds: float, now_ns: int) -> None:
        """A batch of `frames` frames took so long."""
        known = self._kind(kind)
        known.times_s.setdefault(frames, deque(maxlen=5)).append(seconds)
        if frames <= 1 or 1 not in known.times_s:
            return
        pays = known.time_s(frames) < PAYS_BELOW * frames * known.time_s(1)
        if frames > known.best:
            if pays and known.time_s(frames) / frames < known.time_s(known.best) / known.best:
                known.best = frames
                known.pause_ns = FIRST_PAUSE_NS
            else:  # also where a batch is full: one more only makes everybody wait longer
                self._rest(known, now_ns)
        elif not pays:
            known.best = 1
            self._rest(known, now_ns)

    def ran_out_of_memory(self, kind: Hashable, frames: int, now_ns: int) -> None:
        """A batch of `frames` frames did not fit."""
        known = self._kind(kind)
        known.best = max(1, min(known.best, frames - 1))
        self._rest(known, now_ns)

    def forget(self) -> None:
        """Another model was loaded."""
        self._kinds.clear()

    def _rest(self, known: _Kind, now_ns: int) -> None:
        known.next_trial_ns = now_ns + known.pause_ns
        known.pause_ns = min(2 * known.pause_ns, LONGEST_PAUSE_NS)

    def _kind(self, kind: Hashable) -> _Kind:
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            self._kinds.popitem(last=False)
        known = self._kinds.setdefault(kind, _Kind())
        self._kinds.move_to_end(kind)
        return known


def kind_of(pending: PendingRequest) -> Hashable:
    """On-demand requests of one kind can share a batch though their frames differ."""
    return (pending.request.task, pending.request.params)


def companions(
    waiting: Sequence[PendingRequest], *, frames: int, most: int
) -> list[PendingRequest]:
    """The oldest request and those that go with it: all on its frame, then others of its kind, on
    `frames` frames and `most` requests at most. Order is kept.
    """
    if not waiting:
        return []
    head = waiting[0]
    chosen: list[PendingRequest] = []
    seen = {head.request.frame}
    for pending in waiting:
        if len(chosen) >= most:
            break
        frame = pending.request.frame
        if frame is not head.request.frame and kind_of(pending) != kind_of(head):
            continue
        if frame not in seen:
            if len(seen) >= frames:
                continue
            seen.add(frame)
        chosen.append(pending)
    return chosen


@dataclass
class Batch:
    """Requests to run now."""

    requests: list[PendingRequest]
    frames: int
    kind: Hashable = None
    """Set where its time teaches the planner something."""


class BatchSelector:
    """Makes batches of what waits. Called with the engine's lock held."""

    def __init__(self, shared: SharedState, planner: BatchPlanner) -> None:
        self._shared = shared
        self._planner = planner
        self._requests_in_a_row = 0
        self._standing_made = 0

    def next_batch(self) -> Batch | None:
        """The next batch, which counts as begun; None when there is nothing to run now."""
        shared = self._shared
        if not shared.running or shared.loaded is None:
            return None
        now_ns = shared.clock()
        standing = shared.scheduler.has_work(now_ns)
        turn = self._requests_in_a_row < REQUESTS_BEFORE_STANDING
        if shared.queue and (turn or not standing):
            self._requests_in_a_row = self._requests_in_a_row + 1 if standing else 0
            batch = self._of_requests(now_ns)
        else:
            self._requests_in_a_row = 0
            if not standing:
                return None
            batch = self._of_standing_tasks(now_ns)
        shared.in_flight = batch.requests
        return batch

    def wait_s(self) -> float | None:
        """Seconds until something that is here becomes due; None = not before something comes."""
        shared = self._shared
        if not shared.running or shared.loaded is None:
            return None
        return shared.wait_s(shared.scheduler.next_due_ns(shared.clock()))

    def _of_requests(self, now_ns: int) -> Batch:
        shared = self._shared
        kind = kind_of(shared.queue[0])
        most = shared.config.max_batch
        frames = self._planner.frames(kind, most, now_ns)
        begun = companions(shared.queue, frames=frames, most=most)
        shared.dequeue(begun)
        frames = len({pending.request.frame for pending in begun})
        alike = frames == len(begun) and all(kind_of(pending) == kind for pending in begun)
        return Batch(begun, frames, kind if alike else None)

    def _of_standing_tasks(self, now_ns: int) -> Batch:
        shared = self._shared
        frames = 1
        due = () if shared.config.lock_step else shared.scheduler.due_work(now_ns)
        if len(due) > 1:
            names = due[0].names
            most = min(len(due), max(1, shared.config.max_batch // len(names)))
            frames = self._planner.frames(names, most, now_ns)
        works = shared.scheduler.next_work(now_ns, frames)
        requests = []
        for work in works:
            for task in work.tasks:
                self._standing_made += 1
                request = InferenceRequest(
                    request_id=f"{task.name}@{work.camera}#{self._standing_made}",
                    frame=work.frame,
                    task=task.task,
                    prompt=task.prompt,
                    params=task.params,
                    instruction_id=task.instruction_id,
                )
                requests.append(PendingRequest(request))
        shared.frames_at_once = max(1, len(works))
        return Batch(requests, len(works), works[0].names if works else None)
