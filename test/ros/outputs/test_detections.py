"""`~/detections` for those who speak vision_msgs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from librobot_vlm_ros.core import Region

pytestmark = pytest.mark.ros

needs_vision_msgs = pytest.mark.skipif(
    importlib.util.find_spec("vision_msgs") is None,
    reason="needs vision_msgs, which is not on PyPI: run on a machine with a ROS 2 installation",
)


def stand_in() -> Any:
    """The fields of vision_msgs 4 that are used, where the package itself is not installed."""

    def detection(header: Any) -> Any:
        position = SimpleNamespace(x=0.0, y=0.0)
        bbox = SimpleNamespace(center=SimpleNamespace(position=position), size_x=0.0, size_y=0.0)
        return SimpleNamespace(header=header, bbox=bbox, results=[])

    return SimpleNamespace(
        Detection2DArray=lambda header: SimpleNamespace(header=header, detections=[]),
        Detection2D=detection,
        ObjectHypothesisWithPose=lambda: SimpleNamespace(
            hypothesis=SimpleNamespace(class_id="", score=0.0)
        ),
    )


def test_corners_become_centre_and_size_and_a_missing_score_stays_missing() -> None:
    from librobot_vlm_ros.ros.outputs.results import detection_array

    regions = [Region("cup", 0.5, 10, 20, 30, 60), Region("box", math.nan, 0, 0, 1, 1)]
    array = detection_array(stand_in(), regions, "header")
    first, second = array.detections
    assert array.header == first.header == "header"
    assert (first.bbox.center.position.x, first.bbox.center.position.y) == (20.0, 40.0)
    assert (first.bbox.size_x, first.bbox.size_y) == (20.0, 40.0)
    assert first.results[0].hypothesis.class_id == "cup"
    assert first.results[0].hypothesis.score == 0.5
    assert math.isnan(second.results[0].hypothesis.score)


def test_without_vision_msgs_the_log_says_why_there_is_no_topic(
    start_vlm: Callable[..., Any],
) -> None:
    if importlib.util.find_spec("vision_msgs") is not None:
        pytest.skip("vision_msgs is installed here")
    vlm = start_vlm()
    vlm.process.wait_for_output("vision_msgs is not installed: there is no ~/detections")


@needs_vision_msgs
def test_regions_are_published_as_detections(
    start_vlm: Callable[..., Any], make_camera: Callable[..., Any]
) -> None:
    from librobot_vlm_ros.msg import GroundingArray
    from vision_msgs.msg import Detection2DArray

    vlm = start_vlm(image_topic="/vision/image", tasks=["detect"], lock_step=True, autostart=True)
    arrays = vlm.listen(Detection2DArray, "detections")
    groundings = vlm.listen(GroundingArray, "grounding")
    camera = make_camera("/vision/image")
    camera.warm_up(arrays, vlm.wait_for)
    camera.warm_up(groundings, vlm.wait_for)
    arrays.clear()
    sent = camera.send()
    vlm.wait_for(lambda: arrays and groundings, 10.0)
    assert arrays[0].header == sent.header
    for detection, region in zip(arrays[0].detections, groundings[0].regions, strict=True):
        assert detection.results[0].hypothesis.class_id == region.label
        assert detection.results[0].hypothesis.score == pytest.approx(region.score)
        left = detection.bbox.center.position.x - detection.bbox.size_x / 2
        assert left == pytest.approx(region.x_min, abs=1e-4)
