"""Writing bags: MCAP with compressed chunks, or db3, readable by `ros2 bag` and Foxglove.

A bag is complete when its `metadata.yaml` is there: that is written last.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rosbags.interfaces import Connection
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys.store import Typestore

from librobot_vlm_ros.core import BagError, Box, ErrorCode, VlmError, as_vlm_error

from .quality import BagQos, to_recorded
from .truth import TRUTH_TOPIC, FrameTruth, TruthObject
from .typestore import extended_typestore

__all__ = ["BagSummary", "BagWriter", "Storage", "write_camera_bag"]

Storage = Literal["mcap", "db3"]
Pixels = npt.NDArray[np.uint8]

#: An object of a frame: a `TruthObject`, a (label, box) pair, or {"label": ..., "box": ...}.
AnyObject = TruthObject | tuple[str, Sequence[float]] | Mapping[str, Any]

_PLUGINS = {"mcap": StoragePlugin.MCAP, "db3": StoragePlugin.SQLITE3}
_VERSION: Literal[9] = 9  # of metadata.yaml; what Jazzy writes


@dataclass(frozen=True)
class BagSummary:
    """What was written."""

    path: Path
    counts: Mapping[str, int]
    """Messages by topic."""
    bytes_written: int


class BagWriter:
    """Writes a new bag folder; a context manager. Leaving it by an exception leaves no metadata.

    `overwrite` replaces an older bag at `path`, and nothing but a bag. `types` gives definitions
    beyond those of Jazzy and of this package (a reader's `typestore`, when copying).
    Raises `BagError`: PATH_NOT_ALLOWED when something is there, DISK_FULL, PERMISSION_DENIED.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        storage: Storage = "mcap",
        compress: bool = True,
        overwrite: bool = False,
        types: Typestore | None = None,
    ) -> None:
        if storage not in _PLUGINS:
            raise BagError(
                ErrorCode.WRONG_TYPE, f"storage is {storage!r}, expected one of {list(_PLUGINS)}"
            )
        self.path = Path(path)
        self.types = types or extended_typestore({})
        self.counts: dict[str, int] = {}
        self._storage = storage
        self._compress = compress
        self._overwrite = overwrite
        self._writer: Writer | None = None
        self._connections: dict[str, Connection] = {}

    def __enter__(self) -> BagWriter:
        try:
            if self._overwrite:
                _remove_bag(self.path)
            if self.path.exists():
                raise BagError(
                    ErrorCode.PATH_NOT_ALLOWED,
                    f"{self.path} exists already, a bag is written to a new folder",
                    "Remove it or choose another path.",
                )
            writer = Writer(self.path, version=_VERSION, storage_plugin=_PLUGINS[self._storage])
            if self._compress and self._storage == "mcap":  # chunks; every MCAP tool reads them
                writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
            writer.open()
        except Exception as error:
            raise _explain(self.path, error) from error
        self._writer = writer
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        if error is not None:
            writer.abort()
            return
        try:
            writer.close()
        except Exception as failure:
            raise _explain(self.path, failure) from failure

    def add_topic(self, name: str, type_name: str, qos: BagQos | None = None) -> None:
        """Declare a topic; needed before writing to it. Twice with the same type is fine."""
        known = self._connections.get(name)
        if known is not None:
            if known.msgtype != type_name:
                raise BagError(
                    ErrorCode.WRONG_TYPE, f"topic {name} holds {known.msgtype}, not {type_name}"
                )
            return
        if type_name not in self.types.fielddefs:
            raise BagError(
                ErrorCode.WRONG_TYPE,
                f"the definition of {type_name} (topic {name}) is not known",
                "Give a typestore that has it.",
            )
        try:
            self._connections[name] = self._open.add_connection(
                name,
                type_name,
                typestore=self.types,
                offered_qos_profiles=[to_recorded(qos or BagQos())],
            )
        except Exception as error:
            raise _explain(self.path, error) from error
        self.counts[name] = 0

    def write(self, topic: str, stamp_ns: int, data: bytes) -> None:
        """Append a serialized (CDR) message, recorded at `stamp_ns`."""
        connection = self._connections.get(topic)
        if connection is None:
            raise BagError(ErrorCode.TOPIC_NOT_IN_BAG, f"topic {topic} was not declared")
        try:
            self._open.write(connection, stamp_ns, data)
        except Exception as error:
            raise _explain(self.path, error) from error
        self.counts[topic] += 1

    def write_message(self, topic: str, stamp_ns: int, message: object) -> None:
        """Append a message object made from `self.types`."""
        connection = self._connections.get(topic)
        name = connection.msgtype if connection else ""
        self.write(topic, stamp_ns, bytes(self.types.serialize_cdr(message, name)))

    def make(self, type_name: str, **fields: Any) -> Any:
        """A message object of a known type."""
        return self.types.types[type_name](**fields)

    def header(self, stamp_ns: int, frame_id: str) -> Any:
        """A `std_msgs/msg/Header`."""
        seconds, nanoseconds = divmod(stamp_ns, 10**9)
        stamp = self.make("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanoseconds)
        return self.make("std_msgs/msg/Header", stamp=stamp, frame_id=frame_id)

    @property
    def _open(self) -> Writer:
        if self._writer is None:
            raise VlmError(ErrorCode.INTERNAL, f"{self.path} is written outside `with BagWriter`")
        return self._writer

    def summary(self) -> BagSummary:
        """Counts and size; the size is final after the `with` block."""
        size = sum(item.stat().st_size for item in self.path.glob("*") if item.is_file())
        return BagSummary(self.path, dict(self.counts), size)


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


def _remove_bag(path: Path) -> None:
    """Remove an older bag; refuse to remove anything that does not look like one."""
    if not path.exists():
        return
    foreign = [
        item.name
        for item in (path.iterdir() if path.is_dir() else [path])
        if item.name != "metadata.yaml" and item.suffix not in (".mcap", ".db3")
    ]
    if foreign or not path.is_dir():
        raise BagError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{path} is not replaced: it is no bag folder (found {sorted(foreign)[:3]})",
            "Remove it yourself or choose another path.",
        )
    shutil.rmtree(path)


def _explain(path: Path, error: Exception) -> VlmError:
    known = as_vlm_error(error)
    if known.code != ErrorCode.INTERNAL:
        return known
    text = str(error) or type(error).__name__
    code = ErrorCode.DISK_FULL if "disk is full" in text else ErrorCode.BAG_UNREADABLE
    return BagError(code, f"{path} cannot be written: {text}")
