"""A thread that takes the requests of some services, beside the executor.

rclpy's executor builds a wait set of all that a node has for each round, and a round takes one
request of a service: at 1,000 refusals a second that was half of the 0.56 ms of processor time
that each took. Here the wait set holds these services alone and is built once, a round takes what
has come, and a flood holds up neither cameras nor timers.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.guard_condition import GuardCondition
from rclpy.impl.implementation_singleton import rclpy_implementation

from librobot_vlm_ros.ros.monitoring.log_throttle import Throttled
from librobot_vlm_ros.ros.services.async_service import SERVICES, Reply

__all__ = ["Intake"]

#: Requests of one service taken before the others are looked at.
_AT_ONCE = 32
_AFTER_A_FAULT_S = 0.01  # one that comes back at once must not take the processor


class _LeftOut(CallbackGroup):
    """What is in it, the executor leaves alone."""

    def can_execute(self, entity: Any) -> bool:
        """Never."""
        return False

    def beginning_execution(self, entity: Any) -> bool:
        """Never."""
        return False

    def ending_execution(self, entity: Any) -> None:
        """Nothing has begun."""


class Intake:
    """Services that a thread of its own takes requests of: `serve` each, then `start`."""

    def __init__(self, node: Any, complaints: Throttled) -> None:
        self._node = node
        self._complaints = complaints
        self._group = _LeftOut()
        self._served: list[tuple[Any, Callable[[Any, Reply], None]]] = []
        self._ending = threading.Event()
        self._wake = GuardCondition(None, None, context=node.context)
        self._thread = threading.Thread(target=self._run, name="vlm-intake", daemon=True)

    def serve(self, service_type: Any, name: str, handle: Callable[[Any, Reply], None]) -> None:
        """`handle(request, reply)` is called on the thread for each request. It must not block, and
        sends exactly one reply, some time, from any thread.
        """
        service = self._node.create_service(
            service_type,
            name,
            lambda _request, response: response,  # nobody calls it
            qos_profile=SERVICES,
            callback_group=self._group,
        )
        self._served.append((service, handle))

    def start(self) -> None:
        """Begin to take requests."""
        self._thread.start()

    def stop(self, timeout_s: float = 1.0) -> bool:
        """Take no more; whether the thread has ended. To be called before the node is destroyed."""
        self._ending.set()
        self._wake.trigger()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.ExitStack() as held:
            handles = [service.handle for service, _ in self._served]
            for handle in (*handles, self._wake.handle, self._node.context.handle):
                held.enter_context(handle)  # nothing of it is destroyed while it is waited for
            waiting = rclpy_implementation.WaitSet(
                0, 1, 0, 0, len(handles), 0, self._node.context.handle
            )
            while not self._ending.is_set():
                try:
                    self._round(waiting, handles)
                except Exception as error:
                    if not self._ending.is_set():
                        self._complaints.error("intake", f"requests could not be taken: {error!r}")
                        self._ending.wait(_AFTER_A_FAULT_S)

    def _round(self, waiting: Any, handles: list[Any]) -> None:
        waiting.clear_entities()
        waiting.add_guard_condition(self._wake.handle)
        for handle in handles:
            waiting.add_service(handle)
        waiting.wait(-1)
        ready = waiting.get_ready_entities("service")
        for service, handle in self._served:
            if service.handle.pointer in ready:
                self._take(service, handle)

    def _take(self, service: Any, handle: Callable[[Any, Reply], None]) -> None:
        request_type, response_type = service.srv_type.Request, service.srv_type.Response
        for _ in range(_AT_ONCE):
            request, header = service.handle.service_take_request(request_type)
            if header is None:
                return
            send = functools.partial(service.send_response, header=header)
            handle(request, Reply(response_type, self._on_lost, send))

    def _on_lost(self, error: Exception) -> None:
        self._complaints.warning(
            "lost", f"an answer could not be sent, the client has gone: {error}"
        )
