"""Where weights come from: the package itself, a local folder, or the hub at a pinned revision.

What is on this machine is found without a network and without torch. A client may ask for the list
of models again and again: names of files are plain strings on that way, because `pathlib` interns
the parts of each path, and parts that come and go fill CPython's table of such strings until it is
made anew, larger by megabytes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import socket
import sys
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from librobot_vlm_ros.core import ErrorCode, ModelError, as_vlm_error
from librobot_vlm_ros.models.backend import ModelInfo
from librobot_vlm_ros.models.checkpoints.progress import bars_to_log

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHIPPED = os.path.join(os.path.dirname(__file__), "shipped")
#: The hub's client makes a path of it.
_CONFIG = sys.intern("config.json")
#: Everything a model needs, and no code.
_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
#: Folders of a repository hold other formats of the same weights (onnx, original, ...).
_NOT_NEEDED = ["*/*"]
#: Seconds to wait for the hub to take a connection.
_CONNECT_S = 5.0
_DIGEST_BYTES = 1 << 20


def is_hub_id(text: str) -> bool:
    """Whether `text` is "owner/name" or "owner/name@revision"."""
    return _HUB_ID.fullmatch(text) is not None


def shipped_folder() -> Path:
    """Where the weights lie that come with the package, a folder for each model."""
    return Path(_SHIPPED)


def hub_cache() -> Path | None:
    """Where huggingface_hub keeps downloads; None where it is not installed."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    return Path(constants.HF_HUB_CACHE)


def in_hub_cache(folder: Path) -> bool:
    """Whether a folder came from the hub: what its files say was written by others."""
    cache = hub_cache()
    return cache is not None and cache.resolve() in folder.resolve().parents


def weights_present(info: ModelInfo) -> bool:
    """True when loading `info` with its default weights needs no download."""
    if info.shipped_folder is not None:
        return _has_weights(os.path.join(_SHIPPED, info.shipped_folder))
    if info.default_pretrained is None:
        return not info.requires  # a model without weights, such as the fake one
    return _snapshot(info.default_pretrained, info.pinned_revision) is not None


def downloaded(hub_id: str, revision: str | None = None) -> Path | None:
    """The snapshot of a hub id in the cache that has all its weights, at `revision` or "main"."""
    found = _snapshot(hub_id, revision)
    return None if found is None else Path(found)


def _snapshot(hub_id: str, revision: str | None) -> str | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    # Not snapshot_download(local_files_only=True): newer clients ask the hub for other things then.
    with contextlib.suppress(ValueError):  # no id that the client takes
        found = try_to_load_from_cache(hub_id, _CONFIG, revision=revision)
        if isinstance(found, str) and _has_weights(os.path.dirname(found)):
            return os.path.dirname(found)
    return None


