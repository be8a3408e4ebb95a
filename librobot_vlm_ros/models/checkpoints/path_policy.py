"""Which folders weights may be read from: what the operator allows, and nothing else on this
machine.

The operator is who starts the node. Whoever can call a service or set a parameter later may choose
among hub ids and the folders that are open to him, but cannot make the node read any path. Nor can
a checkpoint: its config.json may name the folder of another model's weights (LLaVA its vision
tower), which is refused while `confined_to` is in force.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from librobot_vlm_ros.core import BagError, ErrorCode, RequestError, shortened
from librobot_vlm_ros.models.checkpoints.hub import hub_cache, is_hub_id, shipped_folder

_open: ContextVar[tuple[Path, ...] | None] = ContextVar("open folders", default=None)


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
    folders = [folder.resolve() for folder in (shipped_folder(), hub_cache()) if folder is not None]
    given = _resolved(weights_at_start) if weights_at_start else None
    if given is not None and given.is_dir():
        # A folder right below / (or the home itself) must not open everything beside it.
        broad = given.parent in (Path("/"), Path.home().parent.resolve())
        folders.append(given if broad else given.parent)
    return tuple(folders)


def paths_in(model_config: str) -> list[str]:
    """Files and folders that a `model_config` names; [] where it is no JSON: others refuse that."""
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
    if path is not None and _below(path, folders):
        return str(path)
    shown = ", ".join(map(str, folders)) or "none"
    raise BagError(
        ErrorCode.PATH_NOT_ALLOWED,
        f"{what} '{shortened(weights)}' is no hub id and lies in no folder that is open to "
        f"them: {shown}",
        "Start the node with weights_folders:=[/folder/of/models] to allow others.",
    )


@contextmanager
def confined_to(folders: Sequence[Path] | None) -> Iterator[None]:
    """Loads in this block take weights from the checkpoint's own folder and from below `folders`
    (absolute, symlinks followed); None: from anywhere.
    """
    token = _open.set(None if folders is None else tuple(folders))
    try:
        yield
    finally:
        _open.reset(token)


def refuse_foreign(named: Iterable[Path], root: Path) -> None:
    """Raises BagError PATH_NOT_ALLOWED for a folder that the checkpoint in `root` must not name."""
    folders = _open.get()
    if folders is None:
        return
    for folder in named:
        found = folder.resolve()
        if not _below(found, (root.resolve(), *folders)):
            raise BagError(
                ErrorCode.PATH_NOT_ALLOWED,
                f"the checkpoint {root} takes weights from {found}, which lies in no folder that "
                f"is open to it: {', '.join(map(str, folders)) or 'none'}",
                "Start the node with weights_folders:=[/folder/of/models] to allow others, or put "
                "them into the checkpoint's own folder.",
            )


def _below(path: Path, folders: Iterable[Path]) -> bool:
    return any(path == base or base in path.parents for base in folders)


def _resolved(text: str) -> Path | None:
    """Absolute, symlinks followed; None for what is no path at all (a NUL, an unknown user)."""
    try:
        path = Path(text).expanduser().resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError):
        return None
    return path
