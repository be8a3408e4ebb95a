"""The bag that ships with the package: ten seconds of the robot tabletop."""

from __future__ import annotations

from pathlib import Path

from librobot_vlm_ros.core import BagError, ErrorCode

__all__ = ["shipped_bag"]


def shipped_bag(name: str = "tabletop") -> Path:
    """Folder of the shipped bag `name`, from a checkout and from an installation alike.

    Raises `BagError` (FILE_NOT_FOUND) when it is not there.
    """
    folder = Path(__file__).parent / name
    if (folder / "metadata.yaml").is_file():
        return folder
    raise BagError(
        ErrorCode.FILE_NOT_FOUND,
        f"the shipped bag {name!r} is not in this installation (looked at {folder})",
        "Use a complete checkout, or give a bag of your own.",
    )
