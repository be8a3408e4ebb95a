"""Camera messages from their serialized bytes, without a copy of the pixels.

rclpy turns a message into Python objects field by field: for an image that is several times the
cost of taking its bytes. Here the few fields are read from the CDR bytes (the encoding that all ROS
middlewares share) and the pixels stay where they are.

Source of the format: OMG DDS-XTypes 1.3, clause 7.4 (plain CDR, version 1).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from builtin_interfaces.msg import Time
from std_msgs.msg import Header

from librobot_vlm_ros.core import ErrorCode, ImageError

__all__ = ["RawCompressedImage", "RawImage", "read_compressed_image", "read_image"]

_ENCAPSULATION = 4  # bytes before the first field; alignment is counted from there
_MAX_TEXT = 4096


@dataclass(frozen=True)
class RawImage:
    """The fields of `sensor_msgs/Image`; `data` is a view of the serialized message."""

    header: Header
    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: memoryview


@dataclass(frozen=True)
class RawCompressedImage:
    """The fields of `sensor_msgs/CompressedImage`; `data` is a view of the serialized message."""

    header: Header
    format: str
    data: memoryview


def read_image(serialized: bytes) -> RawImage:
    """A serialized `sensor_msgs/Image`. Raises `ImageError` (BAD_IMAGE) for bytes that are none."""
    reader = _Reader(serialized)
    return RawImage(
        header=reader.header(),
        height=reader.uint32(),
        width=reader.uint32(),
        encoding=reader.text(),
        is_bigendian=reader.uint8(),
        step=reader.uint32(),
        data=reader.octets(),
    )


def read_compressed_image(serialized: bytes) -> RawCompressedImage:
    """A serialized `sensor_msgs/CompressedImage`. Raises `ImageError` (BAD_IMAGE)."""
    reader = _Reader(serialized)
    return RawCompressedImage(reader.header(), reader.text(), reader.octets())


class _Reader:
    def __init__(self, serialized: bytes) -> None:
        self._view = memoryview(serialized).cast("B")
        if len(self._view) < _ENCAPSULATION or self._view[0] != 0 or self._view[1] not in (0, 1):
            raise _bad(
                f"it starts with {bytes(self._view[:4]).hex() or 'nothing'}, not as plain CDR"
            )
        self._order = "<" if self._view[1] == 1 else ">"
        self._place = _ENCAPSULATION

    def _take(self, form: str, size: int) -> Any:
        self._place += -(self._place - _ENCAPSULATION) % size  # each number is aligned to its size
        try:
            (value,) = struct.unpack_from(self._order + form, self._view, self._place)
        except struct.error as error:
            raise _bad(f"it ends after {len(self._view)} bytes, inside a field") from error
        self._place += size
        return value

    def uint8(self) -> int:
        return int(self._take("B", 1))

    def uint32(self) -> int:
        return int(self._take("I", 4))

    def octets(self) -> memoryview:
        length = self.uint32()
        end = self._place + length
        if end > len(self._view):
            raise _bad(f"it ends after {len(self._view)} bytes, its data would end at {end}")
        part = self._view[self._place : end]
        self._place = end
        return part

    def text(self) -> str:
        part = self.octets()  # with a closing NUL
        if len(part) > _MAX_TEXT:
            raise _bad(f"a text in it has {len(part)} bytes, expected at most {_MAX_TEXT}")
        return bytes(part).rstrip(b"\0").decode("utf-8", "replace")

    def header(self) -> Header:
        stamp = Time(sec=int(self._take("i", 4)), nanosec=self.uint32())
        return Header(stamp=stamp, frame_id=self.text())


def _bad(why: str) -> ImageError:
    return ImageError(
        ErrorCode.BAD_IMAGE,
        f"the serialized image cannot be read: {why}",
        "Publisher and subscriber must use the same middleware and message definition.",
    )
