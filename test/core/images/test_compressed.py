"""JPEG and PNG: literal files with known pixels, and everything that must be refused undecoded."""

from __future__ import annotations

import base64
import struct
import zlib

import cv2
import numpy as np
import pytest

from librobot_vlm_ros.core import (
    ErrorCode,
    ImageError,
    Limits,
    decode_compressed,
    read_compressed_header,
)

# 16x8 pixels: left half about (200, 40, 90), right half about (20, 160, 230).
TWO_COLOURS = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYG"
    "CAsICQoKCgoKBggLDAsKDAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoK"
    "CgoKCgoKCgoKCgoKCgoKCgoKCgr/wAARCAAIABADAREAAhEBAxEB/8QAFAABAAAAAAAAAAAAAAAAAAAACP/EABQQAQAA"
    "AAAAAAAAAAAAAAAAAAD/xAAXAQADAQAAAAAAAAAAAAAAAAAECAkK/8QAFBEBAAAAAAAAAAAAAAAAAAAAAP/aAAwDAQAC"
    "EQMRAD8AO4dTAgD6Mz7/2Q=="
)
# EXIF data that asks viewers to turn the picture by 90 degrees.
EXIF_TURNED = base64.b64decode("/+EAIkV4aWYAAE1NACoAAAAIAAEBEgADAAAAAQAGAAAAAAAA")
# 8x8 pixels of CMYK (0, 128, 255, 0), written inverted as Adobe does.
CMYK = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwACAQEBAQECAQEBAgICAgIEAwICAgIFBAQDBAYFBgYGBQYGBgcJCAYHCQcGBg"
    "gLCAkKCgoKCgYICwwLCgwJCgoK/8AAFAgACAAIBEMRAE0RAFkRAEsRAP/EABYAAQEBAAAAAAAAAAAAAAAAAAkDCv/E"
    "ABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAOBEMATQBZAEsAAD8AfxNn/P4//9k="
)
GRAY_77 = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBw"
    "YGCAsICQoKCgoKBggLDAsKDAkKCgr/wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAACP/EABQQAQAAAAAA"
    "AAAAAAAAAAAAAAD/2gAIAQEAAD8AGb//2Q=="
)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, raw, *, before=b"", interlace=0):
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + before
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def picture(width=64, height=48):
    rng = np.random.default_rng(3)
    return cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (5, 5), 2)


def jpeg(*flags, width=64, height=48):
    return cv2.imencode(".jpg", picture(width, height), list(flags))[1].tobytes()


def refused(data, **more):
    with pytest.raises(ImageError) as caught:
        decode_compressed(data, **more)
    return caught.value


def near(image, expected, tolerance=2):
    return np.abs(image.astype(int) - np.array(expected)).max() <= tolerance


def test_a_colour_jpeg_comes_out_as_rgb():
    image = decode_compressed(TWO_COLOURS, format="rgb8; jpeg compressed bgr8")
    assert image.shape == (8, 16, 3)
    assert near(image[:, :8], (200, 40, 90))
    assert near(image[:, 8:], (20, 160, 230))
    assert not image.flags.writeable


def test_exif_orientation_is_ignored_as_calibration_expects():
    turned = TWO_COLOURS[:20] + EXIF_TURNED + TWO_COLOURS[20:]
    assert np.array_equal(decode_compressed(turned), decode_compressed(TWO_COLOURS))


def test_a_cmyk_jpeg_comes_out_as_rgb():
    assert near(decode_compressed(CMYK), (255, 127, 0))


def test_a_gray_jpeg_has_three_equal_channels():
    image = decode_compressed(GRAY_77, format="mono8; jpeg compressed ")
    assert image.tolist() == [[[77] * 3] * 8] * 8


@pytest.mark.parametrize(
    "flags",
    [
        (),
        (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        (cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
        (cv2.IMWRITE_JPEG_OPTIMIZE, 1, cv2.IMWRITE_JPEG_QUALITY, 1),
    ],
    ids=["baseline", "progressive", "restart markers", "worst quality"],
)
def test_jpegs_of_every_usual_kind_are_read(flags):
    data = jpeg(*flags)
    expected = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), 1), cv2.COLOR_BGR2RGB)
    assert np.array_equal(decode_compressed(data), expected)


@pytest.mark.parametrize("tail", [b"\0" * 500, b"\xff" * 7, b"old frame \xff\xd9", b"\xff\xd8\xff"])
def test_what_a_camera_leaves_behind_the_end_marker_is_ignored(tail):
    assert np.array_equal(decode_compressed(TWO_COLOURS + tail), decode_compressed(TWO_COLOURS))


