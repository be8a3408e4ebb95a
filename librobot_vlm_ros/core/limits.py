"""Bounds on what comes in, checked before anything is allocated or decoded."""

from __future__ import annotations

from dataclasses import dataclass, fields

from librobot_vlm_ros.core.errors import bad_parameter


@dataclass(frozen=True)
class Limits:
    """Upper bounds; whatever is beyond one is refused with a code, never cut silently.

    Raises `RequestError` (BAD_PARAMETER) for a bound that is not a positive integer.
    """

    max_pixels: int = 64_000_000
    """Width x height of an image, in pixels."""
    max_side: int = 16_384
    """Width or height of an image, in pixels."""
    max_compressed_bytes: int = 64 * 1024 * 1024
    """Size of a JPEG or PNG before decoding, in bytes."""
    max_expansion: int = 250
    """Bytes of a decoded picture for each of its JPEG or PNG, where it is larger than
    `free_expansion_bytes`. OpenCV's JPEG of an all-black picture has 192, of a dark and noisy one
    21; its PNG of an all-black one has 926 to 974."""
    free_expansion_bytes: int = 96 * 1024 * 1024
    """Size of a decoded picture that is allowed however small its file is, in bytes."""
    max_prompt_chars: int = 4096
    """Length of a prompt as received, in characters."""
    max_new_tokens: int = 1024
    """Tokens that one request may generate."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad_parameter(
                    f"limit {field.name} is {value!r}, expected an integer of at least 1"
                )


DEFAULT_LIMITS = Limits()
