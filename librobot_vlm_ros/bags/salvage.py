"""What is whole in a recording that was cut off or damaged: its complete chunks and messages.

An MCAP file is read chunk by chunk, past the damaged ones; a db3 file from the front up to the
first page that is missing or damaged. Nothing is written to them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path

from rosbags.interfaces import (
    Connection,
    ConnectionExtRosbag2,
    MessageDefinition,
    MessageDefinitionFormat,
)
from rosbags.rosbag2.errors import ReaderError
from rosbags.rosbag2.metadata import parse_qos

from librobot_vlm_ros.bags.salvage_mcap import LATEST, SalvageMcap, counted

__all__ = ["SalvageReader", "storage_files"]

_FORMATS = {"ros2msg": MessageDefinitionFormat.MSG, "ros2idl": MessageDefinitionFormat.IDL}


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
    """Reads like `rosbags`' reader, from files of which a part may be missing or damaged.

    `lost` says what could not be read. Raises `ReaderError` when nothing can be.
    """

    def __init__(self, path: Path) -> None:
        self.connections: list[Connection] = []
        self.lost: list[str] = []
        self._parts = [
            SalvageMcap(file) if file.suffix == ".mcap" else _SalvageDb3(file)
            for file in storage_files(path)
        ]
        self._opened: list[SalvageMcap | _SalvageDb3] = []

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


class _SalvageDb3:
    """A db3 file read row by row up to the first that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = ""
        self.connections: list[Connection] = []
        self.metadata = counted(0, LATEST, 0)
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
        first, last = LATEST, 0
        tail = _Tail(int(self._database.execute("PRAGMA page_size").fetchone()[0]))
        rows = self._rows(LATEST)
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
        self.metadata = counted(sum(counts.values()), first, last)
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
        low, high = start or 0, LATEST if stop is None else stop
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
