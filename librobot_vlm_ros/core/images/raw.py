"""`sensor_msgs/Image` to pixels: checked before a byte is touched, copied only where needed."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.errors import ErrorCode, ImageError, as_vlm_error, bad_image
from librobot_vlm_ros.core.images.converter import to_rgb8
from librobot_vlm_ros.core.images.encodings import Encoding, get_encoding
from librobot_vlm_ros.core.limits import DEFAULT_LIMITS, Limits

_MIN_BAYER_SIDE = 3  # OpenCV's demosaicing gives black below that, without an error
_UINT32_MAX = 2**32 - 1


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
    rows, columns = _unsigned("height", height), _unsigned("width", width)
    check_size(columns, rows, limits)
    layout = get_encoding(encoding)
    if layout.kind == "depth" and not allow_depth:
        raise ImageError(
            ErrorCode.UNSUPPORTED_ENCODING,
            f"encoding '{layout.name}' is a depth image, expected a colour or gray image",
            "Connect the camera's colour topic, or set allow_depth to take depth as grey.",
        )
    row_bytes = _unsigned("step", step)
    _check_layout(layout, columns, rows, row_bytes)
    if not isinstance(is_bigendian, (bool, int, np.bool_, np.integer)):
        raise bad_image(f"is_bigendian is of type {type(is_bigendian).__name__}, expected 0 or 1")
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
        raise bad_image(f"width of a YUV 4:2:2 image is {width}, expected an even number")
    if layout.kind == "bayer" and min(width, height) < _MIN_BAYER_SIDE:
        raise bad_image(
            f"Bayer image is {width}x{height} pixels, expected at least "
            f"{_MIN_BAYER_SIDE}x{_MIN_BAYER_SIDE} to find the colours between them"
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


def depth_to_rgb8(depth: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Depth [H, W] (uint16 millimetres or float32 metres) as gray RGB uint8 [H, W, 3].

    The nearest reading of the image becomes 1, the farthest 255, linearly; pixels without a reading
    (REP 118: 0, NaN; also infinite and negative ones) become 0. When all readings are equal they
    become 255.

    Raises `ImageError` (NON_FINITE_DEPTH) when no pixel has a reading.
    """
    valid = (depth > 0) & (depth < np.inf)  # NaN is neither
    if not valid.any():
        raise ImageError(
            ErrorCode.NON_FINITE_DEPTH,
            "no pixel of the depth image has a reading, all are 0, NaN, infinite or negative",
            "Check the sensor and its range.",
        )
    readings = depth[valid].astype(np.float64)
    nearest = readings.min()
    span = readings.max() - nearest
    gray = np.zeros(depth.shape, np.uint8)
    if span == 0:
        gray[valid] = 255
    else:
        readings -= nearest
        readings *= 254.0 / span
        gray[valid] = np.rint(readings).astype(np.uint8) + 1
    return np.repeat(gray[..., None], 3, axis=2)


# -- fields of a message as they come, made safe to calculate with --------------------------------


def _unsigned(name: str, value: object) -> int:
    """`value` as an int from 0 to 2**32 - 1, as in the message definition; BAD_IMAGE otherwise.

    A value out of range is not printed: turning a huge int into text can itself fail.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except Exception:  # whatever a foreign __index__ raises
        raise bad_image(f"{name} is of type {type(value).__name__}, expected an integer") from None
    if number < 0:
        raise bad_image(f"{name} is negative, expected 0 to 2**32 - 1")
    if number > _UINT32_MAX:
        raise ImageError(
            ErrorCode.IMAGE_TOO_LARGE, f"{name} is beyond 2**32 - 1, more than the message can hold"
        )
    return number


def check_size(width: int, height: int, limits: Limits) -> None:
    """Refuses an image without pixels (EMPTY_IMAGE) or beyond the limits (IMAGE_TOO_LARGE)."""
    if width == 0 or height == 0:
        raise ImageError(
            ErrorCode.EMPTY_IMAGE, f"image is {width}x{height} pixels, expected at least 1x1"
        )
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise ImageError(
            ErrorCode.IMAGE_TOO_LARGE,
            f"image is {width}x{height} pixels, allowed are {limits.max_pixels} pixels "
            f"and {limits.max_side} a side",
            "Publish smaller images.",
        )


def as_bytes_array(data: object) -> npt.NDArray[np.uint8]:
    """`data` as a flat uint8 array over the same memory, read-only: no copy.

    Takes bytes, bytearray, memoryview, array.array('B') and numpy uint8 arrays (C-contiguous).
    BAD_IMAGE for anything else; a list of ints is refused because converting one takes longer than
    a frame.
    """
    try:
        view = memoryview(data)  # type: ignore[arg-type]
        fits = view.format in ("B", "c", "<B", ">B", "@B") and view.c_contiguous
        flat = np.frombuffer(view, np.uint8) if fits and view.nbytes else np.empty(0, np.uint8)
    except (TypeError, ValueError, BufferError):
        raise bad_image(
            f"image data is of type {type(data).__name__}, expected bytes or a uint8 array"
        ) from None
    if not fits:
        raise bad_image(
            f"image data has items of format {view.format!r}"
            f"{'' if view.c_contiguous else ', not contiguous'}, expected contiguous uint8"
        )
    flat.flags.writeable = False
    return flat
