"""Depth images as gray pictures, for those who ask for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.errors import ErrorCode, ImageError

__all__ = ["depth_to_rgb8"]


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
