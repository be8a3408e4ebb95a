"""Waiting until the executor has dealt with what came before.

A client that publishes an image and then asks about it expects an answer about that image. Queries
come in on a thread of their own (see `service_thread`) and would overtake images that wait for the
executor or for the decoder.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import Any

from librobot_vlm_ros.ros.latest_worker import LatestWorker

_marks = itertools.count()


class ExecutorBarrier:
    """Marks that go the way of an image: through the executor of `node`, then through `decoder`."""

    def __init__(self, node: Any, decoder: LatestWorker) -> None:
        self._decoder = decoder
        self._sent: deque[threading.Event] = deque()
        # Of what is ready in a round, the executor calls subscriptions before guard conditions.
        self._guard = node.create_guard_condition(self._pass_on)

    def wait(self, timeout_s: float) -> bool:
        """Whether all images that had arrived are taken or refused; False where that takes longer.

        Not to be called on the executor's thread.
        """
        mark = threading.Event()
        self._sent.append(mark)
        self._guard.trigger()
        return mark.wait(timeout_s)

    def _pass_on(self) -> None:
        while self._sent:
            # A key of its own: it replaces nothing, and what waits for longer is done before it.
            self._decoder.put(f"mark {next(_marks)}", self._sent.popleft().set)
