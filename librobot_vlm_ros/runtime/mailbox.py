"""One camera's mailbox: the newest frame, a short history, and counts of what was dropped and why.

Not thread-safe: the engine's lock guards it. Stamps are only ever compared with stamps and the
steady clock only with `received_ns`, so bag loops and clock jumps cannot make a frame look old.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque

from librobot_vlm_ros.core import ErrorCode, Frame, RequestError
from librobot_vlm_ros.runtime.config import DropReason, to_ns, to_s

# Pixels of the history, at most: frames of a large camera are forgotten sooner.
HISTORY_BYTES = 64 * 1024 * 1024
# Frames of a camera that were prefetched lately and may still be the best choice.
_MAX_PREFETCHED = 3


@dataclasses.dataclass
class _Prefetched:
    """A frame that is being prepared for the model, or is ready."""

    frame: Frame
    since_ns: int
    dropped: DropReason | None = None
    """Counted as dropped for this, because a newer one came."""


class Mailbox:
    """Newest frame of one camera and the frames before it, bounded in number and in bytes."""

    def __init__(self, camera: str, history_frames: int) -> None:
        self.camera = camera
        self.received = 0
        self.processed = 0
        self.dropped: Counter[DropReason] = Counter()
        self.newest: Frame | None = None
        self.period_ns = 0  # between the arrivals of the last two frames
        self.prefetched_ns = 0  # when preparing a newest frame was begun last
        self._used = True  # the newest frame was processed or dropped
        self._last_used_ns = 0  # arrival of the frame that the model was given last
        self._prefetched: deque[_Prefetched] = deque(maxlen=_MAX_PREFETCHED)
        self._history: deque[Frame] = deque()
        self._history_frames = history_frames
        self._history_bytes = 0

    def offer(self, frame: Frame, *, wanted: bool) -> None:
        """Make `frame` the newest; `wanted`: was a task waiting for the frame it replaces?"""
        self.received += 1
        if not self._used:
            reason = DropReason.REPLACED if wanted else DropReason.NOT_DUE
            self.dropped[reason] += 1
            for prefetched in self._prefetched:
                if prefetched.frame is self.newest:
                    prefetched.dropped = reason
        if self.newest is not None:
            self.period_ns = max(0, frame.received_ns - self.newest.received_ns)
        self.newest = frame
        self._used = False
        self._remember(frame)

    def record(self, frame: Frame) -> None:
        """Count and remember a frame that waits elsewhere for its turn (lock-step)."""
        self.received += 1
        self.newest = frame
        self._used = True
        self._remember(frame)

    def refuse(self, reason: DropReason) -> None:
        """A frame came and was not accepted."""
        self.received += 1
        self.dropped[reason] += 1

    def prefetching(self, frame: Frame, now_ns: int) -> None:
        """The newest frame is being prepared for the model from now on."""
        self.prefetched_ns = now_ns
        self._prefetched.append(_Prefetched(frame, now_ns))

    def best(self, now_ns: int, prepare_ns: int) -> Frame | None:
        """The frame to give the model now: the newest, unless an earlier one has been prefetched.

        Preparing takes `prepare_ns`. A frame's age when the model starts on it and the time that
        the model waits for it count alike. Never one that came before a frame that was used.
        """
        if self.newest is None or self._used:
            return self.newest
        best, cost_ns = self.newest, 2 * prepare_ns - self.newest.received_ns
        for prefetched in self._prefetched:
            frame = prefetched.frame
            left_ns = max(0, prefetched.since_ns + prepare_ns - now_ns)
            if frame.received_ns > self._last_used_ns and 2 * left_ns - frame.received_ns < cost_ns:
                best, cost_ns = frame, 2 * left_ns - frame.received_ns
        return best

    def use(self, frame: Frame) -> None:
        """The model is given `frame`, which counts as processed; the newest stays for others."""
        if frame is self.newest:
            self.processed += not self._used
            self._used = True
        else:
            self.processed += 1
            for prefetched in self._prefetched:
                if prefetched.frame is frame and prefetched.dropped is not None:
                    self.dropped[prefetched.dropped] -= 1
        self._last_used_ns = frame.received_ns
        self._prefetched = deque(
            (one for one in self._prefetched if one.frame.received_ns > self._last_used_ns),
            _MAX_PREFETCHED,
        )

    def expire(self, now_ns: int, max_age_s: float) -> bool:
        """Drop an unused newest frame older than `max_age_s` (0: never); True when too old."""
        frame = self.newest
        if frame is None or max_age_s <= 0 or now_ns - frame.received_ns <= to_ns(max_age_s):
            return False
        self._drop_unused(DropReason.TOO_OLD)
        return True

    def discard(self, reason: DropReason) -> None:
        """Give up an unused newest frame (the engine was paused); queries may still ask for it."""
        self._prefetched.clear()
        self._drop_unused(reason)

    def latest(self, now_ns: int, max_age_s: float) -> Frame:
        """The newest frame, at most `max_age_s` old (0: any age).

        Raises `RequestError`: NO_FRAME, FRAME_TOO_OLD.
        """
        frame = self.newest
        if frame is None:
            raise RequestError(
                ErrorCode.NO_FRAME,
                f"no frame of camera {self.camera!r} has arrived yet",
                "Check that its topic is published and the quality of service fits.",
            )
        age_s = frame.age_s(now_ns)
        if max_age_s > 0 and age_s > max_age_s:
            raise RequestError(
                ErrorCode.FRAME_TOO_OLD,
                f"the newest frame of camera {self.camera!r} is {age_s:.2f} s old, the limit is "
                f"{max_age_s:.2f} s",
                "Check the camera, or raise the limit.",
            )
        return frame

    def at(self, stamp_ns: int) -> Frame:
        """The frame in the history with this stamp. Raises `RequestError` NO_FRAME."""
        held = "no frame is held"
        if self._history:
            nearest = min(self._history, key=lambda frame: abs(frame.stamp_ns - stamp_ns))
            if nearest.stamp_ns == stamp_ns:
                return nearest
            stamps = [frame.stamp_ns for frame in self._history]
            held = (
                f"held are {len(stamps)} frames stamped {min(stamps)} to {max(stamps)} ns, "
                f"the nearest {to_s(abs(nearest.stamp_ns - stamp_ns)):.3f} s away"
            )
        raise RequestError(
            ErrorCode.NO_FRAME,
            f"camera {self.camera!r} has no frame of stamp {stamp_ns} ns; {held}",
            "Ask sooner, or keep a longer history.",
        )

    def _drop_unused(self, reason: DropReason) -> None:
        if not self._used:
            self._used = True
            self.dropped[reason] += 1

    def _remember(self, frame: Frame) -> None:
        self._history.append(frame)
        self._history_bytes += frame.pixels.nbytes
        while self._history and (
            len(self._history) > self._history_frames or self._history_bytes > HISTORY_BYTES
        ):
            self._history_bytes -= self._history.popleft().pixels.nbytes
