"""Writing bags: MCAP with compressed chunks, or db3, readable by `ros2 bag` and Foxglove.

A bag is complete when its `metadata.yaml` is there: that is written last.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from rosbags.interfaces import Connection
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.rosbag2.storage_mcap import McapWriter
from rosbags.typesys.store import Typestore

from librobot_vlm_ros.bags.qos import BagQos, to_recorded
from librobot_vlm_ros.bags.typestore import extended_typestore
from librobot_vlm_ros.core import BagError, ErrorCode, VlmError, as_vlm_error

Storage = Literal["mcap", "db3"]
_PLUGINS = {"mcap": StoragePlugin.MCAP, "db3": StoragePlugin.SQLITE3}
_VERSION: Literal[9] = 9  # of metadata.yaml; what Jazzy writes
_CHECKSUM = 9 + 24  # place in a chunk: behind opcode and length, two times and a size


@dataclass(frozen=True)
class BagSummary:
    """What was written."""

    path: Path
    counts: Mapping[str, int]
    """Messages by topic."""


class _McapWriter(McapWriter):
    """Writes the checksum of each chunk, which rosbags leaves out: damage is then noticed."""

    def close_chunk(self) -> None:
        """Write the pending chunk, and its checksum into it."""
        place = self.bio.tell() + _CHECKSUM
        checksum = zlib.crc32(self.chunk.bio.getbuffer())
        super().close_chunk()
        end = self.bio.tell()
        self.bio.seek(place)
        self.bio.write(checksum.to_bytes(4, "little"))
        self.bio.seek(end)


class _Writer(Writer):
    STORAGE_PLUGINS: ClassVar[Mapping[StoragePlugin, Any]] = {
        **Writer.STORAGE_PLUGINS,
        StoragePlugin.MCAP: _McapWriter,
    }


class BagWriter:
    """Writes a new bag folder; a context manager. Leaving it by an exception leaves no metadata.

    `overwrite` replaces an older bag at `path`, and nothing but a bag. `types` gives definitions
    beyond those of Jazzy and of this package (a reader's `typestore`, when copying).
    Raises `BagError`: PATH_NOT_ALLOWED when something is there, DISK_FULL, PERMISSION_DENIED.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        storage: Storage = "mcap",
        compress: bool = True,
        overwrite: bool = False,
        types: Typestore | None = None,
    ) -> None:
        self.path = Path(path)
        self.types = types or extended_typestore({})
        self.counts: dict[str, int] = {}
        self._storage = storage
        self._compress = compress
        self._overwrite = overwrite
        self._writer: Writer | None = None
        self._connections: dict[str, Connection] = {}

    def __enter__(self) -> BagWriter:
        with _coded_errors(self.path):
            if self._overwrite:
                _remove_bag(self.path)
            if self.path.exists():
                raise BagError(
                    ErrorCode.PATH_NOT_ALLOWED,
                    f"{self.path} exists already, a bag is written to a new folder",
                    "Remove it or choose another path.",
                )
            writer = _Writer(self.path, version=_VERSION, storage_plugin=_PLUGINS[self._storage])
            if self._compress and self._storage == "mcap":  # chunks; every MCAP tool reads them
                writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
            writer.open()
        self._writer = writer
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        if error is not None:
            with contextlib.suppress(Exception):  # what ended it says more than closing can
                writer.abort()
            return
        with _coded_errors(self.path):
            writer.close()

    def note(self, key: str, value: str) -> None:
        """Keep a text in metadata.yaml (rosbag2's custom data)."""
        self._open.set_custom_data(key, value)

    def add_topic(
        self,
        name: str,
        type_name: str,
        qos: BagQos | None = None,
        definition: tuple[str, str] = ("", ""),
    ) -> None:
        """Declare a topic; needed before writing to it. Twice with the same type is fine.

        `definition` is what `BagReader.definition` gives, to copy a topic as it was recorded;
        without it the type must be one of `types`.
        """
        known = self._connections.get(name)
        if known is not None:
            if known.msgtype != type_name:
                raise BagError(
                    ErrorCode.WRONG_TYPE, f"topic {name} holds {known.msgtype}, not {type_name}"
                )
            return
        text, digest = definition
        recorded = bool(text and digest)
        if not recorded and type_name not in self.types.fielddefs:
            raise BagError(
                ErrorCode.WRONG_TYPE,
                f"the definition of {type_name} (topic {name}) is not known",
                "Give a typestore that has it.",
            )
        with _coded_errors(self.path):
            self._connections[name] = self._open.add_connection(
                name,
                type_name,
                typestore=self.types,
                msgdef=text if recorded else None,
                rihs01=digest if recorded else None,
                offered_qos_profiles=[to_recorded(qos or BagQos())],
            )
        self.counts[name] = 0

    def write(self, topic: str, stamp_ns: int, data: bytes) -> None:
        """Append a serialized (CDR) message, recorded at `stamp_ns`."""
        connection = self._connections.get(topic)
        if connection is None:
            raise BagError(ErrorCode.TOPIC_NOT_IN_BAG, f"topic {topic} was not declared")
        with _coded_errors(self.path):
            self._open.write(connection, stamp_ns, data)
        self.counts[topic] += 1

    def write_message(self, topic: str, stamp_ns: int, message: object) -> None:
        """Append a message object made from `self.types`."""
        connection = self._connections.get(topic)
        name = connection.msgtype if connection else ""
        self.write(topic, stamp_ns, bytes(self.types.serialize_cdr(message, name)))

    def make(self, type_name: str, **fields: Any) -> Any:
        """A message object of a known type."""
        return self.types.types[type_name](**fields)

    def header(self, stamp_ns: int, frame_id: str) -> Any:
        """A `std_msgs/msg/Header`."""
        seconds, nanoseconds = divmod(stamp_ns, 10**9)
        stamp = self.make("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanoseconds)
        return self.make("std_msgs/msg/Header", stamp=stamp, frame_id=frame_id)

    @property
    def _open(self) -> Writer:
        if self._writer is None:
            raise VlmError(ErrorCode.INTERNAL, f"{self.path} is written outside `with BagWriter`")
        return self._writer

    def summary(self) -> BagSummary:
        """What was written so far."""
        return BagSummary(self.path, dict(self.counts))


def _remove_bag(path: Path) -> None:
    """Remove an older bag; refuse to remove anything that does not look like one."""
    if not path.exists():
        return
    foreign = [
        item.name
        for item in (path.iterdir() if path.is_dir() else [path])
        if item.name != "metadata.yaml" and item.suffix not in (".mcap", ".db3")
    ]
    if foreign or not path.is_dir():
        raise BagError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{path} is not replaced: it is no bag folder (found {sorted(foreign)[:3]})",
            "Remove it yourself or choose another path.",
        )
    shutil.rmtree(path)


@contextlib.contextmanager
def _coded_errors(path: Path) -> Iterator[None]:
    """What writing `path` raises, as `VlmError`."""
    try:
        yield
    except Exception as error:
        coded = as_vlm_error(error)
        if coded.code == ErrorCode.INTERNAL and is_disk_full(error):
            coded = disk_full(path, error)
        elif coded.code == ErrorCode.INTERNAL:
            text = str(error) or type(error).__name__
            coded = BagError(ErrorCode.BAG_UNREADABLE, f"{path} cannot be written: {text}")
        raise coded from error


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not grow: no space, a quota, a limit on the size of files.

    SQLite reports the latter as "disk I/O error".
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    text = str(error)
    return "disk is full" in text or "disk I/O error" in text


def disk_full(path: Path, error: BaseException) -> BagError:
    """The coded error for it."""
    return BagError(
        ErrorCode.DISK_FULL,
        f"{path} cannot grow: {error}",
        "Free space on that disk (or raise the limit on file sizes) and try again.",
    )
