"""Images read from serialized bytes are those that rclpy reads, and broken bytes are refused."""

from __future__ import annotations

import array
import struct
from typing import Any

import numpy as np
import pytest

from librobot_vlm_ros.core import ErrorCode, ImageError

pytestmark = pytest.mark.ros


def image(frame_id: str, encoding: str, size: int) -> Any:
    from sensor_msgs.msg import Image

    message = Image(encoding=encoding, height=size, width=size + 1, step=3 * size, is_bigendian=1)
    message.header.frame_id = frame_id
    message.header.stamp.sec, message.header.stamp.nanosec = -5, 999999999
    message.data = array.array("B", bytes(i % 256 for i in range(3 * size * size)))
    return message


def compressed(frame_id: str, form: str, size: int) -> Any:
    from sensor_msgs.msg import CompressedImage

    message = CompressedImage(format=form, data=array.array("B", bytes(size)))
    message.header.frame_id = frame_id
    return message


@pytest.mark.parametrize("frame_id", ["", "a", "ab", "abc", "abcd", "h\u00f6he", "x" * 100])
@pytest.mark.parametrize("encoding", ["", "rgb8", "bgr8;jpeg", "\u6f22"])
def test_every_field_is_read_as_rclpy_reads_it(frame_id: str, encoding: str) -> None:
    from rclpy.serialization import serialize_message

    from librobot_vlm_ros.ros.inputs.camera import read_image

    for size in (0, 1, 7):
        sent = image(frame_id, encoding, size)
        got = read_image(serialize_message(sent), compressed=False)
        for name in ("header", "height", "width", "encoding", "is_bigendian", "step"):
            assert getattr(got, name) == getattr(sent, name)
        assert bytes(got.data) == sent.data.tobytes()
        sent = compressed(frame_id, encoding, size)
        result = read_image(serialize_message(sent), compressed=True)
        assert (result.header, result.format) == (sent.header, sent.format)
        assert bytes(result.data) == sent.data.tobytes()


def test_the_pixels_are_not_copied() -> None:
    from rclpy.serialization import serialize_message

    from librobot_vlm_ros.ros.inputs.camera import read_image

    serialized = serialize_message(image("cam", "rgb8", 10))
    data = read_image(serialized, compressed=False).data
    assert np.shares_memory(data, np.frombuffer(serialized, np.uint8))


def test_bytes_of_the_other_order_are_read() -> None:
    from librobot_vlm_ros.ros.inputs.camera import read_image

    body = struct.pack(">iI", 7, 8) + struct.pack(">I4s", 4, b"cam\0")
    body += struct.pack(">I5s3x", 5, b"jpeg\0") + struct.pack(">I2s", 2, b"xy")
    got = read_image(b"\0\0\0\0" + body, compressed=True)
    assert (got.header.stamp.sec, got.header.frame_id, got.format) == (7, "cam", "jpeg")
    assert bytes(got.data) == b"xy"


def test_cut_off_and_foreign_bytes_are_refused() -> None:
    from rclpy.serialization import serialize_message

    from librobot_vlm_ros.ros.inputs.camera import read_image

    serialized = serialize_message(image("camera", "rgb8", 4))
    used = 4 + 8 + 4 + 7 + 1 + 8 + 4 + 5 + 3 + 4 + 4 + 48
    for length in range(used):
        with pytest.raises(ImageError) as caught:
            read_image(serialized[:length], compressed=False)
        assert caught.value.code == ErrorCode.BAD_IMAGE
    for start in (b"\0\x02\0\0", b"\xff" * 4):
        with pytest.raises(ImageError):
            read_image(start + serialized[4:], compressed=False)
    endless = bytearray(serialized)
    struct.pack_into("<I", endless, 12, 2**32 - 1)  # the length of frame_id
    with pytest.raises(ImageError):
        read_image(bytes(endless), compressed=False)
