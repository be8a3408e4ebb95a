"""Shared memory that Fast DDS has left behind: segments of processes that were killed.

A participant that is ended by SIGKILL, or by the kernel for want of memory, cannot remove its
segment, 64 MB with the profile of this package. On a robot where that happens again and again
/dev/shm fills, and it is memory that nobody gets back before the next boot. A segment's owner holds
a lock on the file of the same name with ``_el`` behind it for as long as it lives; what nobody
holds is dead. (`fastdds shm clean` goes by the same rule.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from pathlib import Path

__all__ = ["SHARED_MEMORY", "clear_dead_segments"]

SHARED_MEMORY = Path("/dev/shm")
_SEGMENT = re.compile(r"fastrtps_[0-9a-f]{16}")
#: Seconds that a segment is left alone: a process that is starting makes the file of the lock a
#: moment before it takes the lock.
_YOUNG_S = 10.0


def clear_dead_segments(folder: Path = SHARED_MEMORY, *, younger_than_s: float = _YOUNG_S) -> int:
    """Remove the segments whose owners are gone; the bytes that this freed.

    Segments of other users, and those made in the last `younger_than_s` seconds, are left alone.
    """
    freed = 0
    now = time.time()
    with contextlib.suppress(OSError):
        for segment in sorted(folder.iterdir()):
            if _SEGMENT.fullmatch(segment.name):
                with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
                    freed += _clear(segment, now - younger_than_s)
    return freed


def _clear(segment: Path, before: float) -> int:
    lock_file = segment.with_name(segment.name + "_el")
    descriptor = os.open(lock_file, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its owner lives
        if os.fstat(descriptor).st_mtime > before:
            return 0
        size = segment.stat().st_size
        segment.unlink()
        lock_file.unlink()
        return size
    finally:
        os.close(descriptor)
