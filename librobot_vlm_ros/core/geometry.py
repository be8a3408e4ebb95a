"""Boxes and polygons in pixels: (x_min, y_min, x_max, y_max), edges at the outer borders of pixels.

An image is the box (0, 0, width, height); a box has width x_max - x_min. A box that is inside out
or not finite has no area and overlaps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.requests import Box

__all__ = [
    "box_area",
    "clip_box",
    "iou",
    "iou_matrix",
    "polygon_area",
    "polygon_box",
    "scale_box",
]


def box_area(box: Sequence[float]) -> float:
    """Area in square pixels."""
    return float(_areas(_as_boxes([box]))[0])


def _as_boxes(boxes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return np.asarray(boxes, np.float64).reshape(-1, 4)


def _areas(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sides = np.nan_to_num(boxes[:, 2:] - boxes[:, :2], nan=0.0, posinf=0.0, neginf=0.0)
    areas: npt.NDArray[np.float64] = np.maximum(sides, 0.0).prod(axis=1)
    return areas


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0 to 1; 0 where both have no area."""
    return float(iou_matrix([first], [second])[0, 0])


def iou_matrix(first: npt.ArrayLike, second: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Intersection over union of all boxes [N, 4] with all of `second` [M, 4], as [N, M]."""
    a, b = _as_boxes(first), _as_boxes(second)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        low = np.maximum(a[:, None, :2], b[None, :, :2])
        high = np.minimum(a[:, None, 2:], b[None, :, 2:])
        shared = np.maximum(high - low, 0.0).prod(axis=2)
        areas_a, areas_b = _areas(a)[:, None], _areas(b)[None, :]
        ratio = shared / (areas_a + areas_b - shared)
    usable = (areas_a > 0) & (areas_b > 0) & np.isfinite(ratio)
    return np.where(usable, ratio, 0.0)


def clip_box(box: Sequence[float], width: float, height: float) -> Box:
    """`box` cut to the image; one outside becomes a line or point on the border."""
    x_min, y_min, x_max, y_max = (float(value) for value in box)
    return (
        min(max(x_min, 0.0), float(width)),
        min(max(y_min, 0.0), float(height)),
        min(max(x_max, 0.0), float(width)),
        min(max(y_max, 0.0), float(height)),
    )


def scale_box(box: Sequence[float], scale_x: float, scale_y: float) -> Box:
    """`box` in an image resized by these factors."""
    x_min, y_min, x_max, y_max = (float(value) for value in box)
    return (x_min * scale_x, y_min * scale_y, x_max * scale_x, y_max * scale_y)


def polygon_area(points: Sequence[Sequence[float]]) -> float:
    """Area of a simple polygon [N, 2] in square pixels (shoelace formula); 0 below three points."""
    if len(points) < 3:
        return 0.0
    x, y = np.asarray(points, np.float64).T
    x, y = x - x[0], y - y[0]  # near the origin, so that large coordinates cancel early
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def polygon_box(points: Sequence[Sequence[float]]) -> Box:
    """The smallest box around at least one point [N, 2]."""
    low, high = np.min(np.asarray(points, np.float64), 0), np.max(points, 0)
    return (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
