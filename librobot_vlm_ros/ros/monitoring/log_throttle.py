"""Log lines that cannot flood: written once, then at most every few seconds with a count."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from librobot_vlm_ros.core import as_vlm_error


class ThrottledLog:
    """Writes a line per key at most every `period_s` (steady clock). Safe from any thread."""

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
        if line := self._line(key, text):
            self._logger.error(line)

    def warning(self, key: str, text: str) -> None:
        """Log `text` as a warning, or count it."""
        if line := self._line(key, text):
            self._logger.warning(line)

    def info(self, key: str, text: str, burst: int = 1) -> None:
        """Log `text`, or count it; `burst` of a key are written in each period."""
        if line := self._line(key, text, burst):
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


def guarded(work: Callable[[], None], log: ThrottledLog) -> Callable[[], None]:
    """`work` for a timer: what it raises is logged and does not end the timer."""

    @functools.wraps(work)
    def run() -> None:
        try:
            work()
        except Exception as error:
            log.error(work.__name__, f"{work.__name__}: {as_vlm_error(error)}")

    return run
