"""Pixels of every encoding against literal bytes and plain arithmetic, with each converter."""

from __future__ import annotations

import array
import importlib.util
import sys

import numpy as np
import pytest

from librobot_vlm_ros.core import decode_image
from librobot_vlm_ros.core.images import converter as convert_module
from librobot_vlm_ros.core.images.encodings import ENCODINGS

CONVERTERS = [
    name
    for name, package in (("rosbags-image", "rosbags"), ("cv_bridge", "cv_bridge"))
    if importlib.util.find_spec(package)
]


@pytest.fixture(params=CONVERTERS, autouse=True, scope="module")
def converter(request):
    """The same vectors through each converter that this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "rosbags-image":
            patch.setitem(sys.modules, "cv_bridge", None)
        convert_module._converter.cache_clear()
        assert convert_module._converter()[0] == request.param
        yield request.param
    convert_module._converter.cache_clear()


def decode(data, width, height, encoding, **more):
    step = more.pop("step", width * ENCODINGS[encoding].bytes_per_pixel)
    return decode_image(
        data, height=height, width=width, encoding=encoding, step=step, **more
    ).tolist()


# Two pixels, one row: (1, 2, 3) and (250, 128, 0).
PIXELS = [[[1, 2, 3], [250, 128, 0]]]


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("rgb8", bytes([1, 2, 3, 250, 128, 0])),
        ("bgr8", bytes([3, 2, 1, 0, 128, 250])),
        ("8UC3", bytes([3, 2, 1, 0, 128, 250])),
        ("rgba8", bytes([1, 2, 3, 255, 250, 128, 0, 0])),
        ("bgra8", bytes([3, 2, 1, 255, 0, 128, 250, 0])),
        ("8UC4", bytes([3, 2, 1, 255, 0, 128, 250, 0])),
        # 257 v is the 16-bit value that stands for v.
        ("rgb16", bytes([1, 1, 2, 2, 3, 3, 250, 250, 128, 128, 0, 0])),
        ("bgr16", bytes([3, 3, 2, 2, 1, 1, 0, 0, 128, 128, 250, 250])),
        ("16UC3", bytes([3, 3, 2, 2, 1, 1, 0, 0, 128, 128, 250, 250])),
        ("rgba16", bytes([1, 1, 2, 2, 3, 3, 9, 9, 250, 250, 128, 128, 0, 0, 9, 9])),
        ("bgra16", bytes([3, 3, 2, 2, 1, 1, 9, 9, 0, 0, 128, 128, 250, 250, 9, 9])),
        ("16UC4", bytes([3, 3, 2, 2, 1, 1, 9, 9, 0, 0, 128, 128, 250, 250, 9, 9])),
    ],
)
def test_colour_encodings_give_the_same_two_pixels(encoding, data):
    assert decode(data, 2, 1, encoding) == PIXELS


@pytest.mark.parametrize("encoding", ["mono8", "8UC1"])
def test_gray_becomes_three_equal_channels(encoding):
    assert decode(bytes([0, 77, 255]), 3, 1, encoding) == [[[0] * 3, [77] * 3, [255] * 3]]


MONO16 = {
    0: 0,
    128: 0,
    129: 1,
    256: 1,
    385: 1,
    386: 2,
    32767: 127,
    32768: 128,
    65406: 254,
    65535: 255,
}


@pytest.mark.parametrize("big_endian", [False, True])
def test_mono16_is_rounded_to_the_nearest_level_in_either_byte_order(big_endian):
    order = "big" if big_endian else "little"
    data = b"".join(value.to_bytes(2, order) for value in MONO16)
    row = decode(data, len(MONO16), 1, "mono16", is_bigendian=big_endian)[0]
    assert row == [[level] * 3 for level in MONO16.values()]


def test_every_16_bit_value_is_rounded_as_exact_arithmetic_says():
    values = np.arange(65536, dtype=np.uint16)
    expected = np.floor(values.astype(np.float64) * 255 / 65535 + 0.5).astype(np.uint8)
    assert np.array_equal(convert_module.sixteen_to_eight(values), expected)


@pytest.mark.parametrize("encoding", ["rgb16", "bayer_rggb16"])
def test_big_endian_data_gives_what_little_endian_data_gives(encoding):
    rng = np.random.default_rng(7)
    channels = ENCODINGS[encoding].channels
    values = rng.integers(0, 65536, (6, 8, channels), dtype=np.uint16)
    little = decode(values.astype("<u2").tobytes(), 8, 6, encoding)
    assert decode(values.astype(">u2").tobytes(), 8, 6, encoding, is_bigendian=True) == little


def test_the_byte_order_flag_means_nothing_for_single_bytes():
    assert decode(bytes([3, 2, 1, 0, 128, 250]), 2, 1, "bgr8", is_bigendian=1) == PIXELS


COLOURS = {"r": 200, "g": 100, "b": 50}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_a_bayer_mosaic_of_one_colour_gives_that_colour_everywhere(pattern, bits):
    tile = np.array([COLOURS[letter] for letter in pattern], np.uint16).reshape(2, 2)
    mosaic = np.tile(tile, (3, 4))
    data = (mosaic * 257).astype("<u2").tobytes() if bits == 16 else mosaic.astype("u1").tobytes()
    expected = [[[200, 100, 50]] * 8] * 6
    assert decode(data, 8, 6, f"bayer_{pattern}{bits}") == expected


def test_a_bayer_mosaic_is_interpolated_between_neighbours():
    """Red rises by 20 a column; where the mosaic has no red, it is the mean of its neighbours."""
    mosaic = np.zeros((6, 8), np.uint8)
    mosaic[0::2, 0::2] = np.arange(0, 8, 2) * 20
    mosaic[0::2, 1::2] = mosaic[1::2, 0::2] = 90
    red = np.array(decode(mosaic.tobytes(), 8, 6, "bayer_rggb8"))[2:4, 2:6, 0]
    assert red.tolist() == [[40, 60, 80, 100]] * 2


# BT.601 with headroom, written out: R = 1.164 (Y-16) + 1.596 (V-128), and so on.
YUV_PAIRS = [(16, 235, 128, 128), (81, 81, 90, 240), (145, 41, 54, 34), (41, 150, 240, 110)]


def _bt601(y, u, v):
    light = 1.164 * (y - 16)
    red = light + 1.596 * (v - 128)
    green = light - 0.813 * (v - 128) - 0.391 * (u - 128)
    blue = light + 2.018 * (u - 128)
    return [min(max(value, 0), 255) for value in (red, green, blue)]


@pytest.mark.parametrize(
    ("encoding", "order"),
    [
        ("yuv422", "uyvy"),
        ("uyvy", "uyvy"),
        ("yuv422_yuy2", "yuyv"),
        ("yuyv", "yuyv"),
    ],
)
def test_both_orders_of_yuv_422_follow_bt601(encoding, order):
    rows = []
    for first, second, u, v in YUV_PAIRS:
        values = {"uyvy": (u, first, v, second), "yuyv": (first, u, second, v)}[order]
        rows.append(bytes(values))
    found = np.array(decode(b"".join(rows), 2, len(rows), encoding), float)
    expected = np.array([[_bt601(a, u, v), _bt601(b, u, v)] for a, b, u, v in YUV_PAIRS])
    assert np.abs(found - expected).max() <= 1.5


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if "32FC1" not in name])
def test_padding_at_the_end_of_rows_does_not_show(encoding):
    layout = ENCODINGS[encoding]
    rng = np.random.default_rng(1)
    row_bytes = 8 * layout.bytes_per_pixel
    packed = rng.integers(1, 256, (6, row_bytes), dtype=np.uint8)
    padded = rng.integers(0, 256, (6, row_bytes + 10), dtype=np.uint8)
    padded[:, :row_bytes] = packed
    plain = decode(packed.tobytes(), 8, 6, encoding, allow_depth=True)
    assert decode(padded.tobytes(), 8, 6, encoding, step=row_bytes + 10, allow_depth=True) == plain


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        lambda data: array.array("B", data),
        lambda data: np.frombuffer(data, np.uint8),
        lambda data: np.frombuffer(data, np.uint8).reshape(1, 2, 3),
    ],
    ids=["bytes", "bytearray", "memoryview", "array.array", "numpy", "numpy 3-D"],
)
def test_data_may_come_in_any_of_the_usual_containers(make):
    assert decode(make(bytes([3, 2, 1, 0, 128, 250])), 2, 1, "bgr8") == PIXELS


@pytest.mark.parametrize(("encoding", "channels"), [("rgb8", 3), ("rgba8", 4)])
@pytest.mark.parametrize("padding", [0, 5])
def test_rgb_is_a_view_of_the_message_and_cannot_be_written(encoding, channels, padding):
    step = 4 * channels + padding
    data = np.arange(3 * step, dtype=np.uint8)
    image = decode_image(data, height=3, width=4, encoding=encoding, step=step)
    assert np.shares_memory(image, data)
    assert image.shape == (3, 4, 3)
    assert image[2, 3].tolist() == [2 * step + 3 * channels + c for c in range(3)]
    assert not image.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0] = 1


def test_the_view_keeps_the_data_alive():
    image = decode_image(bytes(range(12)), height=2, width=2, encoding="rgb8", step=6)
    assert image.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


def test_converted_images_are_packed_and_cannot_be_written():
    image = decode_image(bytes(24), height=2, width=2, encoding="bgra8", step=12)
    assert image.flags.c_contiguous
    assert not image.flags.writeable


def test_depth_in_millimetres_runs_from_dark_near_to_bright_far():
    data = np.array([[0, 500, 1000, 1500]], "<u2").tobytes()
    row = decode(data, 4, 1, "16UC1", allow_depth=True)[0]
    assert row == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("order", ["<", ">"])
def test_depth_in_metres_shows_missing_readings_as_black(order):
    data = np.array([[np.nan, 1.0, 2.0, np.inf, -np.inf, -1.0]], f"{order}f4").tobytes()
    row = decode(data, 6, 1, "32FC1", allow_depth=True, is_bigendian=order == ">")[0]
    assert [pixel[0] for pixel in row] == [0, 1, 255, 0, 0, 0]


def test_a_flat_depth_image_is_bright():
    data = np.full((2, 2), 700, "<u2").tobytes()
    assert decode(data, 2, 2, "16UC1", allow_depth=True) == [[[255] * 3] * 2] * 2
