"""Requests are taken beside the executor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.ros


class Told:
    """Stands in for the node's complaints."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def error(self, key: str, text: str) -> None:
        self.lines.append(text)

    warning = error


@pytest.fixture
def unspun(robot: Any) -> Iterator[Any]:
    """A node that nobody spins."""
    import rclpy

    node = rclpy.create_node("unspun", context=robot.context)
    yield node
    node.destroy_node()


def test_a_node_that_nobody_spins_answers_and_its_thread_ends(unspun: Any, robot: Any) -> None:
    from rclpy.executors import SingleThreadedExecutor
    from std_srvs.srv import SetBool

    from librobot_vlm_ros.ros.services.service_thread import ServiceThread

    told, threads = Told(), []

    def answer(request: Any, reply: Any) -> None:
        threads.append(threading.current_thread().name)
        response = reply.make_response()
        response.success = request.data
        reply.send(response)
        reply.send(response)  # does nothing

    services = ServiceThread(unspun, told)
    services.serve(SetBool, "/unspun/a", answer)
    services.serve(SetBool, "/unspun/b", answer)
    services.start()
    calls = [robot.call_later(SetBool, f"/unspun/{n}", data=True) for n in "ab" for _ in range(5)]
    assert all(call().success for call in calls)
    # Nor does an executor take any of it, should there be one.
    executor = SingleThreadedExecutor(context=robot.context)
    executor.add_node(unspun)
    later = robot.call_later(SetBool, "/unspun/a", data=False)
    executor.spin_once(timeout_sec=0.2)
    assert not later().success
    executor.shutdown()
    assert set(threads) == {"vlm-services"}
    assert len(threads) == 11
    assert services.stop()
    assert told.lines == []


def test_what_a_request_does_wrong_does_not_end_the_thread(
    unspun: Any, robot: Any, wait_until: Callable[..., Any]
) -> None:
    from std_srvs.srv import SetBool

    from librobot_vlm_ros.ros.services.service_thread import ServiceThread

    def answer(request: Any, reply: Any) -> None:
        if not request.data:
            raise ZeroDivisionError("oh")
        reply.send(reply.make_response())

    told = Told()
    services = ServiceThread(unspun, told)
    services.serve(SetBool, "/unspun/c", answer)
    services.start()
    robot.call_later(SetBool, "/unspun/c", data=False)
    wait_until(lambda: told.lines, 10.0, "a complaint")
    assert "ZeroDivisionError" in told.lines[0]
    robot.call(SetBool, "/unspun/c", data=True)
    began = time.monotonic()
    assert services.stop()
    assert time.monotonic() - began < 1.0
