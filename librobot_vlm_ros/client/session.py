"""One rclpy context, node and executor for a command, spun by the thread that waits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from librobot_vlm_ros.client import signals
from librobot_vlm_ros.core import EngineError, ErrorCode


class Session:
    """A context manager: `session.node` is an rclpy node, `spin_until` lets its callbacks run.

    Everything happens in the thread that calls, so that no command needs a lock.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.node: Any = None
        self._context: Any = None
        self._executor: Any = None

    def __enter__(self) -> Session:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.parameter import Parameter
        from rclpy.signals import SignalHandlerOptions

        self._context = rclpy.Context()
        # Python's own handlers raise where they should: in the thread that waits.
        rclpy.init(args=[], context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        # It offers nothing of its own: under SROS2 each offer would need a right.
        no_description = Parameter("start_type_description_service", value=False)
        self.node = rclpy.create_node(
            self._name,
            context=self._context,
            start_parameter_services=False,
            enable_rosout=False,
            parameter_overrides=[no_description],
        )
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        return self

    def __exit__(self, *_: object) -> None:
        import rclpy

        self._executor.shutdown(0)
        self.node.destroy_node()
        rclpy.try_shutdown(context=self._context)

    def spin_until(self, done: Callable[[], bool], until_s: float) -> bool:
        """Run callbacks until `done()` or `until_s` on `time.monotonic()`; whether it is done.

        What is ready is handled even when the time is over already.
        """
        self._spin_once(0.0)
        while not done():
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return False
            self._spin_once(min(left_s, 0.1))
        return True

    def spin_for(self, duration_s: float) -> None:
        """Run callbacks for so many seconds; 0 handles what is ready."""
        self.spin_until(lambda: False, time.monotonic() + duration_s)

    def _spin_once(self, timeout_s: float) -> None:
        with signals.delayed():
            self._executor.spin_once(timeout_s)

    def call(self, client: Any, request: Any, timeout_s: float, *, find_s: float = math.inf) -> Any:
        """A service's answer. Raises `EngineError` DEADLINE_EXCEEDED when none comes in time, or
        when no such service is found within `find_s`.
        """
        began_s = time.monotonic()
        find_s, until_s = min(find_s, timeout_s), began_s + timeout_s
        name = client.srv_name
        if not self.spin_until(client.service_is_ready, began_s + find_s):
            raise EngineError(
                ErrorCode.DEADLINE_EXCEEDED,
                f"there is no service {name} after {find_s:g} s",
                "Is the node running, under this name and on this ROS_DOMAIN_ID? "
                "Start it with: librobot-vlm run",
            )
        future = client.call_async(request)
        if not self.spin_until(future.done, until_s):
            client.remove_pending_request(future)
            raise EngineError(
                ErrorCode.DEADLINE_EXCEEDED, f"{name} did not answer within {timeout_s:g} s"
            )
        return future.result()


def resolve(topic: str, node_name: str) -> str:
    """The full name of `topic` as the node called `node_name` (with its namespace) sees it."""
    if topic.startswith("~"):
        return f"{node_name}{topic[1:]}"
    if topic.startswith("/"):
        return topic
    return f"{node_name.rpartition('/')[0]}/{topic}"
