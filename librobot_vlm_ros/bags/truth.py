"""Ground truth of a frame, as our own bags carry it on `/ground_truth` (std_msgs/String).

One JSON object a frame: `{"stamp_ns": 123, "objects": [{"label": "duck", "box": [x_min, y_min,
x_max, y_max]}]}`, boxes in pixels of the image whose header has that stamp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from librobot_vlm_ros.core import BagError, Box, ErrorCode

if TYPE_CHECKING:
    from librobot_vlm_ros.bags.reader import BagReader

__all__ = ["TRUTH_TOPIC", "FrameTruth", "TruthObject", "read_truth"]

TRUTH_TOPIC = "/ground_truth"


@dataclass(frozen=True)
class TruthObject:
    """One object that is in view."""

    label: str
    box: Box
    """(x_min, y_min, x_max, y_max), pixels."""


@dataclass(frozen=True)
class FrameTruth:
    """All objects that are in view in one frame."""

    stamp_ns: int
    objects: tuple[TruthObject, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Label of each object, in order."""
        return tuple(item.label for item in self.objects)

    def to_json(self) -> str:
        """The text of the message; boxes to a hundredth of a pixel."""
        objects = [
            {"label": item.label, "box": [round(float(value), 2) for value in item.box]}
            for item in self.objects
        ]
        return json.dumps({"stamp_ns": int(self.stamp_ns), "objects": objects})

    @classmethod
    def from_json(cls, text: str) -> FrameTruth:
        """Read the text of a message; `BagError` (WRONG_TYPE) when it is none of ours."""
        try:
            data = json.loads(text)
            objects = [_object(item["label"], item["box"]) for item in data["objects"]]
            return cls(int(data["stamp_ns"]), tuple(objects))
        except (KeyError, TypeError, ValueError) as error:
            raise BagError(
                ErrorCode.WRONG_TYPE,
                f"{text[:200]!r} is no ground truth ({type(error).__name__}: {error}); expected "
                '{"stamp_ns": int, "objects": [{"label": str, "box": [4 numbers]}]}',
            ) from error


def _object(label: object, box: Sequence[float]) -> TruthObject:
    x_min, y_min, x_max, y_max = (float(value) for value in box)
    values = (x_min, y_min, x_max, y_max)
    if not isinstance(label, str) or not all(map(math.isfinite, values)):
        raise ValueError(f"label {label!r} with box {values}")
    return TruthObject(label, values)


def read_truth(reader: BagReader, topic: str = TRUTH_TOPIC) -> dict[int, FrameTruth]:
    """The ground truth of every frame of an open bag, by the stamp of the frame.

    Raises `BagError`: TOPIC_NOT_IN_BAG when it has none, WRONG_TYPE when the topic holds
    something else.
    """
    reader.require_topic(topic, "std_msgs/msg/String")
    found: dict[int, FrameTruth] = {}
    for message in reader.messages([topic]):
        truth = FrameTruth.from_json(reader.deserialize(message).data)
        found[truth.stamp_ns] = truth
    return found
