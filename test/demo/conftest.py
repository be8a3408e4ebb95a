"""A demo run made by hand: two frames, known answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from librobot_vlm_ros.bags import FrameTruth, TruthObject
from librobot_vlm_ros.core import Region
from librobot_vlm_ros.demo.data import Answer, DemoRun, FrameRecord

DUCK = TruthObject("duck", (10.0, 10.0, 40.0, 40.0))
CUBE = TruthObject("red cube", (50.0, 10.0, 80.0, 40.0))


@pytest.fixture
def answer() -> Callable[..., Answer]:
    """`answer(task, frame, text="", prompt="", regions=[(label, box, score)], ...)`"""

    def make(
        task: str,
        stamp_ns: int,
        text: str = "",
        prompt: str = "",
        regions: list[tuple[str, tuple[float, ...], float]] | None = None,
        error: str = "",
        age_s: float = 0.1,
    ) -> Answer:
        found = tuple(Region(label, score, *box) for label, box, score in regions or [])
        return Answer(
            task, prompt, stamp_ns, "camera", (0, 0), text, found, None, error, age_s, 0.2
        )  # fmt: skip

    return make


@pytest.fixture
def run(answer: Callable[..., Answer]) -> DemoRun:
    """Frame 0 is answered without a fault; in frame 1 the cube is missed and a mug invented."""
    frames = [
        FrameRecord(
            number=number,
            stamp_ns=1000 + number,
            bag_ns=1000 + number,
            frame_id="camera",
            pixels=np.full((60, 100, 3), 90, np.uint8),
            truth=FrameTruth(1000 + number, (DUCK, CUBE)),
        )
        for number in range(2)
    ]
    duck, cube = ("duck", DUCK.box, 0.9), ("red cube", CUBE.box, 0.8)
    frames[0].answers = {
        "caption": answer("caption", 1000, "a red cube and a duck", age_s=0.1),
        "detect": answer("detect", 1000, regions=[duck, cube], age_s=0.2),
        "ground": answer("ground", 1000, prompt="pick up the duck", regions=[duck], age_s=0.3),
    }
    mug = ("mug", (0.0, 45.0, 20.0, 59.0), 0.4)
    frames[1].answers = {
        "caption": answer("caption", 1001, "a duck and a mug", age_s=0.1),
        "detect": answer("detect", 1001, regions=[duck, mug], age_s=0.2),
        "ground": answer("ground", 1001, prompt="pick up the duck", regions=[cube], age_s=0.3),
    }
    made = DemoRun("florence-2-tabletop", Path("tabletop"), "/camera/image_raw", frames)
    made.results = [None] * 6  # type: ignore[list-item]  # only counted here
    return made