PIXELS = [[[1, 2, 3], [250, 128, 0]], [[9, 8, 7], [255, 0, 255]]]
RAW_RGB = b"\0" + bytes([1, 2, 3, 250, 128, 0]) + b"\0" + bytes([9, 8, 7, 255, 0, 255])


def test_a_colour_png_is_exact():
    assert decode_compressed(png(2, 2, 8, 2, RAW_RGB), format="png").tolist() == PIXELS


def test_the_alpha_of_a_png_is_dropped():
    raw = b"\0" + bytes([1, 2, 3, 0, 250, 128, 0, 9]) + b"\0" + bytes([9, 8, 7, 1, 255, 0, 255, 2])
    assert decode_compressed(png(2, 2, 8, 6, raw), format="png").tolist() == PIXELS


def test_a_palette_png_is_read():
    palette = chunk(b"PLTE", bytes([1, 2, 3, 250, 128, 0]))
    data = png(2, 1, 8, 3, b"\0\x00\x01", before=palette)
    assert decode_compressed(data).tolist() == PIXELS[:1]


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_16_bit_png_is_rounded_like_a_16_bit_raw_image(colour, channels):
    levels = {0: 0, 128: 0, 129: 1, 385: 1, 386: 2, 32768: 128, 65406: 254, 65535: 255}
    raw = b"\0" + b"".join(struct.pack(">H", value) * channels for value in levels)
    data = png(len(levels), 1, 16, colour, raw)
    assert decode_compressed(data).tolist() == [[[level] * 3 for level in levels.values()]]


def test_a_one_bit_png_is_black_and_white():
    data = png(8, 1, 1, 0, bytes([0, 0b10110001]))
    row = decode_compressed(data)[0, :, 0].tolist()
    assert row == [255, 0, 255, 255, 0, 0, 0, 255]


def test_a_16_bit_png_that_says_depth_is_refused_unless_asked_for():
    raw = b"\0" + struct.pack(">4H", 0, 500, 1000, 1500)
    data = png(4, 1, 16, 0, raw)
    error = refused(data, format="16UC1; png compressed ")
    assert error.code is ErrorCode.UNSUPPORTED_ENCODING
    image = decode_compressed(data, format="16UC1; png compressed ", allow_depth=True)
    assert image[0, :, 0].tolist() == [0, 1, 128, 255]
    none = png(4, 1, 16, 0, b"\0" * 9)
    error = refused(none, format="16UC1; png compressed ", allow_depth=True)
    assert error.code is ErrorCode.NON_FINITE_DEPTH


@pytest.mark.parametrize(
    "text",
    ["", "jpeg", "JPEG", "jpg", "mjpeg", "image/jpeg", "rgb8; jpeg compressed bgr8", "bgr8", "\0"],
)
def test_the_format_field_as_publishers_write_it_is_understood(text):
    assert read_compressed_header(TWO_COLOURS, format=text).kind == "JPEG"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("png", ErrorCode.BAD_IMAGE),
        ("rgb8; png compressed ", ErrorCode.BAD_IMAGE),
        ("tiff", ErrorCode.UNSUPPORTED_ENCODING),
        ("h264", ErrorCode.UNSUPPORTED_ENCODING),
        ("16UC1; compressedDepth png", ErrorCode.UNSUPPORTED_ENCODING),
        ("rainbow", ErrorCode.UNKNOWN_ENCODING),
        ("x" * 1_000_000, ErrorCode.UNKNOWN_ENCODING),
        (None, ErrorCode.BAD_IMAGE),
        (b"jpeg", ErrorCode.BAD_IMAGE),
    ],
)
def test_a_format_field_that_the_bytes_contradict_is_refused(text, code):
    assert refused(TWO_COLOURS, format=text).code is code


def test_a_contradiction_is_explained():
    error = refused(TWO_COLOURS, format="png")
    assert str(error) == (
        "BAD_IMAGE(100): format says PNG, but the data is JPEG. Set the message's format to 'jpeg'."
    )


def test_the_header_is_read_without_decoding():
    header = read_compressed_header(jpeg(width=320, height=200)[:700])  # cut off in the picture
    assert (header.kind, header.width, header.height) == ("JPEG", 320, 200)
    assert (header.channels, header.bits) == (3, 8)
    header = read_compressed_header(png(7, 5, 16, 4, b""))
    assert (header.kind, header.width, header.height, header.bits) == ("PNG", 7, 5, 16)


@pytest.mark.parametrize("flags", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)])
def test_a_jpeg_cut_off_anywhere_is_refused(flags):
    data = jpeg(*flags)
    for end in range(3, len(data) - 1, 7):
        assert refused(data[:end]).code is ErrorCode.CORRUPT_COMPRESSED, end


