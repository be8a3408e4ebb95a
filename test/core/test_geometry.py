"""Boxes, polygons and coordinate transforms against arithmetic done by hand or with fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from librobot_vlm_ros.core import (
    ErrorCode,
    ImageTransform,
    RequestError,
    box_area,
    clip_box,
    iou,
    iou_matrix,
    polygon_area,
    polygon_box,
    scale_box,
)

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


@given(boxes, boxes)
def test_iou_counts_pixels(first, second):
    """The boxes have integer edges, so whole pixels can be counted one axis at a time."""
    shared = 1
    for axis in (0, 1):
        one = range(int(first[axis]), int(first[axis + 2]))
        other = range(int(second[axis]), int(second[axis + 2]))
        shared *= len(range(max(one.start, other.start), min(one.stop, other.stop)))
    union = box_area(first) + box_area(second) - shared
    assert iou(first, second) == pytest.approx(shared / union, abs=1e-12)


def test_the_matrix_has_a_row_for_each_box_also_for_none():
    matrix = iou_matrix([(0, 0, 2, 2), (0, 0, 1, 2)], [(0, 0, 2, 2), (5, 5, 6, 6), (1, 0, 2, 2)])
    assert matrix.tolist() == [[1.0, 0.0, 0.5], [0.5, 0.0, 0.0]]
    assert iou_matrix([], [(0, 0, 1, 1)]).shape == (0, 1)
    assert iou_matrix([(0, 0, 1, 1)], []).shape == (1, 0)


def test_boxes_are_cut_scaled_and_measured():
    assert clip_box((-5, 2, 50, 700), 40, 30) == (0.0, 2.0, 40.0, 30.0)
    assert clip_box((50, 50, 60, 60), 40, 30) == (40.0, 30.0, 40.0, 30.0)
    assert scale_box((1, 2, 3, 4), 10, 100) == (10.0, 200.0, 30.0, 400.0)
    assert box_area((1, 2, 4, 6)) == 12.0
    assert box_area((4, 6, 1, 2)) == 0.0


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([(0, 0), (4, 0), (4, 3)], 6.0),
        ([(0, 0), (0, 3), (4, 3), (4, 0)], 12.0),
        ([(4, 0), (4, 3), (0, 3), (0, 0)], 12.0),  # either direction
        ([(1e8, 1e8), (1e8 + 1, 1e8), (1e8 + 1, 1e8 + 1), (1e8, 1e8 + 1)], 1.0),
        ([(0, 0), (5, 5)], 0.0),
        ([], 0.0),
    ],
)
def test_polygon_areas(points, area):
    assert polygon_area(points) == area


def test_the_box_around_a_polygon():
    assert polygon_box([(3, 9), (1, 4), (7, 5)]) == (1.0, 4.0, 7.0, 9.0)


def test_a_squashed_image_maps_back_by_both_ratios():
    transform = ImageTransform.of(640, 480).resize(768, 768)
    assert transform.box_to_source((0, 0, 768, 768)) == (0.0, 0.0, 640.0, 480.0)
    assert transform.to_source(384, 192) == (320.0, 120.0)
    assert transform.to_model(320, 120) == (384.0, 192.0)


def test_a_padded_square_maps_back_past_its_borders():
    """LLaVA: 640x480 padded to a square, then resized."""
    transform = ImageTransform.of(640, 480).pad(top=80, bottom=80).resize(336, 336)
    assert (transform.width, transform.height) == (336, 336)
    assert transform.to_source(168, 168) == (320.0, 240.0)
    assert transform.box_to_source((0, 0, 336, 336)) == (0.0, 0.0, 640.0, 480.0)
    assert transform.box_to_source((0, 0, 336, 336), clip=False) == (0.0, -80.0, 640.0, 560.0)


def test_tiles_map_back_to_their_part():
    whole = ImageTransform.of(1920, 1080).resize(1344, 896)
    found = [whole.crop(x, y, 448, 448) for y in (0, 448) for x in (0, 448, 896)]
    boxes = [tile.box_to_source((0, 0, 448, 448)) for tile in found]
    assert boxes == [
        (x, y, x + 640.0, y + 540.0) for y in (0.0, 540.0) for x in (0.0, 640.0, 1280.0)
    ]


@pytest.mark.parametrize(
    ("point", "bins", "shift", "expected"),
    [
        ((0, 999), 1000, 0.5, (0.32, 479.76)),  # Florence-2: centre of the bin
        ((500, 1000), 1000, 0.0, (320.0, 480.0)),  # Qwen-VL, InternVL2
        ((512, 256), 1024, 0.0, (320.0, 120.0)),  # PaliGemma
        ((0.25, 0.75), 1, 0.0, (160.0, 360.0)),  # LLaVA
    ],
)
def test_bins_become_pixels_of_the_source(point, bins, shift, expected):
    transform = ImageTransform.of(640, 480).resize(192, 192)
    assert transform.from_grid(*point, bins, shift) == expected


steps = st.lists(
    st.one_of(
        st.tuples(st.just("resize"), st.integers(1, 3000), st.integers(1, 3000)),
        st.tuples(st.just("pad"), *[st.integers(0, 200)] * 4),
        st.tuples(st.just("crop"), st.floats(0, 0.9), st.floats(0, 0.9)),
    ),
    max_size=6,
)


@given(st.integers(1, 4000), st.integers(1, 4000), steps, pixel, pixel)
def test_any_chain_of_steps_is_undone_with_one_rounding(width, height, steps, x, y):
    transform = ImageTransform.of(width, height)
    exact_x, exact_y = Fraction(x), Fraction(y)
    for name, *numbers in steps:
        if name == "resize":
            exact_x *= Fraction(numbers[0], transform.width)
            exact_y *= Fraction(numbers[1], transform.height)
            transform = transform.resize(*numbers)
        elif name == "pad":
            exact_x, exact_y = exact_x + numbers[0], exact_y + numbers[1]
            transform = transform.pad(*numbers)
        else:
            left, top = (
                int(part * side)
                for part, side in zip(numbers, (transform.width, transform.height), strict=True)
            )
            exact_x, exact_y = exact_x - left, exact_y - top
            transform = transform.crop(left, top, transform.width - left, transform.height - top)
    assert transform.to_source(exact_x, exact_y) == (x, y)
    assert transform.to_model(x, y) == (float(exact_x), float(exact_y))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_coordinates_must_be_finite(value):
    with pytest.raises(RequestError) as caught:
        ImageTransform.of(10, 10).to_source(value, 1)
    assert caught.value.code is ErrorCode.BAD_REGION


@pytest.mark.parametrize(
    "step",
    [
        lambda: ImageTransform.of(0, 10),
        lambda: ImageTransform.of(10, 10).resize(10, 0),
        lambda: ImageTransform.of(10, 10).crop(0, 0, 0, 5),
        lambda: ImageTransform.of(10, 10).pad(left=-10),
        lambda: ImageTransform.of(10, 10).from_grid(1, 1, 0),
    ],
)
def test_nothing_can_become_empty(step):
    with pytest.raises(RequestError) as caught:
        step()
    assert caught.value.code is ErrorCode.BAD_PARAMETER


def test_a_tile_maps_back_to_the_very_pixels_it_was_cut_from():
    image = np.arange(40 * 60).reshape(40, 60)
    transform = ImageTransform.of(60, 40).pad(left=7, top=3).crop(10, 5, 20, 20)
    padded = np.pad(image, ((3, 0), (7, 0)))[5:25, 10:30]
    x, y = (int(value) for value in transform.to_source(4, 6))
    assert image[y, x] == padded[6, 4]
