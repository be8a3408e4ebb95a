"""What is whole in a recording that was cut off: its complete chunks and messages.

Such files have lost their index (MCAP) or part of their pages (db3), so they are read from the
front up to the first piece that is missing. Nothing is written to them.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from rosbags.interfaces import (
    Connection,
    ConnectionExtRosbag2,
    MessageDefinition,
    MessageDefinitionFormat,
)
from rosbags.rosbag2.errors import ReaderError
from rosbags.rosbag2.metadata import ReaderMetadata, parse_qos
from rosbags.rosbag2.storage_mcap import McapReader

__all__ = ["SalvageReader", "storage_files"]

_RECORD_HEAD = 9  # opcode and length
_MAGIC = 8
_FORMATS = {"ros2msg": MessageDefinitionFormat.MSG, "ros2idl": MessageDefinitionFormat.IDL}
_LATEST = 2**63 - 1


def storage_files(path: Path) -> list[Path]:
    """The .mcap and .db3 files of a bag, in the order of their names' numbers; `path` if a file."""
    if path.is_file():
        return [path]
    files = [item for item in path.iterdir() if item.suffix in (".mcap", ".db3")]
    return sorted(files, key=lambda file: (_number(file.stem), file.name))


def _number(stem: str) -> int:
    tail = stem.rpartition("_")[2]
    return int(tail) if tail.isdecimal() else -1


class SalvageReader:
    """Reads like `rosbags`' reader, from files of which the end may be missing.

    `lost` says what could not be read. Raises `ReaderError` when nothing can be.
    """

    def __init__(self, path: Path) -> None:
        self.connections: list[Connection] = []
        self.lost: list[str] = []
        self._parts = [
            _CutMcap(file) if file.suffix == ".mcap" else _CutDb3(file)
            for file in storage_files(path)
        ]
        self._opened: list[_CutMcap | _CutDb3] = []

    def open(self) -> None:
        """Find what is whole in each file; a file in which nothing is counts as lost."""
        for part in self._parts:
            try:
                part.open()
            except Exception as error:  # whatever rosbags and SQLite stumble over
                part.close()
                self.lost.append(f"all of {part.path.name} ({error})")
                continue
            self._opened.append(part)
            if part.lost:
                self.lost.append(f"{part.lost} of {part.path.name}")
            self.connections.extend(part.connections)
        if not self.connections:
            self.close()
            raise ReaderError("Truncated record: nothing in it is whole.")

    def close(self) -> None:
        """Close the files."""
        for part in self._opened:
            part.close()
        self._opened = []

    @property
    def message_count(self) -> int:
        """Messages that are whole."""
        return sum(part.metadata.message_count for part in self._opened)

    @property
    def start_time(self) -> int:
        """Of the first of them, ns."""
        return min((part.metadata.start_time for part in self._opened), default=0)

    @property
    def duration(self) -> int:
        """From the first to the last and 1 ns."""
        end = max((part.metadata.end_time for part in self._opened), default=0)
        return end - self.start_time

    def messages(
        self, connections: Collection[Connection], start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[Connection, int, bytes]]:
        """As rosbags: (connection, time in ns, data)."""
        for part in self._opened:
            own = [item for item in connections if item.owner is part]
            if own:
                yield from part.messages(own, start, stop)


class _CutMcap(McapReader):  # type: ignore[misc]
    """An MCAP file read by its records up to the last whole one, without its index."""

    lost = ""

    def close(self) -> None:
        """Close the file; fine when it is closed already, as after a failed opening."""
        if self.bio is not None:
            super().close()

    def _open(self) -> None:
        size = os.path.getsize(self.path)
        self.bio.seek(_MAGIC)
        place = _MAGIC
        while place + _RECORD_HEAD <= size:
            head = self.bio.read(_RECORD_HEAD)
            end = place + _RECORD_HEAD + int.from_bytes(head[1:], "little")
            if head[0] == 0x0F or not 0 < head[0] < 0x80 or end > size:  # data end, or cut off
                break
            if not self.data_start:
                self.data_start = end
            place = end
            self.bio.seek(place)
        if place == _MAGIC:
            raise ReaderError("Truncated record: it ends in its header.")
        self.data_end = place
        self.meta_scan()
        ended = place < size and head[0] == 0x0F
        self.lost = "" if ended else f"{size - place} bytes of an unfinished piece at the end"
        found = self.statistics
        counts = found.channel_message_counts
        self.connections = [
            item._replace(msgcount=counts.get(item.id, 0)) for item in self.connections
        ]
        self.metadata = _metadata(found.message_count, found.start_time, found.end_time)

    def messages(
        self, connections: Collection[Connection], start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[Connection, int, bytes]]:
        """In the order of recording, which rosbags would want to be that of the stamps."""
        yield from self.messages_scan(connections, start, stop)


