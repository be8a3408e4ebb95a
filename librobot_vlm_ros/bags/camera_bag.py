"""A camera's recording as a bag: images raw and as JPEG, instructions, and what is in view."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.bags.truth import TRUTH_TOPIC, FrameTruth, TruthObject
from librobot_vlm_ros.bags.writer import BagSummary, BagWriter, Storage
from librobot_vlm_ros.core import BagError, Box, ErrorCode

__all__ = ["AnyObject", "Pixels", "write_camera_bag"]

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
    return TruthObject(str(label), checked)
