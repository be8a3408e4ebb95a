"""Whether a model's own weights are on this machine, found out without a network, torch or the
hub's client.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from librobot_vlm_ros import models
from librobot_vlm_ros.models.base import ModelInfo

__all__ = ["downloaded", "hub_cache", "shipped_folder", "weights_present"]


def weights_present(info: ModelInfo) -> bool:
    """True when loading `info` with its default weights needs no download."""
    if info.shipped_folder is not None:
        folder = shipped_folder() / info.shipped_folder
        return any(folder.glob("*.safetensors"))
    if info.default_pretrained is None:
        return not info.requires  # a model without weights, such as the fake one
    return downloaded(info.default_pretrained, info.pinned_revision) is not None


def downloaded(hub_id: str, revision: str | None = None) -> Path | None:
    """The snapshot of a hub id in the cache that has weights; at `revision`, else any."""
    repository = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    commit = revision or "*"
    with contextlib.suppress(OSError):  # a branch or tag is a file with the commit in it
        commit = (repository / "refs" / commit).read_text(encoding="ascii").strip()
    for pattern in ("*.safetensors", "*.bin"):
        for path in sorted((repository / "snapshots").glob(f"{commit}/{pattern}")):
            return path.parent
    return None


def shipped_folder() -> Path:
    """Where the weights lie that come with the package, a folder for each model."""
    return Path(models.__file__).parent / "weights"


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser() / "hub"