def test_a_jpeg_whose_thumbnail_has_an_end_marker_is_still_cut_off():
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(TWO_COLOURS)) + TWO_COLOURS
    data = TWO_COLOURS[:2] + thumbnail + TWO_COLOURS[2:]
    assert np.array_equal(decode_compressed(data), decode_compressed(TWO_COLOURS))
    assert refused(data[:-2]).code is ErrorCode.CORRUPT_COMPRESSED


def test_an_end_marker_glued_to_a_stump_does_not_make_a_picture():
    data = jpeg(width=640, height=480)
    start = data.index(b"\xff\xda")
    error = refused(data[: start + 300] + b"\xff\xd9")
    assert error.code is ErrorCode.CORRUPT_COMPRESSED
    assert "too few" in error.message


def test_a_png_cut_off_anywhere_is_refused():
    data = png(2, 2, 8, 2, RAW_RGB)
    for end in range(8, len(data)):
        assert refused(data[:end]).code is ErrorCode.CORRUPT_COMPRESSED, end


def test_a_png_with_any_bit_flipped_is_refused():
    data = png(2, 2, 8, 2, RAW_RGB)
    for position in range(8, len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        assert refused(damaged).code is ErrorCode.CORRUPT_COMPRESSED, position


@pytest.mark.parametrize("raw", [RAW_RGB[:-1], b""])
def test_a_png_with_too_few_rows_is_refused(raw):
    assert refused(png(2, 2, 8, 2, raw)).code is ErrorCode.CORRUPT_COMPRESSED


@pytest.mark.parametrize(
    ("width", "height"), [(65535, 65535), (2**31 - 1, 2**31 - 1), (100_000, 1), (8001, 8000)]
)
def test_a_png_bomb_is_refused_by_its_header(width, height):
    error = refused(png(width, height, 8, 2, b"\0" * 1000))
    assert error.code is ErrorCode.IMAGE_TOO_LARGE
    assert f"{width}x{height}" in error.message


def test_a_jpeg_bomb_is_refused_by_its_header():
    frame = TWO_COLOURS.index(b"\xff\xc0")
    bomb = TWO_COLOURS[: frame + 5] + struct.pack(">HH", 65500, 65500) + TWO_COLOURS[frame + 9 :]
    assert refused(bomb).code is ErrorCode.IMAGE_TOO_LARGE
    promised = TWO_COLOURS[: frame + 5] + struct.pack(">HH", 4000, 4000) + TWO_COLOURS[frame + 9 :]
    assert refused(promised).code is ErrorCode.CORRUPT_COMPRESSED


def test_a_png_that_promises_more_than_its_bytes_can_hold_is_refused():
    error = refused(png(8000, 8000, 8, 2, b"\0" * 1000))
    assert error.code is ErrorCode.CORRUPT_COMPRESSED
    assert "too few" in error.message


def test_endless_chunks_segments_and_scans_are_refused():
    head, end = png(2, 2, 8, 2, RAW_RGB)[:33], chunk(b"IEND", b"")
    many_chunks = head + chunk(b"tEXt", b"") * 50_000 + chunk(b"IDAT", b"") + end
    assert "too many chunks" in refused(many_chunks).message
    start = TWO_COLOURS.index(b"\xff\xda")
    scan = TWO_COLOURS[start:-2]
    assert "scans" in refused(TWO_COLOURS[:start] + scan * 500 + b"\xff\xd9").message
    comments = b"\xff\xfe\x00\x02" * 100_000
    assert "too many" in refused(b"\xff\xd8" + comments + TWO_COLOURS[2:]).message
    assert "too many" in refused(TWO_COLOURS[:start] + comments + TWO_COLOURS[start:]).message


@pytest.mark.parametrize(("size", "code"), [((0, 8), 105), ((8, 0), 105), ((0, 0), 105)])
def test_pictures_without_pixels_are_refused(size, code):
    assert refused(png(*size, 8, 2, b"")).code == code
    frame = TWO_COLOURS.index(b"\xff\xc0")
    data = TWO_COLOURS[: frame + 5] + struct.pack(">HH", *size) + TWO_COLOURS[frame + 9 :]
    assert refused(data).code == code


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", ErrorCode.BAD_DATA_LENGTH),
        (b"\xff", ErrorCode.CORRUPT_COMPRESSED),
        (b"hello", ErrorCode.CORRUPT_COMPRESSED),
        (b"RIFF....WEBP", ErrorCode.UNSUPPORTED_ENCODING),
        (b"GIF89a", ErrorCode.UNSUPPORTED_ENCODING),
        (b"BM" + bytes(60), ErrorCode.UNSUPPORTED_ENCODING),
        (b"II*\0" + bytes(60), ErrorCode.UNSUPPORTED_ENCODING),
        (b"\xff\xd8\xff\xd9", ErrorCode.CORRUPT_COMPRESSED),
        (b"\xff\xd8\xff\xd8\xff\xd8", ErrorCode.CORRUPT_COMPRESSED),
        (b"\xff\xd8\xff" + b"\xff" * 1000, ErrorCode.CORRUPT_COMPRESSED),
        (b"\xff\xd8\xff\xe0\x00\x01", ErrorCode.CORRUPT_COMPRESSED),
        (b"\xff\xd8\xff\xc0\x00\x04\x08\x00", ErrorCode.CORRUPT_COMPRESSED),
        (None, ErrorCode.BAD_IMAGE),
        ([255, 216], ErrorCode.BAD_IMAGE),
    ],
)
def test_what_is_no_picture_is_refused(data, code):
    assert refused(data).code is code


