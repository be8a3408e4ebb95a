"""The structure of a JPEG, read without decoding it (ITU-T T.81, annex B).

Decoders fill in what a truncated file lacks and only print a warning. Here a file that does not
reach its end marker, or is too short for the picture that it promises, is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from librobot_vlm_ros.core.errors import ErrorCode, ImageError, corrupt_picture

SIGNATURE = b"\xff\xd8\xff"

_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_RESTARTS = range(0xD0, 0xD8)
_HUFFMAN_SEQUENTIAL = (0xC0, 0xC1)
_HUFFMAN_PROGRESSIVE = 0xC2
_ARITHMETIC = (0xC9, 0xCA)
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

_MAX_SEGMENTS = 2000
_MAX_FILL = 4096
_NOT_FILL = re.compile(rb"[^\xff]")
_MAX_SCANS = 100  # ordinary progressive files have about 10; each one costs a pass over the picture

# In entropy-coded data 0xFF is followed by 0 (a literal 0xFF), a restart marker, or another 0xFF
# (fill).
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


@dataclass(frozen=True)
class JpegHeader:
    """What the frame header of a JPEG says."""

    kind: ClassVar[str] = "JPEG"
    bits: ClassVar[int] = 8
    width: int
    height: int
    channels: int
    """1 gray, 3 colour, 4 CMYK."""
    process: int
    """Second byte of the start-of-frame marker: 0xC0 baseline, 0xC2 progressive."""
    position: int
    """Offset of the first segment after the frame header."""


_corrupt = partial(corrupt_picture, "JPEG")


def _segment(data: memoryview, position: int) -> tuple[int, int, int]:
    """(marker, offset of its payload, offset after it) of the segment at `position`."""
    end = len(data)
    if position >= end:
        raise _corrupt("ends in its header")
    if data[position] != 0xFF:
        raise _corrupt("has no marker where one must be")
    found = _NOT_FILL.search(data, position, position + _MAX_FILL)
    if found is None:
        raise _corrupt("ends in a marker" if end - position < _MAX_FILL else "is mostly filling")
    position = found.start()
    marker = data[position]
    position += 1
    if marker in (_EOI, _TEM) or marker in _RESTARTS:
        return marker, position, position
    if marker in (0x00, _SOI):
        raise _corrupt("has a misplaced marker")
    if position + 2 > end:
        raise _corrupt("ends in a marker")
    length = data[position] << 8 | data[position + 1]
    if length < 2 or position + length > end:
        raise _corrupt("ends in the middle of a header segment")
    return marker, position + 2, position + length


def read_jpeg_header(data: memoryview) -> JpegHeader:
    """Size and kind of the JPEG that starts at the beginning of `data` (flat, uint8).

    Raises `ImageError`: CORRUPT_COMPRESSED; UNSUPPORTED_ENCODING for lossless, hierarchical and
    12-bit files.
    """
    position = 2
    for _ in range(_MAX_SEGMENTS):
        marker, payload, position = _segment(data, position)
        if marker in (_EOI, _SOS):
            raise _corrupt("has no frame header")
        if marker not in _START_OF_FRAME:
            continue
        if position - payload < 6:
            raise _corrupt("has a frame header that is too short")
        precision, components = data[payload], data[payload + 5]
        height = data[payload + 1] << 8 | data[payload + 2]
        width = data[payload + 3] << 8 | data[payload + 4]
        if position - payload != 6 + 3 * components:
            raise _corrupt("has a frame header of a wrong length")
        supported = (*_HUFFMAN_SEQUENTIAL, _HUFFMAN_PROGRESSIVE, *_ARITHMETIC)
        if marker not in supported or precision != 8 or components not in (1, 3, 4):
            raise ImageError(
                ErrorCode.UNSUPPORTED_ENCODING,
                f"JPEG of kind SOF{marker - 0xC0}, {precision} bits, {components} components",
                "Publish baseline or progressive 8-bit JPEG.",
            )
        return JpegHeader(width, height, components, marker, position)
    raise _corrupt("has too many header segments")


def check_jpeg_structure(data: memoryview, header: JpegHeader) -> None:
    """Follows the segments from the frame header to the end marker; bytes after that are ignored.

    Cameras pad their buffers behind the end marker, so these bytes mean nothing. JPEG has no
    checksum: damage inside the coded data that leaves the structure whole cannot be told from a
    picture.

    Raises `ImageError` (CORRUPT_COMPRESSED).
    """
    position, scans, coded_bytes = header.position, 0, 0
    for _ in range(_MAX_SEGMENTS):
        marker, _, position = _segment(data, position)
        if marker == _EOI:
            break
        if marker in _START_OF_FRAME:
            raise _corrupt("has two frame headers")
        if marker != _SOS:
            continue
        scans += 1
        if scans > _MAX_SCANS:
            raise _corrupt(f"has more than {_MAX_SCANS} scans")
        found = _NEXT_MARKER.search(data, position)
        if found is None:
            raise _corrupt("is cut off: its end marker is missing")
        coded_bytes += found.start() - position
        position = found.start()
    else:
        raise _corrupt("has too many segments")
    if scans == 0:
        raise _corrupt("has no picture data")
    _check_amount(header, coded_bytes)


def _check_amount(header: JpegHeader, coded_bytes: int) -> None:
    """A Huffman code has at least one bit, and every 8x8 block of a fully sampled component needs
    one for its mean and, in sequential files, one more for the rest: fewer bits cannot hold the
    picture.
    """
    if header.process in _ARITHMETIC:
        return
    bits_a_block = 2 if header.process in _HUFFMAN_SEQUENTIAL else 1
    blocks = -(-header.width // 8) * -(-header.height // 8)
    if coded_bytes * 8 < blocks * bits_a_block:
        raise _corrupt(
            f"has {coded_bytes} bytes of picture data, too few for "
            f"{header.width}x{header.height} pixels"
        )
