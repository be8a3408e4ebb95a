"""A thread that serves some of a node's services beside the executor. Each answers later, when the
answer is there.

rclpy sends what a service callback returns. A callback that waits for the model would hold the
executor's thread, and a coroutine that awaits a future is polled by rclpy's executors (7.1) without
a pause. Here a handler gets the request and a `Reply` and returns at once; whoever has the answer,
on any thread, calls `reply.send(response)`.

A flood of calls must neither lose one nor hold up cameras and timers. rclpy's executor builds a
wait set of all that a node has for each round, and a round takes one request of a service: at
1,000 refusals a second that was half of the 0.56 ms of processor time that each took, and requests
were overwritten before they were seen. Here the wait set holds these services alone and is built
once, a round takes what has come, and the readers are deeper than the 10 of services as they come.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.guard_condition import GuardCondition
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy

from librobot_vlm_ros.ros.monitoring.log_throttle import ThrottledLog

#: Reliable and keeping the last, as services are, with room for a quarter of a second of 1,000
#: calls a second. The depth also bounds a flood's memory: that many requests with their images.
SERVICE_QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST, depth=256, reliability=ReliabilityPolicy.RELIABLE
)

#: Requests of one service taken before the others are looked at.
_AT_ONCE = 32
_AFTER_A_FAULT_S = 0.01  # one that comes back at once must not take the processor


class Reply:
    """The way back to the client of one request. `send` works once and from any thread."""

    def __init__(self, service: Any, header: Any, on_lost: Callable[[Exception], None]) -> None:
        self._service = service
        self._header = header
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._sent = False

    def make_response(self) -> Any:
        """An empty response of the service's type."""
        return self._service.srv_type.Response()

    def send(self, response: Any) -> None:
        """Answer the client. A second call does nothing; a client that has gone is only noted."""
        with self._lock:
            if self._sent:
                return
            self._sent = True
        try:
            self._service.send_response(response, self._header)
        except Exception as error:  # rcl reports a client that has gone with several exceptions
            self._on_lost(error)


Handler = Callable[[Any, Reply], None]
"""Called with each request. Must not block, and sends exactly one reply, some time."""


class _NotForTheExecutor(CallbackGroup):
    """What is in it, the executor leaves alone."""

    def can_execute(self, entity: Any) -> bool:
        """Never."""
        return False

    def beginning_execution(self, entity: Any) -> bool:
        """Never."""
        return False

    def ending_execution(self, entity: Any) -> None:
        """Nothing has begun."""


class ServiceThread:
    """Name the services by `serve` and `take_over`, then `start`."""

    def __init__(self, node: Any, throttled_log: ThrottledLog) -> None:
        self._node = node
        self._log = throttled_log
        self._group = _NotForTheExecutor()
        self._served: list[tuple[Any, Handler]] = []
        self._ending = threading.Event()
        self._wake = GuardCondition(None, None, context=node.context)
        self._thread = threading.Thread(target=self._run, name="vlm-services", daemon=True)

    def serve(self, service_type: Any, name: str, handler: Handler) -> None:
        """Offer a service."""
        service = self._node.create_service(
            service_type,
            name,
            lambda _request, response: response,  # nobody calls it
            qos_profile=SERVICE_QOS,
            callback_group=self._group,
        )
        self._served.append((service, handler))

    def take_over(self, service: Any, handler: Handler) -> None:
        """Serve a service that rclpy has made. To be called before an executor has the node."""
        service.callback_group = self._group
        self._served.append((service, handler))

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
                        self._log.error("services", f"requests could not be taken: {error!r}")
                        self._ending.wait(_AFTER_A_FAULT_S)

    def _round(self, waiting: Any, handles: list[Any]) -> None:
        waiting.clear_entities()
        waiting.add_guard_condition(self._wake.handle)
        for handle in handles:
            waiting.add_service(handle)
        waiting.wait(-1)
        ready = waiting.get_ready_entities("service")
        for service, handler in self._served:
            if service.handle.pointer in ready:
                self._take(service, handler)

    def _take(self, service: Any, handler: Handler) -> None:
        for _ in range(_AT_ONCE):
            request, header = service.handle.service_take_request(service.srv_type.Request)
            if header is None:
                return
            handler(request, Reply(service, header, self._on_lost))

    def _on_lost(self, error: Exception) -> None:
        self._log.warning("lost", f"an answer could not be sent, the client has gone: {error}")