def _has_weights(folder: str) -> bool:
    """Whether a folder holds weights; where an index names them, all of them."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        path = os.path.join(folder, index)
        if not os.path.isfile(path):
            continue
        try:
            with open(path, encoding="utf-8") as file:
                names = set(json.load(file)["weight_map"].values())
            return all(os.path.isfile(os.path.join(folder, name)) for name in names)
        except (LookupError, OSError, RecursionError, TypeError, ValueError):  # it is cut off
            return False
    return any(glob.glob(pattern, root_dir=folder) for pattern in ("*.safetensors", "*.bin"))


@dataclass(frozen=True)
class Weights:
    """A checkpoint folder on this machine, and which weights they are."""

    folder: Path
    #: Hub commit, or a digest of the folder.
    revision: str


def find_weights(info: ModelInfo, pretrained: str | None, revision: str | None = None) -> Weights:
    """The folder of a model's weights, downloaded if need be.

    `pretrained`: a folder, a hub id ("owner/name" or "owner/name@revision"), or None for the
    model's own. Downloads log their progress and honour HF_HOME and HF_HUB_OFFLINE. One that
    breaks off is resumed at the byte; after a restart the files that were finished are kept.
    Raises ModelError WEIGHTS_NOT_FOUND that names the ways to get them, and OSError where the cache
    cannot be written (`as_vlm_error` makes it DISK_FULL or PERMISSION_DENIED).
    """
    if pretrained is None and info.shipped_folder is not None:
        folder = shipped_folder() / info.shipped_folder
        if not folder.is_dir():
            raise _not_found(info, f"the package was installed without {folder}", None)
        return Weights(folder, folder_digest(folder))
    wanted = str(pretrained if pretrained is not None else info.default_pretrained)
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        return Weights(folder, folder_digest(folder))
    if not is_hub_id(wanted):
        raise _not_found(info, f"{wanted!r} is neither a folder nor a hub id (owner/name)", None)
    hub_id, _, named = wanted.partition("@")
    if not named and revision is None and hub_id == info.default_pretrained:
        named = info.pinned_revision or ""
    return _from_hub(info, hub_id, revision or named or None)


def folder_digest(folder: Path) -> str:
    """16 hex digits that tell one set of weights from another.

    Made from config.json and the size, first and last MiB of each weight file: reading 30 GB to
    name them would take longer than loading them.
    """
    digest = hashlib.sha256()
    files = sorted(
        path
        for pattern in ("config.json", "*.safetensors", "*.bin")
        for path in folder.glob(pattern)
        if path.is_file()  # a pipe would be waited for
    )
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_DIGEST_BYTES))
            file.seek(max(_DIGEST_BYTES, size - _DIGEST_BYTES))
            digest.update(file.read(_DIGEST_BYTES))
    return digest.hexdigest()[:16]


def _from_hub(info: ModelInfo, hub_id: str, revision: str | None) -> Weights:
    """A commit that was downloaded before needs no network, and none is asked for."""
    from huggingface_hub import constants

    _log.info("weights of %s: %s at %s", info.name, hub_id, revision or "main")
    folder = None
    if constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(revision or ""):
        folder = downloaded(hub_id, revision)
        if folder is not None and not any(folder.glob("tokenizer*")):
            folder = None  # half a download
    if folder is None and constants.HF_HUB_OFFLINE:
        raise _not_found(info, f"{hub_id} is not downloaded and HF_HUB_OFFLINE is set", hub_id)
    if folder is None:
        try:
            _reach(constants.ENDPOINT)
            folder = _download(hub_id, revision)
        except Exception as error:  # the hub, its HTTP library and the network each have their own
            if as_vlm_error(error).code in (ErrorCode.DISK_FULL, ErrorCode.PERMISSION_DENIED):
                if isinstance(error, OSError) and error.filename is None:
                    error.filename = constants.HF_HUB_CACHE  # a failed write names no file
                raise
            raise _not_found(info, f"{hub_id} could not be downloaded: {error}", hub_id) from error
    return Weights(folder, folder.name)


def _reach(endpoint: str) -> None:
    """Raises OSError at once without a network; the hub's library would try for half a minute."""
    from urllib.request import getproxies

    url = urllib.parse.urlsplit(endpoint)
    if url.hostname and not getproxies():  # a proxy may know ways that we don't
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname, port), timeout=_CONNECT_S).close()


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        with bars_to_log(f"downloading {hub_id}") as bars:
            found = snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=[*patterns],
                ignore_patterns=_NOT_NEEDED,
                tqdm_class=bars,
            )
        return Path(found)

    folder = fetch(*_FILES, "*.safetensors")
    return folder if any(folder.glob("*.safetensors")) else fetch(*_FILES, "*.bin")


def _not_found(info: ModelInfo, what: str, hub_id: str | None) -> ModelError:
    hub_id = hub_id or info.default_pretrained
    revision = f" --revision {info.pinned_revision}" if info.pinned_revision else ""
    ways = []
    if hub_id is not None:
        ways.append(f"with a network once: hf download {hub_id}{revision}")
    ways.append("a folder with config.json and *.safetensors: weights:=/path/to/folder")
    if info.name != "florence-2-tabletop":
        ways.append("the model that ships with this package: model:=florence-2-tabletop")
    return ModelError(
        ErrorCode.WEIGHTS_NOT_FOUND,
        f"no weights for {info.name}: {what}",
        "Ways to get them:\n" + "\n".join(f"- {way}" for way in ways),
    )
