"""What kind of file a path names (some make a reader wait for ever), and this package's files."""

from __future__ import annotations

import os
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


def package_file(name: str) -> Path | None:
    """`name` in this package's share folder: of the checkout, else as it is installed; or None."""
    package = __package__.split(".")[0]
    here = Path(__file__)
    prefixes = [*here.absolute().parents]  # <prefix>/lib/python3.x/site-packages/...
    prefixes += map(Path, filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)))
    folders = [here.resolve().parents[2], *(prefix / "share" / package for prefix in prefixes)]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
