"""Malformed images by the thousand: each refused with its code, at once, and with nothing kept.

1,000 cases here; `TORTURE_IMAGE_CASES=10000` for the long run, `TORTURE_SEED` for another one.
"""

from __future__ import annotations

import gc
import os
import random
import struct
import time
import zlib
from collections import Counter

import cv2
import numpy as np
import pytest

from librobot_vlm_ros.core import ErrorCode, VlmError, decode_compressed, decode_image
from librobot_vlm_ros.core.images import converter
from librobot_vlm_ros.core.images.encodings import ENCODINGS

CASES = int(os.environ.get("TORTURE_IMAGE_CASES", "1000"))
SEED = int(os.environ.get("TORTURE_SEED", "20240607"))
TIME_LIMIT_S = 0.005
GROWTH_LIMIT_BYTES = 32 * 2**20

JUNK = [None, "480", 3.5, float("nan"), [], {}, b"1", object(), True]
COLOUR = sorted(name for name, layout in ENCODINGS.items() if layout.kind != "depth")


def fitting(rng, encoding=None):
    """Fields that fit together, of a random size and encoding; the cases below break one of
    them.
    """
    encoding = encoding or rng.choice(COLOUR)
    layout = ENCODINGS[encoding]
    width, height = rng.randrange(4, 640, 2), rng.randrange(3, 480)
    step = width * layout.bytes_per_pixel + rng.choice([0, 0, 2, 64])
    return {
        "data": bytes(step * height),
        "width": width,
        "height": height,
        "encoding": encoding,
        "step": step,
        "is_bigendian": rng.random() < 0.5,
    }


def short_step(rng):
    fields = fitting(rng)
    needed = fields["width"] * ENCODINGS[fields["encoding"]].bytes_per_pixel
    fields["step"] = rng.randrange(0, needed)
    fields["data"] = bytes(fields["step"] * fields["height"])
    return fields, {ErrorCode.BAD_STEP}


def wrong_encoding(rng):
    """Rows of one gray byte a pixel that say they are wider."""
    fields = fitting(rng, "mono8")
    fields["step"] = fields["width"]
    fields["data"] = bytes(fields["step"] * fields["height"])
    fields["encoding"] = rng.choice([name for name in COLOUR if "8" not in name.split("_")[-1]])
    return fields, {ErrorCode.BAD_STEP}


def short_data(rng):
    fields = fitting(rng)
    fields["data"] = fields["data"][: rng.randrange(len(fields["data"]))]
    return fields, {ErrorCode.BAD_DATA_LENGTH}


def long_data(rng):
    fields = fitting(rng)
    fields["data"] += bytes(rng.choice([1, fields["step"], 100_000]))
    return fields, {ErrorCode.BAD_DATA_LENGTH}


def no_pixels(rng):
    fields = fitting(rng)
    fields[rng.choice(["width", "height"])] = 0
    return fields, {ErrorCode.EMPTY_IMAGE}


def huge_size(rng):
    fields = fitting(rng)
    size = rng.choice([2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 + 4, 10**4400, 16_385])
    for name in rng.sample(["width", "height"], rng.randrange(1, 3)):
        fields[name] = size
    return fields, {ErrorCode.IMAGE_TOO_LARGE}


def overflowing_product(rng):
    """width * 3 * height is 0, or fits, once cut to 32 bits."""
    fields = fitting(rng, "rgb8")
    fields["width"], fields["height"] = rng.choice([(65536, 65536), (2**30, 4), (2**16, 2**17)])
    fields["step"] = fields["width"] * 3 % 2**32
    fields["data"] = b""
    return fields, {ErrorCode.IMAGE_TOO_LARGE}


def negative_number(rng):
    fields = fitting(rng)
    fields[rng.choice(["width", "height", "step"])] = -rng.randrange(1, 2**40)
    return fields, {ErrorCode.BAD_IMAGE}


def unknown_encoding(rng):
    fields = fitting(rng)
    name = "".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.choice([0, 1, 5, 40, 10_000])))
    fields["encoding"] = rng.choice([name, "RGB8", "rgb", " rgb8", "rgb8\0", "YUYV", "bayer8"])
    return fields, {ErrorCode.UNKNOWN_ENCODING}


def unsupported_encoding(rng):
    fields = fitting(rng)
    fields["encoding"] = rng.choice(["nv12", "nv21", "32SC1", "64FC3", "8UC2", "16SC1", "32FC3"])
    return fields, {ErrorCode.UNSUPPORTED_ENCODING}


