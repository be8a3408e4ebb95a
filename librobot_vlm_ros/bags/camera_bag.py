"""A camera's recording as a bag: images raw and as JPEG, instructions, and what is in view.

Ground truth goes on `/ground_truth` (std_msgs/String), one JSON object a frame: `{"stamp_ns": 123,
"objects": [{"label": "duck", "box": [x_min, y_min, x_max, y_max]}]}`, boxes in pixels of the image
whose header has that stamp. One such bag, ten seconds over a tabletop, ships with the package.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.bags.reader import BagReader
from librobot_vlm_ros.bags.writer import BagSummary, BagWriter, Storage
from librobot_vlm_ros.core import BagError, Box, ErrorCode

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
            objects = [_truth_object((item["label"], item["box"])) for item in data["objects"]]
            return cls(int(data["stamp_ns"]), tuple(objects))
        except (KeyError, TypeError, ValueError) as error:
            raise BagError(
                ErrorCode.WRONG_TYPE,
                f"{text[:200]!r} is no ground truth ({type(error).__name__}: {error}); expected "
                '{"stamp_ns": int, "objects": [{"label": str, "box": [4 numbers]}]}',
            ) from error


Pixels = npt.NDArray[np.uint8]

#: An object of a frame: a `TruthObject`, a (label, box) pair, or {"label": ..., "box": ...}.
AnyObject = TruthObject | tuple[str, Sequence[float]] | Mapping[str, Any]


def write_camera_bag(
    path: Path | str,
    frames: Iterable[tuple[int, Pixels, Iterable[AnyObject]]],
    instructions: Iterable[tuple[int, str]] = (),
    *,
    frame_id: str = "camera",
    raw_topic: str | None = "/camera/image_raw",
    jpeg_topic: str | None = "/camera_jpeg/image_raw/compressed",
    instruction_topic: str = "/instruction",
    truth_topic: str | None = TRUTH_TOPIC,
    storage: Storage = "mcap",
    compress: bool = True,
    jpeg_quality: int = 95,
    overwrite: bool = False,
) -> BagSummary:
    """Write a camera's recording with its ground truth.

    `frames` gives (stamp in ns, RGB uint8 [H, W, 3], objects in view) in order of time; each
    becomes an Image, a CompressedImage (JPEG) of the same pixels and stamp, and a `/ground_truth`
    string. `instructions` gives (time in ns, text). A topic of None is left out. All is recorded
    at its own stamp. Raises `BagError` as `BagWriter` does, WRONG_TYPE for pixels of another kind.
    """
    with BagWriter(path, storage=storage, compress=compress, overwrite=overwrite) as bag:
        if raw_topic:
            bag.add_topic(raw_topic, "sensor_msgs/msg/Image")
        if jpeg_topic:
            bag.add_topic(jpeg_topic, "sensor_msgs/msg/CompressedImage")
        if truth_topic:
            bag.add_topic(truth_topic, "std_msgs/msg/String")
        waiting = sorted(instructions)
        if waiting:
            bag.add_topic(instruction_topic, "std_msgs/msg/String")
        for stamp_ns, pixels, objects in frames:
            while waiting and waiting[0][0] <= stamp_ns:
                _write_text(bag, instruction_topic, *waiting.pop(0))
            _check_pixels(pixels)
            header = bag.header(stamp_ns, frame_id)
            if truth_topic:
                truth = FrameTruth(stamp_ns, tuple(_truth_object(item) for item in objects))
                _write_text(bag, truth_topic, stamp_ns, truth.to_json())
            if raw_topic:
                bag.write_message(raw_topic, stamp_ns, _image(bag, header, pixels))
            if jpeg_topic:
                image = _jpeg(bag, header, pixels, jpeg_quality)
                bag.write_message(jpeg_topic, stamp_ns, image)
        for stamp_ns, text in waiting:
            _write_text(bag, instruction_topic, stamp_ns, text)
    return bag.summary()


def _write_text(bag: BagWriter, topic: str, stamp_ns: int, text: str) -> None:
    bag.write_message(topic, stamp_ns, bag.make("std_msgs/msg/String", data=text))


def _check_pixels(pixels: Pixels) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise BagError(
            ErrorCode.WRONG_TYPE,
            f"a frame is {pixels.dtype}{list(pixels.shape)}, expected uint8[H, W, 3] in RGB",
        )


def _image(bag: BagWriter, header: Any, pixels: Pixels) -> Any:
    height, width = pixels.shape[:2]
    return bag.make(
        "sensor_msgs/msg/Image",
        header=header,
        height=height,
        width=width,
        encoding="rgb8",
        is_bigendian=0,
        step=3 * width,
        data=np.ascontiguousarray(pixels).reshape(-1),
    )


def _jpeg(bag: BagWriter, header: Any, pixels: Pixels, quality: int) -> Any:
    from PIL import Image  # only here: copying bags needs no image library

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    data = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    described = "rgb8; jpeg compressed bgr8"  # as compressed_image_transport writes it
    return bag.make("sensor_msgs/msg/CompressedImage", header=header, format=described, data=data)


def _truth_object(item: AnyObject) -> TruthObject:
    if isinstance(item, TruthObject):
        return item
    label, box = (item["label"], item["box"]) if isinstance(item, Mapping) else item
    x_min, y_min, x_max, y_max = (float(value) for value in box)
    checked: Box = (x_min, y_min, x_max, y_max)
    if not isinstance(label, str) or not all(map(math.isfinite, checked)):
        raise ValueError(f"label {label!r} with box {checked}")
    return TruthObject(label, checked)


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


def shipped_bag(name: str = "tabletop") -> Path:
    """Folder of the shipped bag `name`, from a checkout and from an installation alike.

    Raises `BagError` (FILE_NOT_FOUND) when it is not there.
    """
    folder = Path(__file__).parent / name
    if (folder / "metadata.yaml").is_file():
        return folder
    raise BagError(
        ErrorCode.FILE_NOT_FOUND,
        f"the shipped bag {name!r} is not in this installation (looked at {folder})",
        "Use a complete checkout, or give a bag of your own.",
    )
