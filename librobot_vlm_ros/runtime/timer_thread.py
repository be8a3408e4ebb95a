"""The thread that keeps time: ends what is past its deadline and reports silent cameras, however
long the model takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from librobot_vlm_ros.runtime.config import to_s
from librobot_vlm_ros.runtime.engine_state import Ended, Shared
from librobot_vlm_ros.runtime.requests import too_late
from librobot_vlm_ros.runtime.watchdog import CameraEvent

LONGEST_WAIT_S = 3600.0


class TimerThread:
    """Sleeps until the next deadline or camera timeout; ends when the engine stops."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.thread = threading.Thread(target=self._main, name="vlm-timer", daemon=True)

    def _main(self) -> None:
        shared = self._shared
        while True:
            with shared.lock:
                ended, events = self._due()
                while not ended and not events:
                    if shared.stopped:
                        return
                    shared.timer.wait(self._wait_s())
                    ended, events = self._due()
            shared.complete(ended)
            if shared.on_camera is not None:
                for event in events:
                    tell: Callable[[], None] = partial(shared.on_camera, event)
                    shared.call("on_camera", tell)
            del ended, events

    def _due(self) -> tuple[list[Ended], list[CameraEvent]]:
        shared = self._shared
        now_ns = shared.clock()
        ended = [
            ended
            for ticket in shared.waiting_tickets()
            if ticket.expired(now_ns)
            for ended in shared.end([ticket], too_late(ticket.request.request_id))
        ]
        events = [*shared.events, *shared.watchdog.check(now_ns)]
        shared.events.clear()
        return ended, events

    def _wait_s(self) -> float | None:
        shared = self._shared
        times = [
            ticket.request.deadline_ns
            for ticket in shared.waiting_tickets()
            if ticket.request.deadline_ns is not None
        ]
        watchdog_ns = shared.watchdog.next_ns()
        if watchdog_ns is not None:
            times.append(watchdog_ns)
        if not times:
            return None
        return min(LONGEST_WAIT_S, max(0.0, to_s(min(times) - shared.clock())))
