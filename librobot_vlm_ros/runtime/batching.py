"""What goes to the model together: requests that fit, as many as were measured to pay.

Tasks on one frame always go together (the backend computes the frame's vision features once).
Several frames go together only where that was seen to give more frames a second: on a GPU it often
does, on a CPU it seldom does and only makes everybody's answer older.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from statistics import median

from librobot_vlm_ros.runtime.config import NANOSECONDS
from librobot_vlm_ros.runtime.requests import Ticket

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


def kind_of(ticket: Ticket) -> Hashable:
    """On-demand requests of one kind can share a batch though their frames differ."""
    return (ticket.request.task, ticket.request.params)


def companions(waiting: Sequence[Ticket], *, frames: int, most: int) -> list[Ticket]:
    """The oldest request and those that go with it: all on its frame, then others of its kind, on
    `frames` frames and `most` requests at most. Order is kept.
    """
    if not waiting:
        return []
    head = waiting[0]
    chosen: list[Ticket] = []
    seen = {id(head.request.frame)}
    for ticket in waiting:
        if len(chosen) >= most:
            break
        key = id(ticket.request.frame)
        same_frame = key == id(head.request.frame)
        if not same_frame and kind_of(ticket) != kind_of(head):
            continue
        if key not in seen:
            if len(seen) >= frames:
                continue
            seen.add(key)
        chosen.append(ticket)
    return chosen