def depth(rng):
    fields = fitting(rng, rng.choice(["16UC1", "32FC1"]))
    return fields, {ErrorCode.UNSUPPORTED_ENCODING}


def depth_without_a_reading(rng):
    width, height = rng.randrange(1, 320), rng.randrange(1, 100)
    value = rng.choice([np.nan, np.inf, -np.inf, -2.0, 0.0])
    return {
        "data": np.full(width * height, value, "<f4").tobytes(),
        "width": width,
        "height": height,
        "encoding": "32FC1",
        "step": 4 * width,
        "allow_depth": True,
    }, {ErrorCode.NON_FINITE_DEPTH}


def junk_number(rng):
    fields = fitting(rng)
    fields[rng.choice(["width", "height", "step"])] = rng.choice(JUNK)
    return fields, {ErrorCode.BAD_IMAGE}


def junk_data(rng):
    fields = fitting(rng)
    size = len(fields["data"])
    fields["data"] = rng.choice(
        [None, "text", 7, [1, 2], np.zeros(4, np.float64), memoryview(bytes(2 * size))[::2]]
    )
    return fields, {ErrorCode.BAD_IMAGE}


def odd_layout(rng):
    fields = fitting(rng, rng.choice(["uyvy", "yuyv"]))
    fields["width"] -= 1
    if rng.random() < 0.5:
        fields = fitting(rng, "bayer_grbg8") | {"height": rng.randrange(1, 3)}
        fields["data"] = bytes(fields["step"] * fields["height"])
    return fields, {ErrorCode.BAD_IMAGE}


def picture(rng, kind):
    """A small picture whose bytes do not compress to nothing."""
    pixels = np.frombuffer(rng.randbytes(60 * 80 * 3), np.uint8).reshape(60, 80, 3)
    flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, rng.randrange(2)] if kind == "jpeg" else []
    return cv2.imencode(f".{kind}", cv2.resize(pixels, (160, 120)), flags)[1].tobytes()


def cut_off(rng):
    kind = rng.choice(["jpeg", "png"])
    data = picture(rng, kind)
    data = data[: rng.randrange(1, len(data) - 1)]
    return {"data": data, "format": rng.choice([kind, ""])}, {ErrorCode.CORRUPT_COMPRESSED}


def damaged_png(rng):
    data = bytearray(picture(rng, "png"))
    data[rng.randrange(8, len(data))] ^= 1 << rng.randrange(8)
    return {"data": bytes(data), "format": "png"}, {ErrorCode.CORRUPT_COMPRESSED}


def stump_with_an_end(rng):
    """Cut off soon after the picture begins, with an end marker put behind."""
    data = cv2.imencode(".jpg", np.full((480, 640, 3), rng.randrange(256), np.uint8))[1].tobytes()
    start = data.index(b"\xff\xda") + 14
    stump = data[: start + rng.randrange(0, 800)].rstrip(b"\xff")
    return {"data": stump + b"\xff\xd9", "format": "jpeg"}, {ErrorCode.CORRUPT_COMPRESSED}


def broken_segment_length(rng):
    data = bytearray(picture(rng, "jpeg"))
    at = rng.choice([4, data.index(b"\xff\xdb") + 2, data.index(b"\xff\xda") + 2])
    data[at : at + 2] = rng.choice([b"\x00\x00", b"\x00\x01", b"\xff\xff"])
    return {"data": bytes(data), "format": "jpeg"}, {
        ErrorCode.CORRUPT_COMPRESSED,
        ErrorCode.UNSUPPORTED_ENCODING,
        ErrorCode.IMAGE_TOO_LARGE,
        ErrorCode.EMPTY_IMAGE,
    }


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(rng):
    sizes = [(2**31 - 1, 2**31 - 1), (65_500, 65_500), (16_385, 1), (9000, 9000)]
    width, height = rng.choice(sizes)
    if rng.random() < 0.5 and width < 65_536:
        data = bytearray(picture(rng, "jpeg"))
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
        return {"data": bytes(data), "format": "jpeg"}, {ErrorCode.IMAGE_TOO_LARGE}
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body
    return {"data": data, "format": "png"}, {ErrorCode.IMAGE_TOO_LARGE}


def hollow_promise(rng):
    """A size within the limits, and a picture that is far too short for it."""
    width, height = rng.randrange(3000, 8000), rng.randrange(3000, 8000)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body
    return {"data": data, "format": "png"}, {ErrorCode.CORRUPT_COMPRESSED}


