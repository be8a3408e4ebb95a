"""A thread for work of which only the newest counts: decoding (JPEG, PNG, Bayer, YUV) and drawing,
so that the executor stays responsive.

Per key, such as a camera, only the newest piece of work waits; what a newer one replaced is never
done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class LatestWorker:
    """Runs the newest piece of work per key, keys in turn, on a thread of its own."""

    def __init__(self, name: str) -> None:
        self._ready = threading.Condition()
        self._waiting: dict[str, Callable[[], None]] = {}  # insertion order: the oldest key is next
        self._open = True
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, key: str, work: Callable[[], None]) -> bool:
        """Do `work` soon. False when it replaces older work of that key, which is never done."""
        with self._ready:
            fresh = key not in self._waiting
            self._waiting[key] = work  # keeps the place of the work it replaces
            self._ready.notify()
        return fresh

    def close(self, timeout_s: float = 2.0) -> bool:
        """Drop what waits and end the thread; True when it has ended in time."""
        with self._ready:
            self._open = False
            self._waiting.clear()
            self._ready.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._ready:
                while self._open and not self._waiting:
                    self._ready.wait()
                if not self._open:
                    return
                work = self._waiting.pop(next(iter(self._waiting)))
            try:
                work()
            except Exception:  # the work reports its own errors; this thread serves all keys
                _log.exception("work failed in a way it should not")
