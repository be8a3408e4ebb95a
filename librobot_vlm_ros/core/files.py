"""What kind of file a path names: some kinds make a reader wait for ever, or never end."""

from __future__ import annotations

import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of(path: Path) -> str:
    """What a path names in words; "" for a regular file and where there is nothing.

    Raises `OSError` for a path that cannot be followed.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return ""
    return _KINDS.get(stat.S_IFMT(mode), "")
