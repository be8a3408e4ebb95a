"""A camera frame as everything above the core sees it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.errors import ErrorCode, ImageError, bad_image


@dataclass(frozen=True, eq=False)
class Frame:
    """One checked image with its origin. Compared and hashed by identity.

    Raises `ImageError`: BAD_IMAGE when `pixels` is no uint8 [H, W, 3] array, EMPTY_IMAGE when it
    holds no pixel.
    """

    pixels: npt.NDArray[np.uint8]
    """uint8 [H, W, 3], RGB, read-only; may be a view of the message's own bytes, also strided, and
    smaller than the source image (see `source_width`).
    """
    camera: str
    """Name of the camera (parameter `cameras`), "" for an image that came with a request."""
    stamp_ns: int
    """Stamp of the source header in nanoseconds, as sent (any clock)."""
    frame_id: str = ""
    """Coordinate frame of the source header."""
    sequence: int = 0
    """Number of the frame within its camera, as counted on arrival."""
    received_ns: int = 0
    """Arrival on this machine's steady clock, in nanoseconds: ages are measured with this one."""
    header: object | None = None
    """The source message's header object, carried through unchanged."""
    source_width: int = 0
    source_height: int = 0
    """Size of the image that `pixels` were made smaller from; 0 = they are the image itself."""

    def __post_init__(self) -> None:
        pixels = self.pixels
        is_array = isinstance(pixels, np.ndarray)
        if not is_array or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            found = f"{pixels.dtype} {list(pixels.shape)}" if is_array else type(pixels).__name__
            raise bad_image(f"frame pixels are {found}, expected uint8 [H, W, 3] RGB")
        if pixels.size == 0:
            raise ImageError(
                ErrorCode.EMPTY_IMAGE, f"frame is {pixels.shape[1]}x{pixels.shape[0]} pixels"
            )
        height, width = pixels.shape[:2]
        source = (self.source_width, self.source_height)
        if source != (0, 0) and (source[0] < width or source[1] < height):
            raise bad_image(
                f"frame of {width}x{height} pixels comes from an image of {source[0]}x{source[1]}",
                "expected an image of at least that size",
            )
        if pixels.flags.writeable:
            view = pixels.view()
            view.flags.writeable = False
            object.__setattr__(self, "pixels", view)

    @property
    def height(self) -> int:
        """Rows of the source image, in pixels: what regions refer to."""
        return self.source_height or int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns of the source image, in pixels: what regions refer to."""
        return self.source_width or int(self.pixels.shape[1])

    def age_s(self, now_ns: int) -> float:
        """Seconds since arrival, `now_ns` being the steady clock; never negative."""
        return max(0, now_ns - self.received_ns) * 1e-9

    def __repr__(self) -> str:
        return (
            f"Frame(camera={self.camera!r}, {self.width}x{self.height}, stamp_ns={self.stamp_ns}, "
            f"sequence={self.sequence})"
        )
