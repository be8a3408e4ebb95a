"""Fields of an image message as they come, made safe to calculate with."""

from __future__ import annotations

import operator

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.errors import ErrorCode, ImageError
from librobot_vlm_ros.core.limits import Limits

__all__ = ["as_bytes_array", "check_size", "unsigned"]

_UINT32_MAX = 2**32 - 1


def unsigned(name: str, value: object) -> int:
    """`value` as an int from 0 to 2**32 - 1, as in the message definition; BAD_IMAGE otherwise.

    A value out of range is not printed: turning a huge int into text can itself fail.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except Exception:  # whatever a foreign __index__ raises
        raise ImageError(
            ErrorCode.BAD_IMAGE, f"{name} is of type {type(value).__name__}, expected an integer"
        ) from None
    if number < 0:
        raise ImageError(ErrorCode.BAD_IMAGE, f"{name} is negative, expected 0 to 2**32 - 1")
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
    except (TypeError, ValueError, BufferError):
        raise ImageError(
            ErrorCode.BAD_IMAGE,
            f"image data is of type {type(data).__name__}, expected bytes or a uint8 array",
        ) from None
    try:
        if view.format not in ("B", "c", "<B", ">B", "@B") or not view.c_contiguous:
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"image data has items of format {view.format!r}"
                f"{'' if view.c_contiguous else ', not contiguous'}, expected contiguous uint8",
            )
        flat: npt.NDArray[np.uint8] = (
            np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)
        )
    except (TypeError, ValueError, BufferError):
        raise ImageError(ErrorCode.BAD_IMAGE, "image data cannot be read as bytes") from None
    flat.flags.writeable = False
    return flat
