"""Qwen3-VL at tiny size, see `conformance_qwen`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from librobot_vlm_ros.models import conformance_qwen as qwen
from librobot_vlm_ros.models import conformance_qwen_folder as folders
from librobot_vlm_ros.models.conformance_qwen import pixels

__all__ = ["difference", "pixels", "write_official"]


def write_official(folder: Path) -> None:
    """A folder laid out as the vendor's."""
    folders.write_official(folder, folders.THIRD)


def difference(folder: Path, module: Any) -> float:
    """Largest difference of a logit between the loaded module and the original arithmetic."""
    return qwen.difference(folder, module, folders.THIRD)
