"""A camera that the node has left gives it nothing more, whatever was under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from librobot_vlm_ros.core import Frame
from librobot_vlm_ros.ros.inputs import camera as camera_module
from librobot_vlm_ros.ros.inputs.camera import Camera, CameraFaults
from librobot_vlm_ros.ros.parameters.parameter_syntax import parse_cameras
from librobot_vlm_ros.ros.parameters.settings import Settings


class Engine:
    def __init__(self) -> None:
        self.offered: list[Frame] = []
        self.offer = self.offered.append


class Subscription:
    def close(self) -> None:
        pass


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def camera(engine: Engine) -> Camera:
    made = Camera.__new__(Camera)
    (made.setting,) = parse_cameras([], "/image", "raw")
    made.faults = CameraFaults()
    made._engine, made._subscription, made._closed = engine, Subscription(), False  # type: ignore[assignment]
    made._settings, made._jpeg_margin = Settings, lambda: 0
    return made


def test_what_was_being_decoded_when_it_was_left_is_not_offered(
    camera: Camera, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, go_on = threading.Event(), threading.Event()

    def convert(*_words: Any, **_options: Any) -> Frame:
        decoding.set()
        assert go_on.wait(5.0)
        return Frame(np.zeros((2, 2, 3), np.uint8), "camera", 1)

    monkeypatch.setattr(camera_module, "frame_from_message", convert)
    run(lambda: camera._take(None, 1, 0), meanwhile=go_on.set)
    assert len(engine.offered) == 1

    decoding.clear()
    go_on.clear()

    def leave() -> None:
        assert decoding.wait(5.0)
        camera.close()
        go_on.set()

    run(lambda: camera._take(None, 2, 0), meanwhile=leave)
    assert len(engine.offered) == 1
    camera._take(None, 3, 0)  # was waiting for its turn
    assert len(engine.offered) == 1


def run(work: Callable[[], None], meanwhile: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    meanwhile()
    thread.join(5.0)
    assert not thread.is_alive()
