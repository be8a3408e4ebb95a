"""Make the process ready for big images before any DDS is there: shared memory, allocator."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from librobot_vlm_ros.core.files import package_file

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


TRANSPORT_VARIABLE = "LIBROBOT_VLM_TRANSPORT"
PROFILE = "fastdds.xml"
DEFAULT_SEGMENT_BYTES = 512 * 1024  # of Fast DDS: less than one 640x480 image
_PROFILE_VARIABLE = "FASTRTPS_DEFAULT_PROFILES_FILE"
_OTHER_WISHES = (_PROFILE_VARIABLE, "FASTDDS_DEFAULT_PROFILES_FILE", "FASTDDS_BUILTIN_TRANSPORTS")
_NEEDED_BYTES = 128 * 1024 * 1024  # the segment of this process and one publisher's
# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_IMAGE_BYTES = 32 * 1024 * 1024  # the largest value that every glibc takes; a 4K image has 25 MB
_KEPT_BYTES = 128 * 1024 * 1024
# With an arena a thread, as glibc has it, what a model's thread has freed stays scattered over many
# of them: measured 60 MB after some rounds of configuring and cleaning up, with two less than 10.
_ARENAS = 2


def use_image_profile(environ: MutableMapping[str, str] | None = None) -> str:
    """Point Fast DDS to the profile of this package; what was done or why not, in words.

    To be called before the first participant is made.
    """
    environ = os.environ if environ is None else environ
    if environ.get(TRANSPORT_VARIABLE, "images") != "images":
        return f"the transport is left as it is: {TRANSPORT_VARIABLE} says so"
    if not environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp").startswith("rmw_fastrtps"):
        return f"the transport is left as it is: {environ['RMW_IMPLEMENTATION']} has its own files"
    for name in _OTHER_WISHES:
        if environ.get(name):
            return f"the transport is left as it is: {name} is set"
    profile = package_file(f"config/{PROFILE}")
    if profile is None:
        return f"the transport is left as it is: {PROFILE} is not installed"
    if not SHARED_MEMORY.is_dir() or shutil.disk_usage(SHARED_MEMORY).free < _NEEDED_BYTES:
        return (
            "the transport is left as it is: /dev/shm has less than 128 MB free "
            "(in a container: docker run --shm-size=512m)"
        )
    environ[_PROFILE_VARIABLE] = str(profile)
    return f"shared memory for images: {profile}"


def profile_in_force(environ: Mapping[str, str] | None = None) -> tuple[Path | None, str]:
    """(the Fast DDS profile that the node would use, None for none; why, in words)."""
    wishes = dict(os.environ if environ is None else environ)
    words = use_image_profile(wishes)
    # Fast DDS 2 reads the first of the names, 3 the second; both look into the working folder too.
    for name in (_PROFILE_VARIABLE, "FASTDDS_DEFAULT_PROFILES_FILE"):
        if wishes.get(name):
            return Path(wishes[name]), words
    for file in ("DEFAULT_FASTRTPS_PROFILES.xml", "DEFAULT_FASTDDS_PROFILES.xml"):
        if Path(file).is_file():
            return Path(file).absolute(), words
    return None, words


def segment_bytes(profile: Path | None) -> int | None:
    """Bytes of the shared-memory segment that a Fast DDS profile gives; 512 KB where it says
    nothing, None where it leaves shared memory out. Raises OSError or ValueError for a file that
    cannot be read.
    """
    if profile is None:
        return DEFAULT_SEGMENT_BYTES
    try:
        tree = ElementTree.parse(profile)
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML: {error}") from error
    found = [
        int(item.findtext("{*}segment_size") or DEFAULT_SEGMENT_BYTES)
        for item in tree.iterfind(".//{*}transport_descriptor")
        if (item.findtext("{*}type") or "").strip() == "SHM"
    ]
    built_in = [
        (item.text or "").strip().lower() for item in tree.iterfind(".//{*}useBuiltinTransports")
    ]
    if not found and "false" in built_in:
        return None
    return max(found, default=DEFAULT_SEGMENT_BYTES)


def keep_freed_memory() -> bool:
    """Let malloc keep the memory of images instead of asking the kernel for it anew every frame.

    glibc only; true when it was done. `malloc_trim` gives the memory back, see `give_back_memory`.
    """
    if os.environ.get(TRANSPORT_VARIABLE, "images") != "images":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    if "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, _ARENAS)
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _IMAGE_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    )


def give_back_memory() -> None:
    """Give what malloc keeps back to the system, after a model was freed."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
