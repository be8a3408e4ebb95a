"""The structure of a PNG, read without decoding it (ISO/IEC 15948).

All chunks are there, their checksums are right, and the end chunk is reached.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

from librobot_vlm_ros.core.errors import ErrorCode, ImageError

__all__ = ["PngHeader", "checked_picture", "read_png_header"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_MAX_DEFLATE_RATIO = 1032  # a deflate stream holds at most 258 bytes in 2 bits
_HEADER_END = len(SIGNATURE) + 25
#: Chunks that decide which pixels a decoder gives.
_PICTURE = frozenset(
    {b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"IDAT", b"IEND"}
)


@dataclass(frozen=True)
class PngHeader:
    """What the header chunk of a PNG says."""

    kind: ClassVar[str] = "PNG"
    width: int
    height: int
    bits: int
    """Per channel: 1, 2, 4, 8 or 16."""
    channels: int
    """1 gray or palette, 2 gray and alpha, 3 colour, 4 colour and alpha."""

    @property
    def minimum_raw_bytes(self) -> int:
        """Least size of the uncompressed picture (without the filter byte of each row)."""
        return self.height * -(-self.width * self.bits * self.channels // 8)


def _corrupt(what: str) -> ImageError:
    return ImageError(
        ErrorCode.CORRUPT_COMPRESSED,
        f"PNG {what}",
        "The file was cut off or damaged on its way.",
    )


def read_png_header(data: memoryview) -> PngHeader:
    """Size and kind of the PNG that `data` (flat, uint8) starts with. Raises `ImageError`
    (CORRUPT_COMPRESSED).
    """
    start = len(SIGNATURE)
    if len(data) < _HEADER_END:
        raise _corrupt("ends in its header")
    if bytes(data[start : start + 8]) != b"\x00\x00\x00\x0dIHDR":
        raise _corrupt("does not start with a header chunk")
    _check_sum(data, start + 4, _HEADER_END - 4)
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (start + 8, start + 12))
    bits, colour, compression, filtering, interlace = data[start + 16 : start + 21]
    if bits not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise _corrupt("has a header chunk with impossible values")
    return PngHeader(width, height, bits, _CHANNELS[colour])


def _check_sum(data: memoryview, start: int, end: int) -> None:
    if zlib.crc32(data[start:end]) != int.from_bytes(data[end : end + 4], "big"):
        raise _corrupt("has a chunk with a wrong checksum")


def checked_picture(data: memoryview, header: PngHeader) -> memoryview | bytes:
    """Follows the chunks to the end chunk, checking every checksum; bytes after that are ignored.

    Gives the chunks that a picture is made of, which is `data` itself where there are no others.
    Others are left to nobody: libpng writes the names of colour profiles to the terminal as they
    are. Raises `ImageError` (CORRUPT_COMPRESSED).
    """
    position, coded_bytes, others = _HEADER_END, 0, False
    sums: list[tuple[int, int]] = []  # checked at the end: a file cut off is found without them
    # Real chunks are kilobytes: a file of countless empty ones only wants to keep us busy.
    for _ in range(1000 + len(data) // 1024):
        if position + 12 > len(data):
            raise _corrupt("is cut off: its end chunk is missing")
        length = int.from_bytes(data[position : position + 4], "big")
        kind = bytes(data[position + 4 : position + 8])
        end = position + 8 + length
        if end + 4 > len(data):
            raise _corrupt("is cut off in the middle of a chunk")
        sums.append((position + 4, end))
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            coded_bytes += length
        others = others or kind not in _PICTURE
        position = end + 4
    else:
        raise _corrupt("has too many chunks")
    for start, end in sums:
        _check_sum(data, start, end)
    if (coded_bytes + 1) * _MAX_DEFLATE_RATIO < header.minimum_raw_bytes:
        raise _corrupt(
            f"has {coded_bytes} bytes of picture data, too few for "
            f"{header.width}x{header.height} pixels"
        )
    if not others:
        return data
    kept = [
        data[start - 4 : end + 4]
        for start, end in sums
        if bytes(data[start : start + 4]) in _PICTURE
    ]
    return b"".join([data[:_HEADER_END], *kept])