@pytest.mark.parametrize(("process", "precision"), [(0xC3, 8), (0xC9 + 2, 8), (0xC1, 12)])
def test_rare_kinds_of_jpeg_are_named_and_refused(process, precision):
    frame = TWO_COLOURS.index(b"\xff\xc0")
    data = bytearray(TWO_COLOURS)
    data[frame + 1], data[frame + 4] = process, precision
    error = refused(data)
    assert error.code is ErrorCode.UNSUPPORTED_ENCODING
    assert f"SOF{process - 0xC0}" in error.message


def test_the_size_of_the_message_is_bounded():
    error = refused(TWO_COLOURS, limits=Limits(max_compressed_bytes=len(TWO_COLOURS) - 1))
    assert error.code is ErrorCode.IMAGE_TOO_LARGE


def test_damage_that_only_the_decoder_sees_is_refused():
    tables = TWO_COLOURS.index(b"\xff\xc4")
    data = bytearray(TWO_COLOURS)
    data[tables + 5 : tables + 12] = b"\xff" * 7  # an impossible Huffman table
    assert refused(data).code is ErrorCode.CORRUPT_COMPRESSED


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [
        ((320, 200), (320, 200)),
        ((161, 100), (320, 200)),
        ((160, 100), (160, 100)),
        ((81, 20), (160, 100)),
        ((80, 50), (80, 50)),
        ((1, 1), (40, 25)),
        ((400, 300), (320, 200)),
    ],
)
def test_a_jpeg_of_which_less_is_enough_is_decoded_smaller(at_least, expected):
    pixels = decode_compressed(jpeg(width=320, height=200), at_least=at_least)
    assert (pixels.shape[1], pixels.shape[0]) == expected
    assert not pixels.flags.writeable


def test_a_smaller_decoding_shows_the_same_picture():
    ramp = np.linspace(0, 255, 320).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (200, 1)), np.full((200, 320), 90, np.uint8)], -1)
    picture = np.concatenate([picture, picture[..., :1] // 2], -1)
    data = cv2.imencode(".jpg", picture[..., ::-1])[1].tobytes()
    small = decode_compressed(data, at_least=(80, 50)).astype(int)
    whole = decode_compressed(data).astype(int).reshape(50, 4, 80, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - whole).mean() < 2


def test_sides_that_cannot_be_divided_evenly_are_decoded_whole():
    assert decode_compressed(jpeg(width=322, height=201), at_least=(8, 8)).shape == (201, 322, 3)
    assert decode_compressed(jpeg(width=324, height=204), at_least=(8, 8)).shape == (51, 81, 3)


def test_only_jpeg_is_decoded_smaller():
    data = png(64, 64, 8, 2, b"".join(b"\0" + bytes(192) for _ in range(64)))
    assert decode_compressed(data, at_least=(8, 8)).shape == (64, 64, 3)
    assert decode_compressed(CMYK, at_least=(1, 1)).shape == (8, 8, 3)
    assert decode_compressed(GRAY_77, at_least=(2, 2)).tolist() == [[[77] * 3] * 2] * 2


def test_what_is_refused_whole_is_refused_smaller_too():
    whole = jpeg(width=320, height=200)
    for data in (whole[:700], whole[:-2], TWO_COLOURS[:-30]):
        with pytest.raises(ImageError) as caught:
            decode_compressed(data, at_least=(8, 8))
        assert caught.value.code is ErrorCode.CORRUPT_COMPRESSED
    with pytest.raises(ImageError) as caught:
        decode_compressed(whole, at_least=(8, 8), limits=Limits(max_pixels=320 * 200 - 1))
    assert caught.value.code is ErrorCode.IMAGE_TOO_LARGE
