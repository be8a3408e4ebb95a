"""Log lines that cannot flood: the same complaint is written once, then at most every few seconds
with a count.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from librobot_vlm_ros.core import Frame, Result, as_vlm_error, escape_for_log

__all__ = ["Throttled", "guarded", "result_text"]


def result_text(result: Result, frame: Frame, now_ns: int) -> str:
    """One line about an answer, for the debug log."""
    answer, info = result.answer, result.info
    what = "no answer" if answer is None else f"'{escape_for_log(answer.text)}'"
    if answer is not None and answer.regions:
        what = ", ".join(escape_for_log(region.label) for region in answer.regions)
    return (
        f"{info.request_id}: {what} (batch of {info.batch_size}, model {info.inference_s:.3f} s, "
        f"frame {(now_ns - frame.received_ns) * 1e-9:.3f} s old)"
    )


class Throttled:
    """Writes a complaint per key at most every `period_s` seconds of the steady clock. Safe from
    any thread.
    """

    def __init__(
        self, logger: Any, period_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._period_s = period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}  # key -> begin of its period, how many since

    def error(self, key: str, text: str) -> None:
        """Log `text` as an error, or count it."""
        line = self._line(key, text)
        if line:
            self._logger.error(line)

    def warning(self, key: str, text: str) -> None:
        """Log `text` as a warning, or count it."""
        line = self._line(key, text)
        if line:
            self._logger.warning(line)

    def info(self, key: str, text: str, burst: int = 1) -> None:
        """Log `text`, or count it; `burst` of a key are written in each period."""
        line = self._line(key, text, burst)
        if line:
            self._logger.info(line)

    def _line(self, key: str, text: str, burst: int = 1) -> str:
        now = self._clock()
        with self._lock:
            begun, seen = self._last.get(key, (-self._period_s, 0))
            if now - begun < self._period_s:
                self._last[key] = (begun, seen + 1)
                return text if seen < burst else ""
            self._last[key] = (now, 1)
        return f"{text} ({seen - burst} more like this)" if seen > burst else text


def guarded(work: Callable[[], None], complaints: Throttled) -> Callable[[], None]:
    """`work` for a timer: what it raises is logged and does not end the timer."""

    @functools.wraps(work)
    def run() -> None:
        try:
            work()
        except Exception as error:
            complaints.error(work.__name__, f"{work.__name__}: {as_vlm_error(error)}")

    return run
