"""One camera's mailbox: the newest frame, a short history, and counts of what was dropped and why.

Not thread-safe: the engine's lock guards it. Stamps are only ever compared with stamps and the
steady clock only with `received_ns`, so bag loops and clock jumps cannot make a frame look old.
"""

from __future__ import annotations

from collections import Counter, deque

from librobot_vlm_ros.core import ErrorCode, Frame, RequestError

from .config import DropReason, to_ns, to_s


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
        self._history: deque[Frame] = deque()
        self._history_frames = history_frames
        self._history_bytes = history_bytes
        self._bytes = 0

    def offer(self, frame: Frame, *, wanted: bool) -> None:
        """Make `frame` the newest; `wanted`: was a task waiting for the frame it replaces?"""
        self.received += 1
        if not self._used:
            self.drop(DropReason.REPLACED if wanted else DropReason.NOT_DUE)
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

    def take(self) -> Frame | None:
        """The newest frame, which counts as processed from now on; it stays for tasks due later."""
        if self.newest is not None and not self._used:
            self._used = True
            self.processed += 1
        return self.newest

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