class _CutDb3:
    """A db3 file read row by row up to the first that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = ""
        self.connections: list[Connection] = []
        self.metadata = _metadata(0, _LATEST, 0)
        self._db: sqlite3.Connection | None = None
        self._last = 0

    def open(self) -> None:
        """Read the topics and look for the last whole row."""
        uri = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
        self._db = sqlite3.connect(uri, uri=True)
        # SQLite refuses a file that is shorter than its header says, except with this: it is how
        # its own `.recover` reads such files.
        self._db.execute("PRAGMA writable_schema=ON")
        counts = self._scan()
        self.connections = list(self._topics(counts))

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _scan(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        whole: dict[int, int] = {}
        first, last = _LATEST, 0
        tail = _Tail(int(self._database.execute("PRAGMA page_size").fetchone()[0]))
        rows = self._rows(_LATEST)
        while True:
            try:
                number, topic, stamp_ns, data = next(rows)
            except StopIteration:
                break
            except sqlite3.DatabaseError as error:
                self.lost = f"everything behind message {sum(counts.values())} ({error})"
                break
            if tail.may_be_missing(number, data):
                whole = dict(counts)
            counts[topic] = counts.get(topic, 0) + 1
            first, last = min(first, stamp_ns), max(last, stamp_ns)
            self._last = number
        if not self.lost and self._is_short(tail.page_size):
            self.lost = "what stood in the last pages"
        if self.lost and tail.doubted is not None:
            counts, self._last = whole, tail.doubted - 1
        self.metadata = _metadata(sum(counts.values()), first, last)
        return counts

    def _is_short(self, page_size: int) -> bool:
        """Whether pages are missing by the count in the file's own header."""
        with self.path.open("rb") as file:
            pages = int.from_bytes(file.read(32)[28:], "big")
        return self.path.stat().st_size < pages * page_size

    def _rows(self, last: int) -> Iterator[tuple[int, int, int, bytes]]:
        text = "SELECT id, topic_id, timestamp, data FROM messages WHERE id <= ? ORDER BY id"
        # Not `yield from`: put away late, that would close the cursor of a closed file.
        for row in self._database.execute(text, (last,)):  # noqa: UP028
            yield row

    def _topics(self, counts: dict[int, int]) -> Iterator[Connection]:
        definitions = self._definitions()
        self._database.row_factory = sqlite3.Row
        rows = self._database.execute("SELECT * FROM topics ORDER BY id").fetchall()
        self._database.row_factory = None
        for row in rows:
            names = row.keys()
            qos = row["offered_qos_profiles"] if "offered_qos_profiles" in names else ""
            unknown = MessageDefinition(MessageDefinitionFormat.NONE, "")
            yield Connection(
                row["id"],
                row["name"],
                row["type"],
                definitions.get(row["type"], unknown),
                row["type_description_hash"] if "type_description_hash" in names else "",
                counts.get(row["id"], 0),
                ConnectionExtRosbag2(row["serialization_format"], parse_qos(qos) if qos else []),
                self,
            )

    def _definitions(self) -> dict[str, MessageDefinition]:
        columns = "topic_type, encoding, encoded_message_definition"
        try:
            rows = self._database.execute(f"SELECT {columns} FROM message_definitions").fetchall()
        except sqlite3.DatabaseError:  # recorded before there was such a table
            return {}
        return {
            name: MessageDefinition(_FORMATS[encoding], text)
            for name, encoding, text in rows
            if encoding in _FORMATS
        }

    def messages(
        self, connections: Collection[Connection], start: int | None, stop: int | None
    ) -> Iterator[tuple[Connection, int, bytes]]:
        """Whole messages in the order of recording."""
        by_id = {item.id: item for item in connections}
        low, high = start or 0, _LATEST if stop is None else stop
        for _, topic, stamp_ns, data in self._rows(self._last):
            if topic in by_id and low <= stamp_ns < high:
                yield by_id[topic], stamp_ns, data

    @property
    def _database(self) -> sqlite3.Connection:
        if self._db is None:
            raise ReaderError(f"{self.path} is not open")
        return self._db


class _Tail:
    """From which message on a cut-off db3 file may be read wrongly.

    What is missing of a page is read as zeros: the end of the last page there is, and the last page
    of a long message, without an error. (When more is missing there is one.) Pages are given out in
    the order of recording, so that one that is there says that all of earlier messages are.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.doubted: int | None = None
        self._since = 0  # bytes of messages behind it

    def may_be_missing(self, number: int, data: bytes) -> bool:
        """Take note of the next message; true when doubt begins with it."""
        zero = data[-1:] == b"\0"
        long = len(data) > self.page_size // 2  # it may have pages of its own
        self._since += len(data)
        another = self._since > 2 * self.page_size or (long and not zero)
        if another or len(data) > 3 * self.page_size:
            self.doubted = None
        if zero and self.doubted is None:
            self.doubted, self._since = number, 0
            return True
        return False


def _metadata(count: int, first_ns: int, last_ns: int) -> Any:
    if not count:
        return ReaderMetadata(0, _LATEST, 0, 0, None, None, None, None)
    span = last_ns - first_ns + 1
    return ReaderMetadata(span, first_ns, last_ns + 1, count, None, None, None, None)
