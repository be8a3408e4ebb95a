"""Which folders the weights may lie in: what the operator allows, and nothing else on this machine.

The operator is who starts the node. Whoever can call a service or set a parameter later may choose
among hub ids and the folders that are open to him, but cannot make the node read any path. Free of
rclpy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from librobot_vlm_ros.core import BagError, ErrorCode, RequestError, shortened
from librobot_vlm_ros.models.checkpoints.local_weights import hub_cache, is_hub_id, shipped_folder

__all__ = ["allowed_folders", "confined", "open_to_clients", "paths_in"]


def allowed_folders(named: Sequence[str]) -> tuple[Path, ...]:
    """The parameter `weights_folders` as folders, symlinks followed.

    Raises `RequestError` (BAD_PARAMETER) for one that is not absolute.
    """
    folders = []
    for text in named:
        path = _resolved(text)
        if path is None or not text.startswith(("/", "~")):
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"weights_folders holds '{shortened(text)}', expected an absolute folder",
                "Example: weights_folders:=[/opt/models]",
            )
        folders.append(path)
    return tuple(folders)


def open_to_clients(named: Sequence[str], weights_at_start: str) -> tuple[Path, ...]:
    """Folders that a client may choose weights from: `weights_folders`, and where that is empty the
    siblings of the weights that the operator gave at start, the shipped ones and the hub's cache.
    """
    if named:
        return allowed_folders(named)
    folders = [shipped_folder().resolve(), hub_cache().resolve()]
    given = _resolved(weights_at_start) if weights_at_start else None
    if given is not None and given.is_dir():
        # A folder right below / (or the home itself) must not open everything beside it.
        broad = given.parent in (Path("/"), Path.home().parent.resolve())
        folders.append(given if broad else given.parent)
    return tuple(folders)


def paths_in(model_config: str) -> list[str]:
    """What a `model_config` names of files and folders; [] where it is no JSON, which is refused
    elsewhere.
    """
    with suppress(ValueError, RecursionError):
        config = json.loads(model_config)
        if isinstance(config, dict):
            return [str(config[key]) for key in ("adapter", "mask_decoder") if config.get(key)]
    return []


def confined(weights: str, folders: Sequence[Path], what: str = "weights") -> str:
    """`weights` as it may be given to the model: "" and hub ids as they are, a folder resolved.

    Raises `BagError` (PATH_NOT_ALLOWED) for what lies below none of `folders`, be it there or not.
    """
    path = _resolved(weights) if weights else None
    if not weights or (is_hub_id(weights) and not (path is not None and path.exists())):
        return weights
    if path is not None and any(path == base or base in path.parents for base in folders):
        return str(path)
    shown = ", ".join(map(str, folders)) or "none"
    raise BagError(
        ErrorCode.PATH_NOT_ALLOWED,
        f"{what} '{shortened(weights)}' is no hub id and lies in no folder that is open to "
        f"them: {shown}",
        "Start the node with weights_folders:=[/folder/of/models] to allow others.",
    )


def _resolved(text: str) -> Path | None:
    """Absolute, symlinks followed; None for what is no path at all (a NUL, an unknown user)."""
    try:
        path = Path(text).expanduser().resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError):
        return None
    return path
