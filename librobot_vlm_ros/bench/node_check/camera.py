"""One camera of `node_check`, as a process of its own: paced images with the steady clock as stamp.

It reads words from its standard input: a number of seconds publishes so long and answers with the
number of images sent; the end of the input ends it.
"""

from __future__ import annotations

import array
import sys
import time
from typing import Any

import numpy as np

from librobot_vlm_ros.client.session import Session

WIDTH, HEIGHT = 640, 480


def main(topic: str, rate_hz: float, reliable: bool) -> int:
    """Serve standard input until it ends."""
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import Image

    from librobot_vlm_ros.ros.dds import keep_freed_memory, use_image_profile

    use_image_profile()  # what config/README.md asks of the cameras; before the first participant
    keep_freed_memory()
    kind = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
    with Session("camera_" + topic.strip("/").replace("/", "_")) as session:
        publisher = session.node.create_publisher(
            Image, topic, QoSProfile(depth=5, reliability=kind)
        )
        message = _image(topic)
        for line in sys.stdin:
            print(_publish(publisher, message, float(line), rate_hz), flush=True)
    return 0


def _publish(publisher: Any, message: Any, seconds: float, rate_hz: float) -> int:
    start, sent = time.monotonic(), 0
    while sent < round(seconds * rate_hz):
        pause_s = start + sent / rate_hz - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
        # The steady clock, which all processes of a machine share, so that ages can be told.
        stamp_ns = time.monotonic_ns()
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
        publisher.publish(message)
        sent += 1
    return sent


def _image(topic: str) -> Any:
    from sensor_msgs.msg import Image

    message = Image(height=HEIGHT, width=WIDTH, encoding="rgb8", step=3 * WIDTH)
    message.header.frame_id = topic
    pixels = np.random.default_rng(len(topic)).integers(0, 256, HEIGHT * WIDTH * 3, np.uint8)
    message.data = array.array("B", pixels.tobytes())
    return message


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3] == "reliable"))
