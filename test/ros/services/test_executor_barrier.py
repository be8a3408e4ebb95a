"""A question that comes behind an image is answered about that image."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.ros


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("lock_step", [False, True])
def test_a_query_does_not_overtake_the_image_before_it(
    start_vlm: Any, make_camera: Any, wait_until: Any, compressed: bool, lock_step: bool
) -> None:
    from librobot_vlm_ros.srv import Query

    topic = "/front/image/compressed" if compressed else "/front/image"
    transport = {"image_transport": "compressed"} if compressed else {}
    vlm = start_vlm(image_topic=topic, tasks=[""], lock_step=lock_step, autostart=True, **transport)
    vlm.wait_for_state("active")
    front = make_camera(topic, compressed=compressed)
    front.wait_for_listener(wait_until)
    for _ in range(2):  # the first image may find nobody yet
        front.send()
        wait_until(lambda: vlm.read(Query, "query", task="caption").success, 20.0, "a frame")
    about = []
    for _ in range(30):
        sent = front.send()
        answer = vlm.call(Query, "query", task="caption")
        about.append((answer.header.stamp.sec, sent.header.stamp.sec))
    # The middleware itself keeps no order between a topic and a service.
    assert sum(found == asked for found, asked in about) >= 27, about


class Node:
    """Stands in for a node: its executor runs when it is told to."""

    def __init__(self) -> None:
        self.triggered = threading.Event()

    def create_guard_condition(self, callback: Callable[[], None]) -> Any:
        self.callback = callback
        return self

    def trigger(self) -> None:
        self.triggered.set()


def test_it_waits_for_the_executor_and_for_the_decoder() -> None:
    from librobot_vlm_ros.ros.latest_worker import LatestWorker
    from librobot_vlm_ros.ros.services.executor_barrier import ExecutorBarrier

    node, decoder, done = Node(), LatestWorker("decode"), []
    held = threading.Event()
    decoder.put("front", lambda: (held.wait(10.0), done.append("front")))
    barrier = ExecutorBarrier(node, decoder)
    assert not barrier.wait(0.05)  # nobody spins
    waiting = threading.Thread(target=lambda: done.append(barrier.wait(10.0)))
    waiting.start()
    while len(barrier._sent) < 2:
        time.sleep(0.001)
    node.callback()
    assert done == []
    held.set()
    waiting.join(10.0)
    assert done == ["front", True]
    decoder.close()
    assert not barrier.wait(0.05)
