"""Small files that want much: refused before any of it is decoded."""

from __future__ import annotations

import struct
import time
import zlib

import cv2
import numpy as np
import pytest

from librobot_vlm_ros.core import ErrorCode, ImageError, decode_compressed


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, *more: bytes) -> bytes:
    """A black PNG, its picture as small as deflate makes it; `more` chunks stand before it."""
    row = 1 + width * bits * {0: 1, 2: 3, 6: 4}[colour] // 8
    pack = zlib.compressobj(9)
    rows = [pack.compress(bytes(row)) for _ in range(height)]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    picture = chunk(b"IDAT", b"".join([*rows, pack.flush()]))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), *more, picture, chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize(
    ("width", "height", "bits", "colour"),
    [(8000, 8000, 8, 2), (16384, 3906, 16, 6), (16384, 3906, 8, 0), (6000, 6000, 8, 6)],
)
def test_a_picture_that_only_a_bomb_is(width, height, bits, colour):
    data = png(width, height, bits, colour)
    began = time.monotonic()
    with pytest.raises(ImageError, match="when decoded, allowed are") as caught:
        decode_compressed(data, format="png")
    assert caught.value.code == ErrorCode.IMAGE_TOO_LARGE
    assert time.monotonic() - began < 0.05


@pytest.mark.parametrize("side", [(3840, 2160), (5120, 2880), (5472, 3648)])
def test_a_covered_lens_is_no_bomb(side):
    width, height = side
    assert decode_compressed(png(width, height, 8, 2)).shape == (height, width, 3)
    black = cv2.imencode(".jpg", np.zeros((height, width, 3), np.uint8))[1].tobytes()
    assert decode_compressed(black, format="jpeg").shape == (height, width, 3)


def test_a_jpeg_of_filling_is_refused_at_once():
    data = b"\xff\xd8" + b"\xff" * 20_000_000
    began = time.monotonic()
    with pytest.raises(ImageError, match="mostly filling") as caught:
        decode_compressed(data)
    assert caught.value.code == ErrorCode.CORRUPT_COMPRESSED
    assert time.monotonic() - began < 0.05


def test_what_a_png_says_beside_its_picture_reaches_no_terminal(capfd):
    profile = b"k\n[FATAL] [1.0] [vlm]: forged\x1b[2J\0\0" + zlib.compress(b"no profile")
    told = chunk(b"iCCP", profile), chunk(b"tEXt", b"a\nb\0c"), chunk(b"acTL", bytes(8))
    plain, loud = png(8, 8, 8, 2), png(8, 8, 8, 2, *told)
    np.testing.assert_array_equal(decode_compressed(loud), decode_compressed(plain))
    assert capfd.readouterr() == ("", "")


def test_transparency_and_gamma_change_nothing():
    gamma = chunk(b"gAMA", struct.pack(">I", 45455))
    data = png(8, 8, 8, 2, gamma, chunk(b"tRNS", bytes(6)), chunk(b"tEXt", b"a\0b"))
    np.testing.assert_array_equal(decode_compressed(data), decode_compressed(png(8, 8, 8, 2)))