def no_picture(rng):
    data = rng.choice([b"", rng.randbytes(rng.randrange(1, 2000)), b"<html>", b"\xff\xd8\xff"])
    return {"data": data, "format": rng.choice(["jpeg", "jpg", ""])}, {
        ErrorCode.BAD_DATA_LENGTH,
        ErrorCode.CORRUPT_COMPRESSED,
        ErrorCode.UNSUPPORTED_ENCODING,  # random bytes may start like a BMP
    }


def wrong_format(rng):
    kind, other = rng.sample(["jpeg", "png"], 2)
    return {"data": picture(rng, kind), "format": f"bgr8; {other} compressed bgr8"}, {
        ErrorCode.BAD_IMAGE
    }


def unread_format(rng):
    name, code = rng.choice(
        [
            ("tiff", ErrorCode.UNSUPPORTED_ENCODING),
            ("32FC1; compressedDepth png", ErrorCode.UNSUPPORTED_ENCODING),
            ("16UC1; png compressed ", ErrorCode.UNSUPPORTED_ENCODING),
            ("nonsense", ErrorCode.UNKNOWN_ENCODING),
            (None, ErrorCode.BAD_IMAGE),
        ]
    )
    return {"data": picture(rng, "png"), "format": name}, {code}


KINDS = [
    short_step,
    wrong_encoding,
    short_data,
    long_data,
    no_pixels,
    huge_size,
    overflowing_product,
    negative_number,
    unknown_encoding,
    unsupported_encoding,
    depth,
    depth_without_a_reading,
    junk_number,
    junk_data,
    odd_layout,
    cut_off,
    damaged_png,
    stump_with_an_end,
    broken_segment_length,
    bomb,
    hollow_promise,
    no_picture,
    wrong_format,
    unread_format,
]


def decode(fields):
    fields = dict(fields)
    data = fields.pop("data")
    return (decode_compressed if "format" in fields else decode_image)(data, **fields)


def outcome(fields):
    """(code or None for a result, seconds)."""
    start = time.perf_counter()
    try:
        decode(fields)
    except VlmError as error:
        return error.code, time.perf_counter() - start
    return None, time.perf_counter() - start


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module", autouse=True)
def libraries_loaded():
    converter._converter()
    decode_compressed(picture(random.Random(0), "png"))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_every_malformed_image_is_refused_with_its_code_at_once_and_leaves_nothing():
    failures, slow, seen = [], [], Counter()
    start_bytes = None
    for index in range(CASES):
        kind = KINDS[index % len(KINDS)]
        fields, codes = kind(random.Random(f"{SEED}-{index}"))
        code, seconds = outcome(fields)
        # A busy machine may take the processor away in the middle: a slow case is tried again.
        for _ in range(5):
            if seconds <= TIME_LIMIT_S:
                break
            seconds = min(seconds, outcome(fields)[1])
        seen[code] += 1
        if code not in codes:
            failures.append((index, kind.__name__, code))
        if seconds > TIME_LIMIT_S:
            slow.append((index, kind.__name__, seconds))
        if index == 10 * len(KINDS):
            start_bytes = resident_bytes()
    assert failures == []
    assert slow == []
    if start_bytes is not None:
        assert resident_bytes() - start_bytes <= GROWTH_LIMIT_BYTES
    expected = {code for code in ErrorCode if 100 <= code < 200}
    assert set(seen) == expected, "every image code must have been met"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_good_image_is_served_right_after_a_malformed_one(kind):
    fields, codes = kind(random.Random(f"{SEED}-after-{kind.__name__}"))
    assert outcome(fields)[0] in codes
    good = decode_image(bytes(range(12)), height=2, width=2, encoding="rgb8", step=6)
    assert good[1, 1].tolist() == [9, 10, 11]


def test_no_damage_to_a_jpeg_gets_past_the_coded_errors():
    """A damaged JPEG may still be a picture: JPEG has no checksum. Then it has the promised
    size.
    """
    rng = random.Random(SEED)
    data, codes = picture(rng, "jpeg"), []
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            image = decode_compressed(bytes(damaged), format="jpeg")
        except VlmError as error:
            codes.append(error.code)
        else:
            assert image.dtype == np.uint8
            assert image.shape[2] == 3
    assert codes, "some of the damage must have been seen"
    assert all(100 <= code < 200 for code in codes)
