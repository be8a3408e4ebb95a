"""Whether weights are on this machine, without a network, torch or the hub's client.

A client may ask for the list of models again and again. Names of files are plain strings here:
`pathlib` interns the parts of each path, and those that come and go fill CPython's table of such
strings until it is made anew, larger by megabytes."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from pathlib import Path

from librobot_vlm_ros.models.backend import ModelInfo

__all__ = ["downloaded", "hub_cache", "is_hub_id", "shipped_folder", "weights_present"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_hub_id(text: str) -> bool:
    """Whether `text` is "owner/name" or "owner/name@revision"."""
    return _HUB_ID.fullmatch(text) is not None


_SHIPPED = os.path.join(os.path.dirname(__file__), "shipped")


def weights_present(info: ModelInfo) -> bool:
    """True when loading `info` with its default weights needs no download."""
    if info.shipped_folder is not None:
        return bool(
            glob.glob("*.safetensors", root_dir=os.path.join(_SHIPPED, info.shipped_folder))
        )
    if info.default_pretrained is None:
        return not info.requires  # a model without weights, such as the fake one
    return _snapshot(info.default_pretrained, info.pinned_revision) is not None


def downloaded(hub_id: str, revision: str | None = None) -> Path | None:
    """The snapshot of a hub id in the cache that has weights; at `revision`, else any."""
    found = _snapshot(hub_id, revision)
    return None if found is None else Path(found)


def shipped_folder() -> Path:
    """Where the weights lie that come with the package, a folder for each model."""
    return Path(_SHIPPED)


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads."""
    return Path(_hub_cache())


def _snapshot(hub_id: str, revision: str | None) -> str | None:
    repository = os.path.join(_hub_cache(), f"models--{hub_id.replace('/', '--')}")
    commit = revision or "*"
    # A branch or tag is a file with the commit in it.
    with (
        contextlib.suppress(OSError),
        open(os.path.join(repository, "refs", commit), encoding="ascii") as file,
    ):
        commit = file.read().strip()
    snapshots = os.path.join(repository, "snapshots")
    for pattern in ("*.safetensors", "*.bin"):
        for name in sorted(glob.glob(f"{commit}/{pattern}", root_dir=snapshots)):
            return os.path.join(snapshots, os.path.dirname(name))
    return None


def _hub_cache() -> str:
    if "HF_HUB_CACHE" in os.environ:
        return os.path.expanduser(os.environ["HF_HUB_CACHE"])
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    return os.path.join(os.path.expanduser(home), "hub")
