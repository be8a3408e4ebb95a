"""One camera's mailbox: the newest frame, a short history, and counts of what was dropped and why.

Not thread-safe: the engine's lock guards it. Stamps are only ever compared with stamps and the
steady clock only with `received_ns`, so bag loops and clock jumps cannot make a frame look old.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque

from librobot_vlm_ros.core import ErrorCode, Frame, RequestError
from librobot_vlm_ros.runtime.config import DropReason, to_ns, to_s

# Frames of a camera that were prepared lately and may still be the best choice.
_BEGUN = 3


@dataclasses.dataclass
class _Begun:
    """A frame that is being prepared for the model, or is ready."""

    frame: Frame
    since_ns: int
    dropped: DropReason | None = None
    """Counted as dropped for this, because a newer one came."""


class Mailbox:
    """Newest frame of one camera and the frames before it, bounded in number and in bytes."""

    def __init__(self, camera: str, *, history_frames: int, history_bytes: int) -> None:
        self.camera = camera
        self.received = 0
        self.processed = 0
        self.dropped: Counter[DropReason] = Counter()
        self.newest: Frame | None = None
        self.period_ns = 0  # between the arrivals of the last two frames
        self._used = True
        self._taken_ns = 0  # arrival of the frame that the model was given last
        self._begun: deque[_Begun] = deque(maxlen=_BEGUN)
        self._history: deque[Frame] = deque()
        self._history_frames = history_frames
        self._history_bytes = history_bytes
        self._bytes = 0

    def offer(self, frame: Frame, *, wanted: bool) -> None:
        """Make `frame` the newest; `wanted`: was a task waiting for the frame it replaces?"""
        self.received += 1
        if not self._used:
            reason = DropReason.REPLACED if wanted else DropReason.NOT_DUE
            self.drop(reason)
            for begun in self._begun:
                if begun.frame is self.newest:
                    begun.dropped = reason
        if self.newest is not None:
            self.period_ns = max(0, frame.received_ns - self.newest.received_ns)
        self.newest = frame
        self._used = False
        self._remember(frame)

    def keep(self, frame: Frame) -> None:
        """Take a frame that is handed to the model at once (lock-step): history and counts only."""
        self.received += 1
        self.newest = frame
        self._used = True
        self._remember(frame)

    def refuse(self, reason: DropReason) -> None:
        """A frame came and was not taken."""
        self.received += 1
        self.drop(reason)

    def drop(self, reason: DropReason, count: int = 1) -> None:
        """A frame counted before is not going to be processed."""
        self.dropped[reason] += count

    def begin(self, frame: Frame, now_ns: int) -> None:
        """The newest frame is being prepared for the model."""
        self._begun.append(_Begun(frame, now_ns))

    def choice(self, now_ns: int, prepare_ns: int) -> Frame | None:
        """The frame to give the model now: the newest, unless an earlier one has been begun.

        Preparing takes `prepare_ns`. A frame's age when the model starts on it and the time that
        the model waits for it count alike. Never one that came before a frame that was taken.
        """
        if self.newest is None or self._used:
            return self.newest
        best, cost_ns = self.newest, 2 * prepare_ns - self.newest.received_ns
        for begun in self._begun:
            left_ns = max(0, begun.since_ns + prepare_ns - now_ns)
            begun_ns = 2 * left_ns - begun.frame.received_ns
            if begun.frame.received_ns > self._taken_ns and begun_ns < cost_ns:
                best, cost_ns = begun.frame, begun_ns
        return best

    def take(self, frame: Frame | None = None) -> Frame | None:
        """Give the model the `frame` (default: the newest), which counts as processed from now on.

        The newest stays for tasks due later.
        """
        frame = frame if frame is not None else self.newest
        if frame is None:
            return None
        if frame is self.newest:
            self.processed += not self._used
            self._used = True
        else:
            self.processed += 1
            for begun in self._begun:
                if begun.frame is frame and begun.dropped is not None:
                    self.dropped[begun.dropped] -= 1
        self._taken_ns = frame.received_ns
        self._begun = deque(
            (item for item in self._begun if item.frame.received_ns > self._taken_ns), _BEGUN
        )
        return frame

    def expire(self, now_ns: int, max_age_s: float) -> bool:
        """Drop an unused newest frame older than `max_age_s` (0: never); True when too old."""
        frame = self.newest
        if frame is None or max_age_s <= 0 or now_ns - frame.received_ns <= to_ns(max_age_s):
            return False
        if not self._used:
            self._used = True
            self.drop(DropReason.TOO_OLD)
        return True

    def discard(self, reason: DropReason) -> None:
        """Give up an unused newest frame (the engine was paused); queries may still ask for it."""
        self._begun.clear()
        if not self._used:
            self._used = True
            self.drop(reason)

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

    def at(self, stamp_ns: int, tolerance_s: float) -> Frame:
        """The frame in the history with the nearest stamp. Raises `RequestError` NO_FRAME."""
        best = min(self._history, key=lambda frame: abs(frame.stamp_ns - stamp_ns), default=None)
        if best is not None and abs(best.stamp_ns - stamp_ns) <= to_ns(tolerance_s):
            return best
        if best is None:
            held = "no frame is held"
        else:
            stamps = [frame.stamp_ns for frame in self._history]
            held = (
                f"held are {len(stamps)} frames stamped {min(stamps)} to {max(stamps)} ns, "
                f"the nearest {to_s(abs(best.stamp_ns - stamp_ns)):.3f} s away"
            )
        raise RequestError(
            ErrorCode.NO_FRAME,
            f"camera {self.camera!r} has no frame of stamp {stamp_ns} ns within "
            f"{tolerance_s:g} s; {held}",
            "Ask sooner, widen the tolerance, or keep a longer history.",
        )

    def resize(self, *, history_frames: int, history_bytes: int) -> None:
        """Change how much history is kept, while frames come in."""
        self._history_frames = history_frames
        self._history_bytes = history_bytes
        self._trim()

    def clear(self) -> None:
        """Forget all frames; counts stay."""
        self.newest = None
        self._used = True
        self._begun.clear()
        self._history.clear()
        self._bytes = 0

    def _remember(self, frame: Frame) -> None:
        self._history.append(frame)
        self._bytes += frame.pixels.nbytes
        self._trim()

    def _trim(self) -> None:
        while self._history and (
            len(self._history) > self._history_frames or self._bytes > self._history_bytes
        ):
            self._bytes -= self._history.popleft().pixels.nbytes
