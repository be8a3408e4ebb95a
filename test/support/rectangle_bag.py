"""A tiny bag of coloured rectangles with exact boxes, for trying a pipeline and for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from librobot_vlm_ros.bags.camera_bag import Pixels, TruthObject, write_camera_bag
from librobot_vlm_ros.bags.writer import BagSummary

START_NS = 1_700_000_000_000_000_000
_COLOURS = {
    "red box": (220, 40, 40),
    "green box": (40, 180, 60),
    "blue box": (40, 70, 220),
    "yellow box": (230, 210, 50),
}


def rectangle_frames(
    count: int,
    *,
    rate_hz: float = 10.0,
    width: int = 64,
    height: int = 48,
    seed: int = 0,
    start_ns: int = START_NS,
) -> Iterator[tuple[int, Pixels, list[TruthObject]]]:
    """`count` frames of one to three rectangles each, every frame different; seeded.

    Yields (stamp in ns, RGB uint8 [height, width, 3], objects), as `write_camera_bag` takes them.
    Rectangles stand in columns of their own, so that none hides another.
    """
    random = np.random.default_rng(seed)
    names = list(_COLOURS)
    column = width // 3
    for number in range(count):
        pixels = np.full((height, width, 3), 200, dtype=np.uint8)
        # The frame's number in its first pixels: no two frames are alike.
        pixels[0, :2] = [[number % 256, number // 256 % 256, 0], [0, 0, 0]]
        objects = []
        for place in range(int(random.integers(1, 4))):
            left = place * column + int(random.integers(1, column // 3))
            right = (place + 1) * column - int(random.integers(1, column // 3))
            top = int(random.integers(1, height // 3))
            bottom = int(random.integers(2 * height // 3, height))
            label = names[int(random.integers(len(names)))]
            pixels[top:bottom, left:right] = _COLOURS[label]
            objects.append(TruthObject(label, (left, top, right, bottom)))
        yield start_ns + round(number * 1e9 / rate_hz), pixels, objects


def write_rectangle_bag(
    path: Path | str, count: int = 5, *, rate_hz: float = 10.0, **options: Any
) -> BagSummary:
    """A bag of `rectangle_frames` with an instruction before the first frame and one in the middle.

    `options` go to `write_camera_bag`.
    """
    middle = START_NS + round(count / 2 * 1e9 / rate_hz)
    instructions = [(START_NS - 1_000_000, "red box"), (middle - 1_000_000, "blue box")]
    return write_camera_bag(path, rectangle_frames(count, rate_hz=rate_hz), instructions, **options)
