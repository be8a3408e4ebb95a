"""Run a command under a hardship that is real: the kernel refuses, nothing is mocked.

    python test/torture/hardship.py --disk /tmp/x:64k -- command ...

`--disk FOLDER:SIZE` lays a tmpfs of that size over the folder, seen by the command alone.
`--held-to-permissions` takes from root what lets it read every file: permissions hold for it as
for any other user. (Another user could not do: the interpreter may lie where only root may read.)

It becomes the command (exec). The exit code is 77 when this machine does not allow the hardship.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path

CANNOT = 77
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # linux/sched.h
_RECURSIVE, _PRIVATE, _REMOUNT = 0x4000, 0x40000, 32  # linux/mount.h
_DROP_CAPABILITY = 24  # linux/prctl.h
_READ_ANYTHING = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_libc = ctypes.CDLL(None, use_errno=True)


def _done(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, options)]
    _done(_libc.mount(words[0], words[1], words[2], flags, words[3]), f"mount {target}")


def own_mounts() -> None:
    """Mounts of this process and its children stay their own. Raises OSError."""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        _done(_libc.unshare(_NEW_MOUNTS), "unshare")
    else:
        _done(_libc.unshare(_NEW_MOUNTS | _NEW_USER), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", "/", None, _RECURSIVE | _PRIVATE, None)


def small_disk(folder: str | Path, size: str) -> None:
    """A disk of that size (`64k`, `10m`) over the folder. Raises OSError."""
    _mount("tmpfs", str(folder), "tmpfs", 0, f"size={size}")


def resized_disk(folder: str | Path, size: str) -> None:
    """Another size for it, as when space has been freed. Raises OSError."""
    _mount("tmpfs", str(folder), "tmpfs", _REMOUNT, f"size={size}")


def held_to_permissions() -> None:
    """From the next exec on. Raises OSError."""
    if os.geteuid() == 0:
        for capability in _READ_ANYTHING:
            _done(_libc.prctl(_DROP_CAPABILITY, capability, 0, 0, 0), "prctl")


def main() -> None:
    """Become the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disk", action="append", default=[], metavar="FOLDER:SIZE")
    parser.add_argument("--held-to-permissions", action="store_true")
    parser.add_argument("command", nargs="+")
    words = parser.parse_args()
    try:
        if words.disk:
            own_mounts()
        for disk in words.disk:
            small_disk(*disk.rsplit(":", 1))
        if words.held_to_permissions:
            held_to_permissions()
    except OSError as error:
        print(f"hardship: {error}", file=sys.stderr)
        sys.exit(CANNOT)
    os.execvp(words.command[0], words.command)


if __name__ == "__main__":
    main()
