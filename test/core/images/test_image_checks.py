"""Raw images: every wrong field has its code, its numbers in the message, and costs nothing."""

from __future__ import annotations

import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from librobot_vlm_ros.core import ErrorCode, ImageError, Limits, VlmError, decode_image
from librobot_vlm_ros.core.images.encodings import ENCODINGS, get_encoding


def refused(**changes):
    fields = {"height": 4, "width": 6, "encoding": "rgb8", "step": 18, "data": bytes(72)} | changes
    with pytest.raises(ImageError) as caught:
        decode_image(fields.pop("data"), **fields)
    return caught.value


def test_the_unchanged_fields_are_fine():
    assert decode_image(bytes(72), height=4, width=6, encoding="rgb8", step=18).shape == (4, 6, 3)


class Unprintable:
    def __index__(self):
        raise RuntimeError("no")

    def __repr__(self):
        raise RuntimeError("no")

    __str__ = __repr__


JUNK = [
    "480",
    4.0,
    float("nan"),
    None,
    [],
    b"4",
    True,
    np.float32(4),
    np.array([4, 5]),
    Unprintable(),
]


@pytest.mark.parametrize("field", ["height", "width", "step"])
@pytest.mark.parametrize("value", JUNK, ids=lambda value: type(value).__name__)
def test_junk_in_a_number_is_refused(field, value):
    error = refused(**{field: value})
    assert error.code is ErrorCode.BAD_IMAGE
    assert field in error.message


@pytest.mark.parametrize("field", ["height", "width", "step"])
def test_numbers_that_no_message_can_hold_are_refused(field):
    assert refused(**{field: -1}).code is ErrorCode.BAD_IMAGE
    assert refused(**{field: 2**32}).code is ErrorCode.IMAGE_TOO_LARGE
    assert refused(**{field: 10**5000}).code is ErrorCode.IMAGE_TOO_LARGE


def test_numpy_integers_are_numbers():
    image = decode_image(
        bytes(72), height=np.uint32(4), width=np.int64(6), encoding="rgb8", step=np.uint32(18)
    )
    assert image.shape == (4, 6, 3)


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 4), (6, 0)])
def test_an_image_without_pixels_is_refused(width, height):
    assert refused(width=width, height=height).code is ErrorCode.EMPTY_IMAGE


@pytest.mark.parametrize(
    ("width", "height"),
    [(2**31, 2**31), (2**31, 1), (1, 2**32 - 1), (16385, 1), (8001, 8000), (65536, 65536)],
)
def test_sizes_beyond_the_limits_are_refused_before_the_data_is_looked_at(width, height):
    error = refused(width=width, height=height, step=width * 3 % 2**32, data=None)
    assert error.code is ErrorCode.IMAGE_TOO_LARGE
    assert f"{width}x{height}" in error.message


def test_the_limits_are_the_callers():
    small = Limits(max_pixels=24, max_side=6)
    decode_image(bytes(72), height=4, width=6, encoding="rgb8", step=18, limits=small)
    assert refused(limits=Limits(max_pixels=23)).code is ErrorCode.IMAGE_TOO_LARGE
    assert refused(limits=Limits(max_side=5)).code is ErrorCode.IMAGE_TOO_LARGE


@pytest.mark.parametrize("step", [0, 1, 17])
def test_a_step_shorter_than_a_row_is_refused(step):
    error = refused(step=step, data=bytes(step * 4))
    assert error.code is ErrorCode.BAD_STEP
    assert f"step is {step} bytes, expected at least 18" in error.message


def test_an_odd_step_of_16_bit_pixels_is_refused():
    error = refused(encoding="mono16", step=13, data=bytes(52))
    assert error.code is ErrorCode.BAD_STEP


@pytest.mark.parametrize("length", [0, 1, 71, 73, 144])
def test_data_that_is_shorter_or_longer_than_step_times_height_is_refused(length):
    error = refused(data=bytes(length))
    assert error.code is ErrorCode.BAD_DATA_LENGTH
    assert f"has {length} bytes, expected 72" in error.message


@pytest.mark.parametrize(
    "data",
    [
        None,
        "x" * 72,
        [0] * 72,
        72,
        array.array("H", [0] * 36),
        array.array("b", [0] * 72),
        np.zeros(72, np.float32),
        np.zeros(72, np.int8),
        np.zeros((4, 36), np.uint8)[:, ::2],
        memoryview(bytes(144))[::2],
        object(),
    ],
    ids=lambda data: type(data).__name__,
)
def test_data_that_are_no_bytes_are_refused(data):
    assert refused(data=data).code is ErrorCode.BAD_IMAGE


def test_a_released_buffer_is_refused():
    view = memoryview(bytes(72))
    view.release()
    assert refused(data=view).code is ErrorCode.BAD_IMAGE


