"""`sensor_msgs/CompressedImage` to pixels; size and structure are checked before decoding."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.errors import ErrorCode, ImageError, ModelError, as_vlm_error, bad_image
from librobot_vlm_ros.core.images import jpeg, png
from librobot_vlm_ros.core.images.converter import sixteen_to_eight
from librobot_vlm_ros.core.images.encodings import ENCODINGS, is_known_encoding
from librobot_vlm_ros.core.images.raw import as_bytes_array, check_size, decode_image, depth_to_rgb8
from librobot_vlm_ros.core.limits import DEFAULT_LIMITS, Limits
from librobot_vlm_ros.core.logtext import shortened

_MAX_FORMAT_CHARS = 200
_REDUCTIONS = (8, 4, 2)  # what the transform of a JPEG's 8x8 blocks gives for nothing

_FORMAT_WORDS = {
    "jpeg": "JPEG",
    "jpg": "JPEG",
    "mjpeg": "JPEG",
    "mjpg": "JPEG",
    "png": "PNG",
    "tiff": "TIFF",
    "tif": "TIFF",
    "webp": "WebP",
    "bmp": "BMP",
    "gif": "GIF",
    "jp2": "JPEG 2000",
    "jpeg2000": "JPEG 2000",
    "h264": "H.264",
    "h265": "H.265",
    "hevc": "H.265",
    "av1": "AV1",
    "avif": "AVIF",
    "compresseddepth": "compressedDepth",
}
_READ = ("JPEG", "PNG")

_SIGNATURES = (
    (jpeg.SIGNATURE, "JPEG"),
    (png.SIGNATURE, "PNG"),
    (b"RIFF", "WebP"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"\x00\x00\x00\x01", "H.264"),
)


CompressedHeader = jpeg.JpegHeader | png.PngHeader
"""What a file says about itself: `kind`, `width`, `height`, `channels`, `bits` per channel."""


def _named_format(text: object) -> tuple[str | None, str]:
    """(kind that the `format` field names or None, pixel encoding before the ';' or "").

    Forms in use: "jpeg", "png", "jpg", "rgb8; jpeg compressed bgr8", "16UC1; png compressed ", "".
    """
    if not isinstance(text, str):
        raise bad_image(f"format is of type {type(text).__name__}, expected a string")
    words = re.findall(r"[a-z0-9_]+", text[:_MAX_FORMAT_CHARS].lower())
    kinds = [_FORMAT_WORDS[word] for word in words if word in _FORMAT_WORDS]
    source = text[:_MAX_FORMAT_CHARS].split(";")[0].strip()
    source = source if is_known_encoding(source) else ""
    if not kinds and not source and text.strip("\0 "):
        raise ImageError(
            ErrorCode.UNKNOWN_ENCODING,
            f"unknown format '{shortened(text, _MAX_FORMAT_CHARS)}'",
            "Expected 'jpeg', 'png', a format of image_transport such as "
            "'rgb8; jpeg compressed bgr8', or ''.",
        )
    for kind in kinds:
        if kind not in _READ:
            raise ImageError(
                ErrorCode.UNSUPPORTED_ENCODING,
                f"format '{shortened(text, _MAX_FORMAT_CHARS)}' is {kind}, expected JPEG or PNG",
            )
    return (kinds[0] if kinds else None), source


def _kind_of(view: memoryview) -> str:
    start = bytes(view[:8])
    for signature, kind in _SIGNATURES:
        if start.startswith(signature):
            return kind
    raise ImageError(
        ErrorCode.CORRUPT_COMPRESSED,
        f"compressed image starts with 0x{start.hex()}, which is neither JPEG nor PNG",
        "Check what the publisher puts into this topic.",
    )


def read_compressed_header(
    data: object,
    *,
    format: str = "",  # noqa: A002  the name of the message's field
    limits: Limits = DEFAULT_LIMITS,
) -> CompressedHeader:
    """Kind and size of a JPEG or PNG from its first bytes, checked against `format` and `limits`.

    The bytes decide what the file is; a `format` that names something else is refused (BAD_IMAGE),
    an empty one or one with a pixel encoding only says nothing about it. Raises as
    `decode_compressed` does.
    """
    flat = as_bytes_array(data)
    if flat.size == 0:
        raise ImageError(ErrorCode.BAD_DATA_LENGTH, "compressed image has no data")
    if flat.size > limits.max_compressed_bytes:
        raise ImageError(
            ErrorCode.IMAGE_TOO_LARGE,
            f"compressed image has {flat.size} bytes, allowed are {limits.max_compressed_bytes}",
        )
    named, _ = _named_format(format)
    kind = _kind_of(flat.data)
    if kind not in _READ:
        raise ImageError(
            ErrorCode.UNSUPPORTED_ENCODING, f"compressed image is {kind}, expected JPEG or PNG"
        )
    if named is not None and named != kind:
        raise bad_image(
            f"format says {named}, but the data is {kind}",
            f"Set the message's format to '{kind.lower()}'.",
        )
    read = jpeg.read_jpeg_header if kind == "JPEG" else png.read_png_header
    header = read(flat.data)
    check_size(header.width, header.height, limits)
    return header


def _refuse_bomb(header: CompressedHeader, size: int, limits: Limits) -> None:
    """A few kilobytes that become gigabytes: what they take is not for their sender to say."""
    raw = header.width * header.height * max(3, header.channels) * -(-header.bits // 8)
    most = 3 * limits.max_pixels
    if raw > limits.free_expansion_bytes:
        most = min(most, limits.max_expansion * size)
    if raw > most:
        raise ImageError(
            ErrorCode.IMAGE_TOO_LARGE,
            f"{header.kind} of {size} bytes becomes {raw} when decoded, allowed are {most}",
            "Publish smaller images, of 8 bits.",
        )


def decode_compressed(
    data: object,
    *,
    format: str = "",  # noqa: A002  the name of the message's field
    allow_depth: bool = False,
    at_least: tuple[int, int] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> npt.NDArray[np.uint8]:
    """The fields of a `sensor_msgs/CompressedImage` (JPEG or PNG) as RGB uint8 [H, W, 3],
    read-only.

    Colours are those of the file, whatever `format` says about channel order. Alpha is dropped,
    16-bit PNG is brought to 8 bits by rounding, CMYK becomes RGB. EXIF orientation is ignored, as
    cv_bridge does: a camera's calibration and transforms refer to the pixels as they are stored.
    Size and structure are checked before decoding, so truncated files and decompression bombs cost
    nothing.

    `at_least` (width, height): a JPEG of which less is enough is decoded at 1/2, 1/4 or 1/8 of its
    size, which costs much less; only where that divides both its sides.

    A 16-bit PNG whose `format` starts with `16UC1` is a depth image: refused unless `allow_depth`.

    Raises `ImageError`: BAD_IMAGE (fields of a wrong type, `format` contradicts the data),
    BAD_DATA_LENGTH (no data), EMPTY_IMAGE, IMAGE_TOO_LARGE, UNKNOWN_ENCODING, UNSUPPORTED_ENCODING,
    CORRUPT_COMPRESSED, NON_FINITE_DEPTH; `InferenceError` (OUT_OF_MEMORY). Nothing else.
    """
    flat = as_bytes_array(data)
    header = read_compressed_header(flat, format=format, limits=limits)
    source = ENCODINGS.get(_named_format(format)[1])
    is_depth = source is not None and source.kind == "depth"
    if is_depth and not allow_depth:
        raise ImageError(
            ErrorCode.UNSUPPORTED_ENCODING,
            f"format '{shortened(format)}' is a depth image, expected colour or gray",
            "Connect the camera's colour topic, or set allow_depth to take depth as grey.",
        )
    if isinstance(header, jpeg.JpegHeader):
        jpeg.check_jpeg_structure(flat.data, header)
    else:
        flat = np.frombuffer(png.checked_picture(flat.data, header), dtype=np.uint8)
    _refuse_bomb(header, flat.size, limits)
    try:
        pixels = _decode(flat, header, _reduction(header, at_least), depth=is_depth)
    except MemoryError as exc:
        raise as_vlm_error(exc) from exc
    pixels.flags.writeable = False
    return pixels


def decode_message(
    message: Any, *, allow_depth: bool = False, at_least: tuple[int, int] | None = None
) -> npt.NDArray[np.uint8]:
    """A `sensor_msgs/Image` or `CompressedImage`, of ROS or rosbags, as RGB uint8 [H, W, 3].

    Options and errors are those of `decode_image` and `decode_compressed`.
    """
    if hasattr(message, "format"):
        return decode_compressed(
            message.data, format=message.format, allow_depth=allow_depth, at_least=at_least
        )
    return decode_image(
        message.data,
        height=message.height,
        width=message.width,
        encoding=message.encoding,
        step=message.step,
        is_bigendian=message.is_bigendian,
        allow_depth=allow_depth,
    )


def _opencv() -> Any:
    """Imported when the first picture is decoded: most of the package works without it."""
    try:
        import cv2
    except ImportError as exc:
        raise ModelError(
            ErrorCode.MISSING_DEPENDENCY,
            f"OpenCV cannot be imported ({exc}), it is needed to decode JPEG and PNG",
            "Install it: 'apt install python3-opencv' or 'pip install opencv-python-headless'.",
        ) from exc
    return cv2


def _reduction(header: CompressedHeader, at_least: tuple[int, int] | None) -> int:
    """By how much the image can be decoded smaller; 1 where it cannot.

    A side that is no multiple would be rounded up, and all coordinates with it.
    """
    if at_least is None or header.kind != "JPEG" or header.channels == 4:
        return 1
    sides = ((header.width, at_least[0]), (header.height, at_least[1]))
    for scale in _REDUCTIONS:
        if all(side % scale == 0 and side // scale >= max(1, least) for side, least in sides):
            return scale
    return 1


def _decode(
    flat: npt.NDArray[np.uint8], header: CompressedHeader, reduction: int, *, depth: bool
) -> npt.NDArray[np.uint8]:
    cv2 = _opencv()
    colour = int(cv2.IMREAD_GRAYSCALE if depth else cv2.IMREAD_COLOR)
    if reduction > 1:
        colour = int(getattr(cv2, f"IMREAD_REDUCED_COLOR_{reduction}"))
    flags = colour | int(cv2.IMREAD_IGNORE_ORIENTATION)
    if header.bits == 16:
        flags |= int(cv2.IMREAD_ANYDEPTH)
    decoded: Any
    try:
        decoded = cv2.imdecode(flat, flags)
    except cv2.error as exc:
        if exc.code == cv2.Error.StsNoMem:
            raise MemoryError(str(exc)) from exc
        decoded = None
    expected = (header.height // reduction, header.width // reduction)
    if decoded is None or decoded.shape[:2] != expected:
        raise ImageError(
            ErrorCode.CORRUPT_COMPRESSED,
            f"{header.kind} of {header.width}x{header.height} pixels cannot be decoded",
            "The file was damaged on its way.",
        )
    if depth:
        return depth_to_rgb8(decoded)
    if decoded.dtype == np.uint16:
        decoded = sixteen_to_eight(decoded)
    rgb: npt.NDArray[np.uint8] = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    return rgb
