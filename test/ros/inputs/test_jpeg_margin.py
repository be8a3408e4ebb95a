"""Cameras that send more JPEG than the model looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest

from librobot_vlm_ros.core import Frame, InferenceRequest, decode_compressed
from librobot_vlm_ros.models import create_vlm

pytestmark = pytest.mark.ros

WIDTH, HEIGHT = 320, 240


def picture() -> np.ndarray:
    noise = np.random.default_rng(5).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    return cv2.resize(noise, (WIDTH, HEIGHT))


def boxes_of(message: Any) -> list[tuple[float, ...]]:
    return [(r.x_min, r.y_min, r.x_max, r.y_max) for r in message.regions]


def test_they_are_decoded_smaller_and_boxes_stay_those_of_the_whole_image(
    start_vlm: Callable[..., Any], make_camera: Callable[..., Any]
) -> None:
    from librobot_vlm_ros.msg import GroundingArray
    from sensor_msgs.msg import Image

    vlm = start_vlm(
        fake={"input_side": 60},
        image_topic="/large/image",
        image_transport="compressed",
        tasks=["detect"],
        jpeg_margin=2,
        autostart=True,
    )
    heard = vlm.listen(GroundingArray, "grounding")
    camera = make_camera("/large/image/compressed", compressed=True)
    camera.warm_up(heard, vlm.wait_for)
    sent = camera.send(picture())
    vlm.wait_for(lambda: heard, 10.0)

    def answer(**options: Any) -> list[tuple[float, ...]]:
        """What the fake model says of those pixels, in coordinates of the whole image."""
        pixels = decode_compressed(bytes(sent.data), **options)
        frame = Frame(pixels, "camera", 0, source_width=WIDTH, source_height=HEIGHT)
        (found,) = create_vlm("fake").run([InferenceRequest("r", frame, "detect")])
        return [pytest.approx(region.box, rel=1e-5) for region in found.regions]

    half, whole = answer(at_least=(120, 120)), answer()
    assert (heard[-1].image_width, heard[-1].image_height) == (WIDTH, HEIGHT)
    assert boxes_of(heard[-1]) == half
    assert half != whole

    # Whoever looks at the annotated images is shown whole ones.
    shown = vlm.listen(Image, "annotated")
    heard.clear()

    def drawn() -> bool:
        camera.send(picture())
        return bool(shown) and bool(heard) and boxes_of(heard[-1]) == whole

    vlm.wait_for(drawn, 15.0)
    assert {(image.width, image.height) for image in shown} == {(WIDTH, HEIGHT)}

    vlm.set_parameters(jpeg_margin=0)
