"""Services that answer later, without a thread or a spinning executor while they wait.

rclpy sends what a service callback returns. A callback that waits for the model would hold the
executor's thread, and a coroutine that awaits a future is polled by rclpy's executors (7.1) without
a pause. Here the callback gets a `Reply` and returns at once; whoever has the answer, on any
thread, calls `reply.send(response)`.

A flood of calls must not lose one. A reader with the depth of services as they come (10) has room
for 10 ms of 1,000 calls a second, and rclpy's executor takes one request per round of one or two
milliseconds: requests were overwritten before they were seen. So the reader is deeper, and each
round takes what has come, up to a bound that leaves the executor to the others. Services that
anybody may flood do without the executor, see `intake`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.service import Service

__all__ = ["SERVICES", "Reply", "defer"]

#: Reliable and keeping the last, as services are, with room for a quarter of a second of 1,000
#: calls a second. The depth also bounds a flood's memory: that many requests with their images.
SERVICES = QoSProfile(
    history=HistoryPolicy.KEEP_LAST, depth=256, reliability=ReliabilityPolicy.RELIABLE
)

#: Requests taken in one round of the executor, a few milliseconds of refusals.
_AT_ONCE = 32


class Reply:
    """The way back to the client of one request. `send` works once and from any thread."""

    def __init__(
        self,
        make_response: Callable[[], Any],
        on_lost: Callable[[Exception], None],
        send: Callable[[Any], None] | None = None,
    ) -> None:
        self.make_response = make_response
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._send = send
        self._response: Any = None
        self._sent = False

    def send(self, response: Any) -> None:
        """Answer the client. A second call does nothing; a client that has gone is only noted."""
        with self._lock:
            if self._sent or self._response is not None:
                return
            if self._send is None:  # the answer was there before rclpy handed the header over
                self._response = response
                return
            self._sent = True
        self._deliver(response)

    def bind(self, send: Callable[[Any], None]) -> None:
        """rclpy's part: how to send, known once the callback has returned."""
        with self._lock:
            self._send = send
            response = self._response
            self._sent = response is not None
        if response is not None:
            self._deliver(response)

    def _deliver(self, response: Any) -> None:
        assert self._send is not None
        try:
            self._send(response)
        except Exception as error:  # rcl reports a client that has gone with several exceptions
            self._on_lost(error)


def defer(
    service: Service, handle: Callable[[Any, Reply], None], on_lost: Callable[[Exception], None]
) -> None:
    """Let `handle(request, reply)` serve `service`. It must not raise and must send exactly one
    reply, some time.
    """
    send_now = service.send_response
    request_type, response_type = service.srv_type.Request, service.srv_type.Response

    def callback(request: Any, _response: Any) -> Reply:
        reply = Reply(response_type, on_lost)
        handle(request, reply)
        return reply

    def take_more() -> None:
        for _ in range(_AT_ONCE - 1):
            try:
                with service.handle:
                    request, header = service.handle.service_take_request(request_type)
            except Exception:  # the executor meets the same on its next take, and reports it
                return
            if header is None:
                return
            reply = Reply(response_type, on_lost)
            reply.bind(functools.partial(send_response, header=header))
            handle(request, reply)

    def send_response(response: Any, header: Any) -> None:
        if isinstance(response, Reply):
            response.bind(lambda later: send_now(later, header))
            take_more()  # not before: the first would wait for the others
        else:
            send_now(response, header)

    service.callback = callback
    service.send_response = send_response  # the executor calls it on this very object
