"""The pixel encodings of `sensor_msgs/Image` (image_encodings.hpp): those we read and others."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from librobot_vlm_ros.core.errors import ErrorCode, ImageError
from librobot_vlm_ros.core.logtext import shortened

Kind = Literal["rgb", "rgba", "bgr", "bgra", "mono", "bayer", "yuv422", "depth"]

_MAX_NAME_CHARS = 64


@dataclass(frozen=True)
class Encoding:
    """How the bytes of one pixel are read."""

    name: str
    """Name for the converters; an alias such as `8UC1` holds what it stands for (`mono8`)."""
    kind: Kind
    channels: int
    """Values per pixel as stored: 1 for Bayer, 2 for YUV 4:2:2."""
    bytes_per_value: int

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes from one pixel of a row to the next."""
        return self.channels * self.bytes_per_value


def _table() -> dict[str, Encoding]:
    table: dict[str, Encoding] = {}
    plain: tuple[tuple[Kind, int], ...] = (
        ("rgb", 3),
        ("rgba", 4),
        ("bgr", 3),
        ("bgra", 4),
        ("mono", 1),
    )
    for size, bits in ((1, 8), (2, 16)):
        for kind, channels in plain:
            name = f"{kind}{bits}"
            table[name] = Encoding(name, kind, channels, size)
        for pattern in ("rggb", "bggr", "gbrg", "grbg"):
            name = f"bayer_{pattern}{bits}"
            table[name] = Encoding(name, "bayer", 1, size)
        # These names give no order of channels: publishers put OpenCV's own there (BGR), and RViz
        # shows it so.
        table[f"{bits}UC3"] = table[f"bgr{bits}"]
        table[f"{bits}UC4"] = table[f"bgra{bits}"]
    table["8UC1"] = table["mono8"]
    table["16UC1"] = Encoding("16UC1", "depth", 1, 2)
    table["32FC1"] = Encoding("32FC1", "depth", 1, 4)
    # The newer names `uyvy` and `yuyv` are unknown to the older cv_bridge releases: it gets the old
    # ones.
    table["yuv422"] = table["uyvy"] = Encoding("yuv422", "yuv422", 2, 1)
    table["yuv422_yuy2"] = table["yuyv"] = Encoding("yuv422_yuy2", "yuv422", 2, 1)
    return table


ENCODINGS: Mapping[str, Encoding] = MappingProxyType(_table())
"""What `decode_image` reads (the kind "depth" on request only), by its name on the wire."""

_GENERIC = re.compile(r"(8U|8S|16U|16S|32S|32F|64F)C?[0-9]{0,3}")
_OTHER_KNOWN = frozenset({"nv12", "nv21", "nv24", "yuv444", "yuv411"})


def is_known_encoding(name: str) -> bool:
    """Whether ROS has this encoding, read by us or not."""
    if len(name) > _MAX_NAME_CHARS:
        return False
    return name in ENCODINGS or name in _OTHER_KNOWN or _GENERIC.fullmatch(name) is not None


def get_encoding(name: object) -> Encoding:
    """The encoding called `name`, exactly as ROS spells it.

    Raises `ImageError`: UNKNOWN_ENCODING (names the nearest one), UNSUPPORTED_ENCODING for one that
    ROS has and we do not read.
    """
    if not isinstance(name, str):
        raise ImageError(
            ErrorCode.UNKNOWN_ENCODING,
            f"encoding is of type {type(name).__name__}, expected a string such as 'rgb8'",
        )
    found = ENCODINGS.get(name) if len(name) <= _MAX_NAME_CHARS else None
    if found is not None:
        return found
    shown = shortened(name, _MAX_NAME_CHARS)
    if is_known_encoding(name):
        raise ImageError(
            ErrorCode.UNSUPPORTED_ENCODING,
            f"encoding '{shown}' is not read by this package",
            "Publish rgb8, bgr8, rgba8, bgra8, mono8, mono16, bayer_*, yuv422 or yuv422_yuy2, "
            "or convert with image_proc.",
        )
    near = difflib.get_close_matches(name[:_MAX_NAME_CHARS].lower(), ENCODINGS, n=1, cutoff=0.7)
    raise ImageError(
        ErrorCode.UNKNOWN_ENCODING,
        f"unknown encoding '{shown}'",
        f"Did you mean '{near[0]}'?" if near else "Expected a ROS encoding such as rgb8 or mono8.",
    )
