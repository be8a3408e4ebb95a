"""Overlap of boxes against arithmetic done by hand or with fractions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from librobot_vlm_ros.evaluation.metrics import iou, iou_matrix

pixel = st.integers(0, 1000).map(float)
boxes = st.builds(
    lambda x, y, w, h: (x, y, x + w, y + h), pixel, pixel, st.integers(1, 500), st.integers(1, 500)
)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # touching
        ((0, 0, 10, 10), (2, 2, 4, 4), 4 / 100),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0),
        ((5, 5, 1, 1), (0, 0, 10, 10), 0.0),  # inside out
        ((math.nan, 0, 10, 10), (0, 0, 10, 10), 0.0),
        ((0, 0, math.inf, 10), (0, 0, 10, 10), 0.0),
        ((5, 0, math.inf, 10), (0, 0, 10, 10), 0.0),
    ],
)
def test_iou_of_known_boxes(first, second, expected):
    assert iou(first, second) == pytest.approx(expected)
    assert iou(second, first) == pytest.approx(expected)


def test_the_matrix_has_a_row_for_each_box_also_for_none():
    matrix = iou_matrix([(0, 0, 2, 2), (0, 0, 1, 2)], [(0, 0, 2, 2), (5, 5, 6, 6), (1, 0, 2, 2)])
    assert matrix.tolist() == [[1.0, 0.0, 0.5], [0.5, 0.0, 0.0]]
    assert iou_matrix([], [(0, 0, 1, 1)]).shape == (0, 1)
    assert iou_matrix([(0, 0, 1, 1)], []).shape == (1, 0)


@given(boxes, boxes)
def test_iou_counts_pixels(first, second):
    """The boxes have integer edges, so whole pixels can be counted one axis at a time."""
    shared = 1
    for axis in (0, 1):
        one = range(int(first[axis]), int(first[axis + 2]))
        other = range(int(second[axis]), int(second[axis + 2]))
        shared *= len(range(max(one.start, other.start), min(one.stop, other.stop)))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    assert iou(first, second) == pytest.approx(shared / (sum(areas) - shared), abs=1e-12)
