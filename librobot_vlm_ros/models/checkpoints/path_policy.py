"""Folders that a checkpoint may name besides its own, while it is loaded.

A config.json can name the folder of another model's weights (LLaVA its vision tower). Whoever loads
for somebody else says here where such folders may lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from librobot_vlm_ros.core import BagError, ErrorCode

__all__ = ["confined_to", "refuse_foreign"]

_open: ContextVar[tuple[Path, ...] | None] = ContextVar("open folders", default=None)


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
    allowed = (root.resolve(), *folders)
    for folder in named:
        found = folder.resolve()
        if not any(found == base or base in found.parents for base in allowed):
            raise BagError(
                ErrorCode.PATH_NOT_ALLOWED,
                f"the checkpoint {root} takes weights from {found}, which lies in no folder that "
                f"is open to it: {', '.join(map(str, folders)) or 'none'}",
                "Start the node with weights_folders:=[/folder/of/models] to allow others, or put "
                "them into the checkpoint's own folder.",
            )
