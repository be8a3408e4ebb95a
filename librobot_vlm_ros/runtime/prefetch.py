"""The thread that brings the next frames to the model's size while the model works on others.

There is no queue: it looks for what the model will be given next, so that a frame which a newer one
replaced is never looked at again. Frames that are certain to come (of requests, and in lock-step)
are prepared at once; a camera's newest frame only when no newer one is to be expected before the
model is done, because a frame that is replaced was prepared for nothing. Where preparing takes
longer than a camera's period, `Mailbox.best` weighs a ready frame against a newer one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from weakref import WeakSet

from librobot_vlm_ros.core import Frame, as_vlm_error
from librobot_vlm_ros.runtime.config import to_ns, to_s
from librobot_vlm_ros.runtime.engine_state import SharedState

logger = logging.getLogger("librobot_vlm_ros.runtime")

# Frames that wait in line for the model and are prepared before their turn.
IN_LINE = 2
# A frame is begun so much longer before the model is done than preparing took last.
LEAD = 1.5
# When the model takes longer than expected, a newer frame is begun after so many times what
# preparing takes: on a CPU the model needs the cores, too.
REFRESH = 3


class PrefetchThread:
    """Works while the model does; ends when the engine stops."""

    def __init__(self, shared: SharedState) -> None:
        self._shared = shared
        self._done: WeakSet[Frame] = WeakSet()

    def run(self) -> None:
        """The thread's loop."""
        shared = self._shared
        while True:
            with shared.lock:
                frame, wait_s = self._next()
                while frame is None and not shared.stopped:
                    shared.prefetch.wait(wait_s)
                    frame, wait_s = self._next()
                backend = shared.prepares
                if shared.stopped or frame is None or backend is None:
                    return
                self._done.add(frame)
                shared.preparing = True
                mailbox = shared.scheduler.mailboxes.get(frame.camera)
                if mailbox is not None and mailbox.newest is frame:
                    mailbox.prefetching(frame, shared.clock())
            started = time.perf_counter()
            try:
                backend.prepare_frame(frame)
            except BaseException as error:  # the thread must go on
                logger.debug("preparing %r failed: %s", frame, as_vlm_error(error))
            took_ns = to_ns(time.perf_counter() - started)
            del backend, frame, mailbox  # the model must be free to go, and the frame too
            with shared.lock:
                shared.scheduler.prepare_ns = took_ns
                shared.preparing = False
                shared.idle.notify_all()

    def _next(self) -> tuple[Frame | None, float | None]:
        """A frame to prepare now; or None, and in how many seconds to look again."""
        shared = self._shared
        started_ns = shared.meter.run_started_ns
        if shared.prepares is None or started_ns is None:
            return None, None
        for frame in self._certain():
            if frame not in self._done:
                return frame, None
        if shared.config.lock_step:
            return None, None
        now_ns = shared.clock()
        done_ns = max(now_ns, started_ns + shared.meter.quick_run_ns)
        waits = []
        for frame in shared.scheduler.upcoming_frames(done_ns)[: shared.frames_at_once]:
            if frame in self._done:
                continue
            wait_ns = self._begin_ns(frame, started_ns, done_ns) - now_ns
            if wait_ns <= 0:
                return frame, None
            waits.append(wait_ns)
        return None, to_s(min(waits)) if waits else None

    def _certain(self) -> Iterator[Frame]:
        shared = self._shared
        for pending in shared.queue[:IN_LINE]:
            yield pending.request.frame
        if shared.config.lock_step:
            yield from shared.scheduler.upcoming_frames(0)[:IN_LINE]

    def _begin_ns(self, frame: Frame, started_ns: int, done_ns: int) -> int:
        """When to begin with a camera's newest frame, the model running until `done_ns`."""
        scheduler = self._shared.scheduler
        mailbox = scheduler.mailboxes[frame.camera]
        lead_ns = round(LEAD * scheduler.prepare_ns)
        begin_ns = done_ns - lead_ns
        if frame.received_ns + max(mailbox.period_ns, lead_ns) >= done_ns:
            begin_ns = 0  # it will still be the newest, or there is no time for a newer one
        if mailbox.prefetched_ns > started_ns:
            begin_ns = max(begin_ns, mailbox.prefetched_ns + REFRESH * scheduler.prepare_ns)
        return begin_ns
