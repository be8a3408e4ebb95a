"""The structure of a PNG, read without decoding it (ISO/IEC 15948).

All chunks are there, their checksums are right, and the end chunk is reached.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from librobot_vlm_ros.core.errors import corrupt_picture

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


_corrupt = partial(corrupt_picture, "PNG")


def read_png_header(data: memoryview) -> PngHeader:
    """Size and kind of the PNG in `data` (uint8). Raises `ImageError` (CORRUPT_COMPRESSED)."""
    if len(data) < _HEADER_END:
        raise _corrupt("ends in its header")
    chunk = data[len(SIGNATURE) : _HEADER_END]
    if bytes(chunk[:8]) != b"\x00\x00\x00\x0dIHDR":
        raise _corrupt("does not start with a header chunk")
    _verify_checksum(chunk)
    width, height, bits, colour, compression, filtering, interlace = struct.unpack_from(
        ">IIBBBBB", chunk, 8
    )
    if bits not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise _corrupt("has a header chunk with impossible values")
    return PngHeader(width, height, bits, _CHANNELS[colour])


def _verify_checksum(chunk: memoryview) -> None:
    """`chunk`: length, kind, content and checksum."""
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        raise _corrupt("has a chunk with a wrong checksum")


def checked_picture(data: memoryview, header: PngHeader) -> memoryview | bytes:
    """Follows the chunks to the end chunk, checking every checksum; bytes after that are ignored.

    Gives the chunks that a picture is made of, which is `data` itself where there are no others.
    Others are left out: libpng prints the names of colour profiles to the terminal as they are.
    Raises `ImageError` (CORRUPT_COMPRESSED).
    """
    chunks: list[tuple[bytes, memoryview]] = []
    position = _HEADER_END
    # Real chunks are kilobytes: a file of countless empty ones only wants to keep us busy.
    for _ in range(1000 + len(data) // 1024):
        if position + 12 > len(data):
            raise _corrupt("is cut off: its end chunk is missing")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise _corrupt("is cut off in the middle of a chunk")
        chunks.append((kind, data[position:end]))
        if kind == b"IEND":
            break
        position = end
    else:
        raise _corrupt("has too many chunks")
    for _, chunk in chunks:  # only now: a file that is cut off is found without them
        _verify_checksum(chunk)
    coded_bytes = sum(len(chunk) - 12 for kind, chunk in chunks if kind == b"IDAT")
    if (coded_bytes + 1) * _MAX_DEFLATE_RATIO < header.minimum_raw_bytes:
        raise _corrupt(
            f"has {coded_bytes} bytes of picture data, too few for "
            f"{header.width}x{header.height} pixels"
        )
    picture = [chunk for kind, chunk in chunks if kind in _PICTURE]
    if len(picture) == len(chunks):
        return data
    return b"".join([data[:_HEADER_END], *picture])
