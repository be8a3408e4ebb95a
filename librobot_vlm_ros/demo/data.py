"""What a demo run collects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.bags import FrameTruth
from librobot_vlm_ros.core import Region
from librobot_vlm_ros.replay.lock_step import ResultMessage

__all__ = ["Answer", "DemoRun", "FrameRecord", "answer_of", "regions_of", "truth_regions"]


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
    strangers: int = 0
    """Results whose stamp, frame or size is that of no frame that was sent."""
    play_s: float = 0.0
    load_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    """What went wrong, in words; a demo with any has failed."""

    def frame(self, stamp_ns: int) -> FrameRecord | None:
        """The frame of that stamp."""
        return next((frame for frame in self.frames if frame.stamp_ns == stamp_ns), None)


def answer_of(message: object, *, took_s: float) -> Answer:
    """From a Caption, GroundingArray or Embedding message, or from a Query response."""
    info, header = _get(message, "info"), _get(message, "header")
    grounding = _get(message, "grounding", message)
    embedding = _get(message, "embedding", message)
    stamp = header.stamp
    size = (_get(grounding, "image_width", 0), _get(grounding, "image_height", 0))
    return Answer(
        task=info.task,
        prompt=info.prompt,
        stamp_ns=int(stamp.sec) * 10**9 + int(stamp.nanosec),
        frame_id=header.frame_id,
        size=(int(size[0]), int(size[1])),
        text=_get(message, "text", ""),
        regions=regions_of(_get(grounding, "regions", ())),
        vector=_vector(embedding),
        score=float(_get(message, "score", float("nan"))),
        error=_get(message, "error_msg", ""),
        age_s=float(info.age_s),
        inference_s=float(info.inference_s),
        preprocess_s=float(info.preprocess_s),
        took_s=took_s,
    )


def regions_of(messages: Sequence[object]) -> tuple[Region, ...]:
    """`GroundedRegion` messages as regions."""
    return tuple(
        Region(
            label=_get(item, "label"),
            score=float(_get(item, "score")),
            x_min=float(_get(item, "x_min")),
            y_min=float(_get(item, "y_min")),
            x_max=float(_get(item, "x_max")),
            y_max=float(_get(item, "y_max")),
        )
        for item in messages
    )


def truth_regions(truth: FrameTruth) -> tuple[Region, ...]:
    """Ground truth in the form that the metrics take."""
    return tuple(Region(item.label, float("nan"), *item.box) for item in truth.objects)


def _vector(embedding: object) -> npt.NDArray[np.float32] | None:
    shape = _get(embedding, "shape", ())
    if len(shape) != 1 or _get(embedding, "error_code", 0):
        return None
    data = np.frombuffer(bytes(_get(embedding, "data")), dtype=_get(embedding, "dtype"))
    return data.astype(np.float32)


_MISSING = object()


def _get(message: object, name: str, default: object = _MISSING):  # type: ignore[no-untyped-def]
    """An attribute of a message of one of several types."""
    return getattr(message, name) if default is _MISSING else getattr(message, name, default)
