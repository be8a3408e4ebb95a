"""Several cameras share one model fairly; clocks that stand still or jump do no harm."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.ros


def test_cameras_share_the_model_fairly_and_results_name_their_camera(
    start_vlm: Callable[..., Any], make_camera: Callable[..., Any]
) -> None:
    from librobot_vlm_ros.msg import Caption, GroundingArray

    vlm = start_vlm(
        fake={"latency_s": 0.02},
        cameras=["left=/left/image", "right=/right/image", "wrist=/wrist2/image:compressed"],
        tasks=["detect", "left:caption@2.0"],
        autostart=True,
    )
    detections = vlm.listen(GroundingArray, "grounding")
    captions = vlm.listen(Caption, "caption")
    cameras = [
        make_camera("/left/image"),
        make_camera("/right/image"),
        make_camera("/wrist2/image/compressed", compressed=True),
    ]
    for camera in cameras:
        camera.wait_for_listener(vlm.wait_for)

    def everybody_heard() -> bool:
        for camera in cameras:
            camera.send()
        return {m.info.camera for m in detections} == {"left", "right", "wrist"}

    vlm.wait_for(everybody_heard, 15.0)
    detections.clear()
    captions.clear()
    started = time.monotonic()
    while time.monotonic() - started < 3.0:
        for camera in cameras:
            camera.send()
        time.sleep(0.01)
    spent_s = time.monotonic() - started
    counts = Counter(message.info.camera for message in detections)
    assert min(counts.values()) > 5
    assert max(counts.values()) <= 1.3 * min(counts.values()) + 2, counts
    for message in detections:
        expected = {
            "left": "left_image",
            "right": "right_image",
            "wrist": "wrist2_image_compressed",
        }
        assert message.header.frame_id.startswith(expected[message.info.camera])
    assert {message.info.camera for message in captions} == {"left"}
    # Two a second at most, whatever the camera sends; some may have been on their way before.
    assert len(captions) <= 2 * spent_s + 4


def test_the_node_works_while_the_robots_clock_stands_still_and_after_it_jumped_back(
    start_vlm: Callable[..., Any], make_camera: Callable[..., Any]
) -> None:
    from diagnostic_msgs.msg import DiagnosticArray
    from librobot_vlm_ros.msg import Caption
    from rosgraph_msgs.msg import Clock

    vlm = start_vlm(
        image_topic="/sim/image", tasks=["caption"], use_sim_time=True, camera_timeout_s=0.5,
        autostart=True,
    )  # fmt: skip
    captions = vlm.listen(Caption, "caption")
    diagnostics = vlm.robot.listen(DiagnosticArray, "/diagnostics")
    clock = vlm.robot.node.create_publisher(Clock, "/clock", 1)
    camera = make_camera("/sim/image")
    camera.wait_for_listener(vlm.wait_for)

    def own() -> list[Any]:
        return [m for m in diagnostics if m.status[0].name.startswith(vlm.name.lstrip("/"))]

    def answered() -> bool:
        camera.send()
        return bool(captions)

    vlm.wait_for(answered, 10.0)  # no /clock so far: the robot's time is 0
    vlm.wait_for(lambda: len(own()) >= 2, 15.0)
    for seconds in (1000, 10):  # a bag that starts over
        clock.publish(Clock(clock=_time(seconds)))
        vlm.wait_for(
            lambda seconds=seconds: own()[-1].header.stamp.sec == seconds, 15.0, "the clock"
        )
        captions.clear()
        vlm.wait_for(answered, 10.0)
        assert all(0.0 <= message.info.age_s < 20.0 for message in captions)
    # The watchdog goes by the steady clock: the robot's has not moved.
    vlm.process.wait_for_output("TOPIC_TIMEOUT(701)")


def _time(seconds: int) -> Any:
    from builtin_interfaces.msg import Time

    return Time(sec=seconds)
