"""Clients of `~/generate` that end, as kill -9 ends them, at one point of an action.

    python test/torture/dying_client.py /torture/vlm 2

Points: 1 the goal is sent, 2 it is accepted, 3 the result is asked for, 4 feedback has come,
5 cancelling is asked for. Nothing of rclpy is put away at the end.
"""

from __future__ import annotations

import array
import os
import signal
import sys
import time
from typing import Any

import rclpy
from librobot_vlm_ros.action import Generate
from rclpy.action import ActionClient

from librobot_vlm_ros.ros.dds import use_image_profile


def main() -> None:
    """Get as far as the point and end."""
    name, point = sys.argv[1], int(sys.argv[2])
    use_image_profile()
    rclpy.init(args=[])
    node = rclpy.create_node(f"dying_{os.getpid()}")
    client = ActionClient(node, Generate, f"{name}/generate")
    assert client.wait_for_server(30.0)
    time.sleep(0.5)  # both ends of the answers find each other too (rmw_fastrtps#842)
    goal = Generate.Goal(task="caption", use_image=True, timeout_s=3.0)
    goal.image.encoding, goal.image.width, goal.image.height = "rgb8", 64, 48
    goal.image.step, goal.image.data = 192, array.array("B", os.urandom(192 * 48))
    heard: list[Any] = []
    sent = client.send_goal_async(goal, feedback_callback=heard.append)

    def within(seconds: float, condition: Any) -> bool:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            rclpy.spin_once(node, timeout_sec=0.05)
        return bool(condition())

    def until(condition: Any) -> None:
        assert within(20.0, condition), f"point {point} was not reached"

    if point >= 2:
        if not within(5.0, sent.done):  # on a busy machine that may take longer
            sent = client.send_goal_async(goal, feedback_callback=heard.append)
        until(sent.done)
        assert sent.result().accepted
    if point >= 3:
        asked = sent.result().get_result_async()
        assert not asked.done()
    if point >= 4 and not within(5.0, lambda: heard):
        # The goal has ended before node and client had found each other's feedback.
        sent = client.send_goal_async(goal, feedback_callback=heard.append)
        until(sent.done)
        until(lambda: heard)
    if point >= 5:
        sent.result().cancel_goal_async()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
