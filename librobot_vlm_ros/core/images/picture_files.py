"""Picture files to pixels: checked before they are decoded, turned upright by their EXIF."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.errors import ErrorCode, ImageError, as_vlm_error, bad_image
from librobot_vlm_ros.core.files import kind_of
from librobot_vlm_ros.core.images.compressed import decode_compressed
from librobot_vlm_ros.core.images.converter import sixteen_to_eight
from librobot_vlm_ros.core.images.raw import check_size
from librobot_vlm_ros.core.limits import DEFAULT_LIMITS, Limits

#: Formats that Pillow may read. It knows some that it has other programs read (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")

_OPEN_ALREADY = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"
_ORIENTATION = 0x0112  # of EXIF
_MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def read_picture(path: Path, limits: Limits = DEFAULT_LIMITS) -> npt.NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] of a picture file, upright.

    JPEG and PNG go through the same checks as a camera's compressed images; the others of `FORMATS`
    are read by Pillow once their size is known to be within `limits`. Unlike a camera's images,
    files are turned as their EXIF orientation says: a telephone stores its pictures lying.

    Raises `ImageError` as `decode_compressed` does, BAD_IMAGE for what is no picture; `VlmError`
    FILE_NOT_FOUND, PERMISSION_DENIED.
    """
    data = _read(path, limits.max_compressed_bytes)
    try:
        if data.startswith((_JPEG, _PNG)):
            return _upright(decode_compressed(data, limits=limits), data)
        return _by_pillow(data, limits)
    except ImageError as error:
        raise ImageError(error.code, f"{path}: {error.message}", error.hint) from error


def _read(path: Path, most: int) -> bytes:
    """Never more than `most` bytes: a device, or a file that grows, need not end."""
    try:
        kind = kind_of(path)
        # A pipe of the shell's is open already; one found in a folder waits for who writes to it.
        if kind and (kind == "a folder" or not str(path).startswith(_OPEN_ALREADY)):
            raise bad_image(f"{path} is {kind}, expected a picture in a regular file")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise as_vlm_error(error) from error
    if len(data) > most:
        raise ImageError(
            ErrorCode.IMAGE_TOO_LARGE, f"{path} has more than the {most} bytes that are allowed"
        )
    return data


def _by_pillow(data: bytes, limits: Limits) -> npt.NDArray[np.uint8]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            check_size(picture.width, picture.height, limits)  # before anything is decoded
            ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode in _MODES_16_BIT:
                grey = sixteen_to_eight(np.asarray(picture, dtype=np.uint16))
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(picture.convert("RGB"))
    except ImageError:
        raise
    except MemoryError as error:
        raise as_vlm_error(error) from error
    except Image.DecompressionBombError as error:
        raise ImageError(ErrorCode.IMAGE_TOO_LARGE, f"it is too large: {error}") from error
    except UnidentifiedImageError as error:  # its text names only the buffer
        raise bad_image(
            f"it is no picture of a format that is read, expected one of {', '.join(FORMATS)}",
            "Use JPEG or PNG.",
        ) from error
    except Exception as error:  # each of Pillow's formats has errors of its own
        raise bad_image(f"it cannot be read as a picture: {error}", "Use JPEG or PNG.") from error


def _upright(pixels: npt.NDArray[np.uint8], data: bytes) -> npt.NDArray[np.uint8]:
    """`pixels` of the file turned as its EXIF says; where that is damaged they stay as they lie."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            orientation = file.getexif().get(_ORIENTATION, 1)
    except Exception:  # each of Pillow's formats has errors of its own
        return pixels
    if orientation == 1:
        return pixels
    picture = Image.fromarray(pixels)
    picture.getexif()[_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(picture))
