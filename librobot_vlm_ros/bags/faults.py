"""What is wrong with a file that should be a bag, in words and with a code.

`rosbags` raises whatever its parsing stumbles over. A recording that was cut off (disk full,
recorder killed, copy interrupted) is by far the most frequent damage, so it is told apart from
files that were never a bag.
"""

from __future__ import annotations

import struct
from pathlib import Path

from librobot_vlm_ros.core import BagError, ErrorCode, VlmError, as_vlm_error
from librobot_vlm_ros.core.files import kind_of

_MCAP_MAGIC = b"\x89MCAP0\r\n"
_SQLITE_MAGIC = b"SQLite format 3\0"
_STORAGE = (".mcap", ".db3")
_MEND = (
    "Copy it again if it was being copied; a recording cut off by a crash can be mended with "
    "`mcap recover` (.mcap) or `sqlite3 FILE .recover` (.db3), then `ros2 bag reindex`; "
    "--salvage (of replay and annotate) reads what is whole."
)


def check_kinds(path: Path) -> None:
    """Raise the `BagError` for a bag or a file in it that opening would wait for, or that is
    something else than a file under a file's name; nothing is opened.
    """
    try:
        files = path.iterdir() if path.is_dir() else iter([path])
        for file in files:
            kind = kind_of(file)
            if kind not in ("", "a folder") or (kind and file.suffix in _STORAGE and file != path):
                raise BagError(
                    ErrorCode.BAG_UNREADABLE,
                    f"{file} is {kind}, expected a regular file",
                    "Give a folder with a metadata.yaml in it, or a .mcap or .db3 file.",
                )
    except OSError as error:
        raise as_vlm_error(error) from error


def check_path(path: Path) -> None:
    """Raise the `BagError` for a path that cannot be a bag; cheap, reads only headers."""
    try:
        if not path.exists():
            raise BagError(
                ErrorCode.FILE_NOT_FOUND,
                f"there is no bag at {path}",
                "Give a folder with a metadata.yaml in it, or a .mcap or .db3 file.",
            )
        files = [path] if path.is_file() else _files_of_folder(path)
        for file in files:
            _check_file(file)
    except OSError as error:
        raise as_vlm_error(error) from error


def _files_of_folder(folder: Path) -> list[Path]:
    files = sorted(item for item in folder.iterdir() if item.suffix in _STORAGE)
    if (folder / "metadata.yaml").is_file():
        return files
    if files:
        raise BagError(
            ErrorCode.BAG_TRUNCATED,
            f"{folder} has no metadata.yaml: its recording was not finished",
            f"Give the file itself ({files[0]}), or run `ros2 bag reindex {folder}` first.",
        )
    raise BagError(
        ErrorCode.BAG_UNREADABLE,
        f"{folder} is no bag: neither metadata.yaml nor a .mcap or .db3 file is in it",
    )


def _check_file(file: Path) -> None:
    if file.suffix == ".bag":
        raise BagError(
            ErrorCode.BAG_UNREADABLE,
            f"{file} is a ROS 1 bag, expected ROS 2 (.mcap, .db3)",
            "Convert it: rosbags-convert --src FILE --dst FOLDER.",
        )
    if file.suffix not in _STORAGE:
        raise BagError(
            ErrorCode.BAG_UNREADABLE,
            f"{file} is no bag: expected a .mcap or .db3 file, or a folder with metadata.yaml",
        )
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(100)
        stream.seek(max(0, size - len(_MCAP_MAGIC)))
        tail = stream.read()
    missing = _cut_off(file, size, head, tail)
    if missing:
        raise BagError(ErrorCode.BAG_TRUNCATED, f"{file} is cut off: {missing}", _MEND)
    magic = _MCAP_MAGIC if file.suffix == ".mcap" else _SQLITE_MAGIC
    if not head.startswith(magic):
        raise BagError(
            ErrorCode.BAG_UNREADABLE,
            f"{file} is not what its name says: it begins with {head[:8]!r}, expected {magic!r}",
        )


def _cut_off(file: Path, size: int, head: bytes, tail: bytes) -> str:
    """What is missing of a file that was begun well, or ""."""
    if size == 0:
        return "it is empty"
    if file.suffix == ".mcap":
        if head.startswith(_MCAP_MAGIC) and tail != _MCAP_MAGIC:
            return f"its {size} bytes do not end as an MCAP file does"
        return ""
    if not head.startswith(_SQLITE_MAGIC):
        return ""
    if len(head) < 100:
        return "its header is incomplete"
    page = int(struct.unpack(">H", head[16:18])[0])
    page = 65536 if page == 1 else page
    pages = int(struct.unpack(">I", head[28:32])[0])
    counted = head[24:28] == head[92:96]  # else an old SQLite wrote last and left the count alone
    if counted and size < page * pages:
        return f"it has {size} of {page * pages} bytes"
    log = file.with_name(file.name + "-wal")
    if log.exists() and log.stat().st_size:
        return f"{log.name} holds messages that its recorder did not bring into the file any more"
    return ""


def explain(path: Path, error: Exception, after: int | None = None) -> VlmError:
    """The coded error for an exception of `rosbags`; `after` messages had been read by then."""
    if isinstance(error, VlmError):
        return error
    known = as_vlm_error(error)
    if isinstance(error, MemoryError):  # a damaged length field asks for more than there can be
        error = ValueError("a length in it is beyond the memory of this machine")
    elif known.code not in (ErrorCode.INTERNAL, ErrorCode.FILE_NOT_FOUND):
        return known
    text = str(error) or type(error).__name__
    where = f" after {after} messages" if after is not None else ""
    if "missing" in text and "files" in text:
        return BagError(ErrorCode.BAG_TRUNCATED, f"{path} is incomplete{where}: {text}", _MEND)
    if "Truncated record" in text:
        return BagError(ErrorCode.BAG_TRUNCATED, f"{path} is cut off{where}: {text}", _MEND)
    return BagError(
        ErrorCode.BAG_UNREADABLE,
        f"{path} cannot be read{where}: {text}",
        "Expected a rosbag2 recording of CDR messages, in db3 or MCAP; of a damaged one --salvage "
        "(of replay and annotate) reads what is whole.",
    )
