"""Whether a model's own weights are on this machine, found out without a network, torch or the
hub's client.
"""

from __future__ import annotations

import os
from pathlib import Path

from librobot_vlm_ros import models
from librobot_vlm_ros.models.base import ModelInfo

__all__ = ["hub_cache", "shipped_folder", "weights_present"]


def weights_present(info: ModelInfo) -> bool:
    """True when loading `info` with its default weights needs no download."""
    if info.shipped_folder is not None:
        folder = shipped_folder() / info.shipped_folder
        return any(folder.glob("*.safetensors"))
    if info.default_pretrained is None:
        return not info.requires  # a model without weights, such as the fake one
    snapshots = hub_cache() / f"models--{info.default_pretrained.replace('/', '--')}" / "snapshots"
    pinned = info.pinned_revision or "*"
    patterns = ("*.safetensors", "*.bin")
    return any(any(snapshots.glob(f"{pinned}/{pattern}")) for pattern in patterns)


def shipped_folder() -> Path:
    """Where the weights lie that come with the package, a folder for each model."""
    return Path(models.__file__).parent / "weights"


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser() / "hub"