@pytest.mark.parametrize(
    ("name", "code", "meant"),
    [
        ("RGB8", ErrorCode.UNKNOWN_ENCODING, "Did you mean 'rgb8'?"),
        ("rgb", ErrorCode.UNKNOWN_ENCODING, "Did you mean 'rgb8'?"),
        ("", ErrorCode.UNKNOWN_ENCODING, "ROS encoding"),
        ("jpeg", ErrorCode.UNKNOWN_ENCODING, "ROS encoding"),
        ("r" * 1_000_000, ErrorCode.UNKNOWN_ENCODING, ""),
        ("\ud800\n\x1b[2J", ErrorCode.UNKNOWN_ENCODING, "ROS encoding"),
        (None, ErrorCode.UNKNOWN_ENCODING, ""),
        (8, ErrorCode.UNKNOWN_ENCODING, ""),
        ("nv12", ErrorCode.UNSUPPORTED_ENCODING, "rgb8"),
        ("32FC3", ErrorCode.UNSUPPORTED_ENCODING, "rgb8"),
        ("8UC2", ErrorCode.UNSUPPORTED_ENCODING, "rgb8"),
        ("64F", ErrorCode.UNSUPPORTED_ENCODING, "rgb8"),
    ],
)
def test_encodings_that_are_not_read_are_told_apart(name, code, meant):
    error = refused(encoding=name)
    assert error.code is code
    assert meant in error.hint
    assert str(error).isprintable()
    assert len(str(error)) < 400


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1"])
def test_a_depth_image_is_refused_unless_asked_for(encoding):
    step = 6 * ENCODINGS[encoding].bytes_per_pixel
    error = refused(encoding=encoding, step=step, data=bytes(4 * step))
    assert error.code is ErrorCode.UNSUPPORTED_ENCODING
    assert "colour topic" in error.hint


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 0.0])
def test_depth_without_a_single_reading_is_refused(value):
    data = np.full((4, 6), value, "<f4").tobytes()
    error = refused(encoding="32FC1", step=24, data=data, allow_depth=True)
    assert error.code is ErrorCode.NON_FINITE_DEPTH


def test_an_odd_width_of_yuv_422_is_refused():
    error = refused(encoding="yuv422", width=5, step=10, data=bytes(40))
    assert error.code is ErrorCode.BAD_IMAGE


@pytest.mark.parametrize(("width", "height"), [(2, 2), (1, 9), (9, 2)])
def test_a_bayer_mosaic_too_small_to_interpolate_is_refused(width, height):
    error = refused(
        encoding="bayer_rggb8", width=width, height=height, step=width, data=bytes(width * height)
    )
    assert error.code is ErrorCode.BAD_IMAGE


@pytest.mark.parametrize("flag", [None, "big", 1.5])
def test_a_byte_order_flag_that_is_no_flag_is_refused(flag):
    assert refused(is_bigendian=flag).code is ErrorCode.BAD_IMAGE


def outcome(data, **fields):
    """(pixels, None) or (None, code); any other exception fails the test."""
    try:
        return decode_image(data, **fields), None
    except VlmError as error:
        return None, error.code if str(error).isprintable() else None


@given(
    encoding=st.sampled_from(sorted(ENCODINGS)),
    width=st.integers(1, 9),
    height=st.integers(1, 9),
    padding=st.integers(0, 5),
    big_endian=st.booleans(),
    fill=st.integers(0, 255),
)
def test_well_formed_fields_give_pixels_or_a_reason(
    encoding, width, height, padding, big_endian, fill
):
    """Whatever fits together decodes to the promised shape, or is refused for a stated reason."""
    layout = get_encoding(encoding)
    step = width * layout.bytes_per_pixel + padding
    data = bytes([fill]) * (step * height)
    reasons = {
        ErrorCode.BAD_STEP: step % layout.bytes_per_value != 0,
        ErrorCode.BAD_IMAGE: (layout.kind == "yuv422" and width % 2 == 1)
        or (layout.kind == "bayer" and min(width, height) < 3),
        ErrorCode.NON_FINITE_DEPTH: layout.kind == "depth",
    }
    fields = {"height": height, "width": width, "encoding": encoding, "step": step}
    image, code = outcome(data, is_bigendian=big_endian, allow_depth=True, **fields)
    if image is None:
        assert reasons[code]
        return
    assert not reasons[ErrorCode.BAD_STEP]
    assert not reasons[ErrorCode.BAD_IMAGE]
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    assert image.min() == image.max() or layout.kind in ("yuv422", "depth")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "height": st.integers() | st.none() | st.text() | st.floats(),
            "width": st.integers() | st.none() | st.text() | st.floats(),
            "step": st.integers() | st.none() | st.text() | st.floats(),
            "encoding": st.text() | st.none() | st.sampled_from(sorted(ENCODINGS)),
            "data": st.binary(max_size=200) | st.text() | st.lists(st.integers()) | st.none(),
            "is_bigendian": st.booleans() | st.none() | st.text(),
            "allow_depth": st.booleans(),
        },
    )
)
def test_nothing_but_coded_errors_ever_comes_out(changes):
    fields = {"height": 4, "width": 6, "encoding": "rgb8", "step": 18, "data": bytes(72)} | changes
    image, code = outcome(**fields)
    assert image is not None or code is not None
    assert image is None or image.shape == (fields["height"], fields["width"], 3)
