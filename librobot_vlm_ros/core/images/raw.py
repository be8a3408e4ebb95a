"""`sensor_msgs/Image` to pixels: everything checked before a byte is touched, no copy where none is
needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.errors import ErrorCode, ImageError, as_vlm_error
from librobot_vlm_ros.core.images.buffers import as_bytes_array, check_size, unsigned
from librobot_vlm_ros.core.images.compressed import (
    CompressedHeader,
    decode_compressed,
    read_compressed_header,
)
from librobot_vlm_ros.core.images.converter import converter_name, to_rgb8
from librobot_vlm_ros.core.images.depth import depth_to_rgb8
from librobot_vlm_ros.core.images.encodings import Encoding, get_encoding
from librobot_vlm_ros.core.limits import DEFAULT_LIMITS, Limits

__all__ = [
    "CompressedHeader",
    "converter_name",
    "decode_compressed",
    "decode_image",
    "read_compressed_header",
]

_MIN_BAYER_SIDE = 3  # OpenCV's demosaicing gives black below that, without an error


def decode_image(
    data: object,
    *,
    height: int,
    width: int,
    encoding: str,
    step: int,
    is_bigendian: bool | int = False,
    allow_depth: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> npt.NDArray[np.uint8]:
    """The fields of a `sensor_msgs/Image` as RGB uint8 [H, W, 3], read-only.

    `rgb8` and `rgba8` give a view of `data` (strided where rows are padded); keep `data` unchanged
    as long as the view lives. Everything else is converted once. 16-bit values are brought to 8
    bits by rounding, alpha is dropped, `8UC3`/`16UC3` (and `C4`) are read in OpenCV's order BGR(A),
    `16UC1` and `32FC1` are depth and refused unless `allow_depth` (see `depth_to_rgb8`).

    `data` is bytes, bytearray, memoryview, array.array('B') or a uint8 array of exactly `step *
    height` bytes.

    Raises `ImageError`: BAD_IMAGE (fields of a wrong type, odd width of YUV 4:2:2, Bayer mosaics
    below 3x3), EMPTY_IMAGE, IMAGE_TOO_LARGE, UNKNOWN_ENCODING, UNSUPPORTED_ENCODING, BAD_STEP,
    BAD_DATA_LENGTH, NON_FINITE_DEPTH; `InferenceError` (OUT_OF_MEMORY). Nothing else.
    """
    rows, columns = unsigned("height", height), unsigned("width", width)
    check_size(columns, rows, limits)
    layout = get_encoding(encoding)
    if layout.kind == "depth" and not allow_depth:
        raise ImageError(
            ErrorCode.UNSUPPORTED_ENCODING,
            f"encoding '{layout.name}' is a depth image, expected a colour or gray image",
            "Connect the camera's colour topic, or set allow_depth to take depth as grey.",
        )
    row_bytes = unsigned("step", step)
    _check_layout(layout, columns, rows, row_bytes)
    if not isinstance(is_bigendian, (bool, int, np.bool_, np.integer)):
        raise ImageError(
            ErrorCode.BAD_IMAGE,
            f"is_bigendian is of type {type(is_bigendian).__name__}, expected 0 or 1",
        )
    flat = as_bytes_array(data)
    if flat.size != row_bytes * rows:
        raise ImageError(
            ErrorCode.BAD_DATA_LENGTH,
            f"image data has {flat.size} bytes, expected {row_bytes * rows} "
            f"(step {row_bytes} x height {rows})",
        )
    try:
        pixels = _decode(flat, layout, rows, columns, row_bytes, bool(is_bigendian))
    except MemoryError as exc:
        raise as_vlm_error(exc) from exc
    pixels.flags.writeable = False
    return pixels


def _check_layout(layout: Encoding, width: int, height: int, step: int) -> None:
    needed = width * layout.bytes_per_pixel
    if step < needed:
        raise ImageError(
            ErrorCode.BAD_STEP,
            f"step is {step} bytes, expected at least {needed} "
            f"({width} pixels of {layout.name}, {layout.bytes_per_pixel} bytes each)",
        )
    if step % layout.bytes_per_value:
        raise ImageError(
            ErrorCode.BAD_STEP,
            f"step is {step} bytes, expected a multiple of {layout.bytes_per_value} "
            f"for {layout.name}",
        )
    if layout.kind == "yuv422" and width % 2:
        raise ImageError(
            ErrorCode.BAD_IMAGE, f"width of a YUV 4:2:2 image is {width}, expected an even number"
        )
    if layout.kind == "bayer" and min(width, height) < _MIN_BAYER_SIDE:
        raise ImageError(
            ErrorCode.BAD_IMAGE,
            f"Bayer image is {width}x{height} pixels, expected at least "
            f"{_MIN_BAYER_SIDE}x{_MIN_BAYER_SIDE} to find the colours between them",
        )


def _decode(
    flat: npt.NDArray[np.uint8],
    layout: Encoding,
    height: int,
    width: int,
    step: int,
    big_endian: bool,
) -> npt.NDArray[np.uint8]:
    size = layout.bytes_per_value
    kind = "f" if layout.name == "32FC1" else "u"
    stored = np.dtype(f"{'>' if big_endian else '<'}{kind}{size}")
    shape: tuple[int, ...] = (height, width)
    strides: tuple[int, ...] = (step, layout.bytes_per_pixel)
    if layout.channels > 1:
        shape, strides = (*shape, layout.channels), (*strides, size)
    stored_pixels: npt.NDArray[Any] = np.ndarray(shape, stored, flat, strides=strides)
    if layout.name in ("rgb8", "rgba8"):
        return stored_pixels[..., :3]
    native = stored_pixels.astype(stored.newbyteorder("="), order="C", copy=False)
    if layout.kind == "depth":
        return depth_to_rgb8(native)
    return to_rgb8(np.ascontiguousarray(native), layout)
