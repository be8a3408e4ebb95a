"""A participant that is none of ours: bytes that are no message on every topic the node reads."""

from __future__ import annotations

import random
import time
from typing import Any

from suite import Findings, Watched, camera_of, robot_and_node, row, wait_for


def _cdr(rng: random.Random, good: bytes) -> bytes:
    """Bytes that begin as a message, and go wrong somewhere."""
    kind = rng.randrange(6)
    if kind == 0:
        return good[: rng.randrange(4, len(good))]
    if kind == 1:  # lengths that reach beyond everything
        at = rng.randrange(4, max(5, min(80, len(good) - 4)))
        return good[:at] + b"\xff\xff\xff" + rng.choice([b"\x7f", b"\xff"]) + good[at + 4 :]
    if kind == 2:
        return good[:4] + rng.randbytes(rng.randrange(0, 200))
    if kind == 3:
        return rng.randbytes(4) + good[4:]
    if kind == 4:  # text that is no UTF-8
        return b"\x00\x01\x00\x00\x05\x00\x00\x00\xff\xfe\x80\xc0\x00\x00\x00\x00"
    return good[:4]


@row
def rogue_participant(found: Findings) -> None:
    """Malformed CDR on cameras and instruction: the node stays, answers, and runs nothing of it."""
    from librobot_vlm_ros.msg import Caption
    from rclpy.serialization import serialize_message
    from std_msgs.msg import String

    rng = random.Random(11)
    with robot_and_node(image_topic="/torture/image", tasks=["caption"], autostart=True) as (
        robot,
        vlm,
    ):
        heard, camera = vlm.listen(Caption, "caption"), camera_of(robot)
        camera.warm_up(heard, wait_for)
        text = robot.node.create_publisher(String, f"{vlm.name}/instruction", 10)
        wait_for(lambda: text.get_subscription_count() > 0, 20.0, "the instruction's reader")
        held = Watched(vlm.process.pid)
        before = held.threads()
        image, words = serialize_message(camera.message()), serialize_message(String(data="cube"))
        for _ in range(found.number(2000, 60)):
            camera.publisher.publish(_cdr(rng, image))
            text.publish(_cdr(rng, words))
            found.cases += 2
            time.sleep(0.004)
        found.check(vlm.process.alive, "the node has ended")
        heard.clear()
        wait_for(lambda: _answers(camera, heard), 20.0, "an answer to a good image")
        text.publish(String(data="a yellow duck"))
        wait_for(lambda: vlm.get_parameter("instruction") == "a yellow duck", 20.0, "instruction")
        found.check(vlm.state == "active", f"state {vlm.state}")
        found.check(held.threads() <= before, f"threads {before}, then {held.threads()}")
        log = vlm.log()
        found.check("Traceback" not in log, "a traceback in the log")
        found.note(log_lines=log.count("\n"))


def _answers(camera: Any, heard: list[Any]) -> bool:
    camera.send()
    time.sleep(0.05)
    return bool(heard)
