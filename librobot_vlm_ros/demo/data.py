"""What a demo run collects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.bags import FrameTruth
from librobot_vlm_ros.core import Region
from librobot_vlm_ros.replay.lock_step import ResultMessage


@dataclass(frozen=True)
class Answer:
    """A result or the answer to a question, in plain types."""

    task: str
    prompt: str
    stamp_ns: int
    """Of the frame that it is about."""
    frame_id: str
    size: tuple[int, int]
    """(width, height) of the source image as the answer gives it; (0, 0) where it does not."""
    text: str
    regions: tuple[Region, ...]
    vector: npt.NDArray[np.float32] | None
    """The pooled embedding [D]; None where there is none."""
    score: float
    error: str
    """"" when it is fine."""
    age_s: float
    """Of the frame when it was published."""
    inference_s: float
    preprocess_s: float
    took_s: float
    """From sending (the frame, the question) to the answer's arrival here."""


@dataclass
class FrameRecord:
    """One frame of the bag and everything that was said about it."""

    number: int
    stamp_ns: int
    bag_ns: int
    """When it was recorded."""
    frame_id: str
    pixels: npt.NDArray[np.uint8]
    """RGB uint8 [H, W, 3]."""
    truth: FrameTruth | None
    instruction: str = ""
    """What the node was to look for while it was shown."""
    sent_s: float = 0.0
    """`time.monotonic()` when it was published."""
    answers: dict[str, Answer] = field(default_factory=dict)
    """Results of the standing tasks, by task."""


@dataclass
class DemoRun:
    """All of it."""

    model: str
    bag: Path
    image_topic: str
    frames: list[FrameRecord] = field(default_factory=list)
    results: list[ResultMessage] = field(default_factory=list)
    """Results of the standing tasks in order of arrival."""
    questions: list[Answer] = field(default_factory=list)
    instructions: list[tuple[int, str]] = field(default_factory=list)
    """(when recorded, text)"""
    unmatched: int = 0
    """Results whose stamp, frame or size is that of no frame that was sent."""
    play_s: float = 0.0
    load_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    """What went wrong, in words; a demo with any has failed."""

    def frame(self, stamp_ns: int) -> FrameRecord | None:
        """The frame of that stamp."""
        return next((frame for frame in self.frames if frame.stamp_ns == stamp_ns), None)


def spread(frames: Sequence[FrameRecord], count: int) -> list[FrameRecord]:
    """At most `count` frames, evenly over all of them."""
    count = min(count, len(frames))
    return [frames[(2 * turn + 1) * len(frames) // (2 * count)] for turn in range(count)]


def duration(seconds: float) -> str:
    """`212 ms`, or `29.6 s` from ten seconds on."""
    return f"{seconds:.1f} s" if seconds >= 10.0 else f"{seconds * 1e3:.0f} ms"


def answer_of(message: Any, *, took_s: float) -> Answer:
    """From a Caption, GroundingArray or Embedding message, or from a Query response."""
    info, stamp = message.info, message.header.stamp
    grounding = getattr(message, "grounding", message)
    return Answer(
        task=info.task,
        prompt=info.prompt,
        stamp_ns=int(stamp.sec) * 10**9 + int(stamp.nanosec),
        frame_id=message.header.frame_id,
        size=(
            int(getattr(grounding, "image_width", 0)),
            int(getattr(grounding, "image_height", 0)),
        ),
        text=getattr(message, "text", ""),
        regions=tuple(
            Region(item.label, item.score, item.x_min, item.y_min, item.x_max, item.y_max)
            for item in getattr(grounding, "regions", ())
        ),
        vector=_vector(getattr(message, "embedding", message)),
        score=float(getattr(message, "score", math.nan)),
        error=message.error_msg,
        age_s=float(info.age_s),
        inference_s=float(info.inference_s),
        preprocess_s=float(info.preprocess_s),
        took_s=took_s,
    )


def truth_regions(truth: FrameTruth) -> tuple[Region, ...]:
    """Ground truth in the form that the metrics take."""
    return tuple(Region(item.label, float("nan"), *item.box) for item in truth.objects)


def _vector(embedding: Any) -> npt.NDArray[np.float32] | None:
    if len(getattr(embedding, "shape", ())) != 1 or embedding.error_code:
        return None
    return np.frombuffer(bytes(embedding.data), dtype=embedding.dtype).astype(np.float32)
