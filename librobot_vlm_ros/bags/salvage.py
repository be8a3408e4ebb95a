"""What is whole in a recording that was cut off or damaged: its complete chunks and messages.

A db3 file is read from the front up to the first page that is missing or damaged. An MCAP file is
read chunk by chunk, past the damaged ones and without its index. Nothing is written to either.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from mcap.opcode import Opcode
from mcap.records import Channel, Chunk, McapRecord, Message, Schema
from mcap.stream_reader import CRCValidationError, StreamReader, get_chunk_data_stream
from rosbags.interfaces import (
    Connection,
    ConnectionExtRosbag2,
    MessageDefinition,
    MessageDefinitionFormat,
)
from rosbags.rosbag2.errors import ReaderError
from rosbags.rosbag2.metadata import parse_qos

_FORMATS = {
    "ros2msg": MessageDefinitionFormat.MSG,
    "ros2idl": MessageDefinitionFormat.IDL,
    "omgidl": MessageDefinitionFormat.IDL,
    "": MessageDefinitionFormat.NONE,
}
_NO_DEFINITION = MessageDefinition(MessageDefinitionFormat.NONE, "")
_LATEST = 2**63 - 1


def storage_files(path: Path) -> list[Path]:
    """The .mcap and .db3 files of a bag, in the order of their names' numbers; `path` if a file."""
    if path.is_file():
        return [path]
    files = [item for item in path.iterdir() if item.suffix in (".mcap", ".db3")]
    return sorted(files, key=lambda file: (_file_number(file.stem), file.name))


def _file_number(stem: str) -> int:
    tail = stem.rpartition("_")[2]
    return int(tail) if tail.isdecimal() else -1


class SalvageReader:
    """Reads like `rosbags`' reader, from files of which a part may be missing or damaged.

    `lost` says what could not be read. Raises `ReaderError` when nothing can be.
    """

    def __init__(self, path: Path) -> None:
        self.connections: list[Connection] = []
        self.lost: list[str] = []
        self._files: list[_SalvageFile] = [
            _SalvageMcap(file) if file.suffix == ".mcap" else _SalvageDb3(file)
            for file in storage_files(path)
        ]
        self._opened: list[_SalvageFile] = []

    def open(self) -> None:
        """Find what is whole in each file; a file in which nothing is counts as lost."""
        for file in self._files:
            try:
                file.open()
            except Exception as error:  # whatever mcap, rosbags and SQLite stumble over
                file.close()
                self.lost.append(f"all of {file.path.name} ({error})")
                continue
            self._opened.append(file)
            if file.lost:
                self.lost.append(f"{file.lost} of {file.path.name}")
            self.connections.extend(file.connections)
        if not self.connections:
            self.close()
            raise ReaderError("Truncated record: nothing in it is whole.")

    def close(self) -> None:
        """Close the files."""
        for file in self._opened:
            file.close()
        self._opened = []

    @property
    def message_count(self) -> int:
        """Messages that are whole."""
        return sum(file.counts.total() for file in self._opened)

    @property
    def start_time(self) -> int:
        """Of the first of them, ns."""
        return min((file.first_ns for file in self._opened), default=0)

    @property
    def duration(self) -> int:
        """From the first to the last and 1 ns."""
        return max((file.last_ns for file in self._opened), default=0) + 1 - self.start_time

    def messages(
        self, connections: Collection[Connection], start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[Connection, int, bytes]]:
        """As rosbags: (connection, time in ns, data), in the order of recording."""
        low, high = start or 0, _LATEST if stop is None else stop
        for file in self._opened:
            own = {item.id: item for item in connections if item.owner is file}
            if not own:
                continue
            for channel, stamp_ns, data in file.rows():
                if channel in own and low <= stamp_ns < high:
                    yield own[channel], stamp_ns, data


class _SalvageFile:
    """One storage file, and the messages in it that are whole: how many, from when to when."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = ""
        self.connections: list[Connection] = []
        self.counts: Counter[int] = Counter()  # by channel
        self.first_ns, self.last_ns = _LATEST, 0
        self._opened = contextlib.ExitStack()

    def open(self) -> None:
        """Find what is whole; to be called once, before `rows`."""
        raise NotImplementedError

    def rows(self) -> Iterator[tuple[int, int, bytes]]:
        """(channel, time in ns, data) of each whole message in the order of recording."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file; fine when it is closed already, as after a failed opening."""
        self._opened.close()

    def _add(self, channel: int, stamp_ns: int) -> None:
        self.counts[channel] += 1
        self.first_ns = min(self.first_ns, stamp_ns)
        self.last_ns = max(self.last_ns, stamp_ns)


# --- db3 -------------------------------------------------------------------------------------


class _SalvageDb3(_SalvageFile):
    """A db3 file read row by row up to the first that is not whole."""

    _db: sqlite3.Connection
    _last_row = 0

    def open(self) -> None:
        """Read the topics and look for the last whole row."""
        uri = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
        connection = contextlib.closing(sqlite3.connect(uri, uri=True))
        self._db = self._opened.enter_context(connection)
        # SQLite refuses a file that is shorter than its header says, except with this: it is how
        # its own `.recover` reads such files.
        self._db.execute("PRAGMA writable_schema=ON")
        self._scan()
        self.connections = list(self._topics())

    def rows(self) -> Iterator[tuple[int, int, bytes]]:
        """See `_SalvageFile`; the channel is the topic's id."""
        for _, topic, stamp_ns, data in self._rows_up_to(self._last_row):
            yield topic, stamp_ns, data

    def _scan(self) -> None:
        before_doubt: Counter[int] = Counter()
        tail = _DoubtedTail(int(self._db.execute("PRAGMA page_size").fetchone()[0]))
        try:
            for number, topic, stamp_ns, data in self._rows_up_to(_LATEST):
                if tail.begins_with(number, data):
                    before_doubt = self.counts.copy()
                self._add(topic, stamp_ns)
                self._last_row = number
        except sqlite3.DatabaseError as error:
            self.lost = f"everything behind message {self.counts.total()} ({error})"
        if not self.lost and self._is_short(tail.page_size):
            self.lost = "what stood in the last pages"
        if self.lost and tail.first_row is not None:
            self.counts, self._last_row = before_doubt, tail.first_row - 1

    def _is_short(self, page_size: int) -> bool:
        """Whether pages are missing by the count in the file's own header."""
        with self.path.open("rb") as file:
            pages = int.from_bytes(file.read(32)[28:], "big")
        return self.path.stat().st_size < pages * page_size

    def _rows_up_to(self, last: int) -> Iterator[tuple[int, int, int, bytes]]:
        text = "SELECT id, topic_id, timestamp, data FROM messages WHERE id <= ? ORDER BY id"
        # Not `yield from`: put away late, that would close the cursor of a closed file.
        for row in self._db.execute(text, (last,)):  # noqa: UP028
            yield row

    def _topics(self) -> Iterator[Connection]:
        definitions = self._definitions()
        self._db.row_factory = sqlite3.Row
        rows = self._db.execute("SELECT * FROM topics ORDER BY id").fetchall()
        self._db.row_factory = None
        for row in rows:
            names = row.keys()
            qos = row["offered_qos_profiles"] if "offered_qos_profiles" in names else ""
            yield Connection(
                row["id"],
                row["name"],
                row["type"],
                definitions.get(row["type"], _NO_DEFINITION),
                row["type_description_hash"] if "type_description_hash" in names else "",
                self.counts[row["id"]],
                ConnectionExtRosbag2(row["serialization_format"], parse_qos(qos) if qos else []),
                self,
            )

    def _definitions(self) -> dict[str, MessageDefinition]:
        columns = "topic_type, encoding, encoded_message_definition"
        try:
            rows = self._db.execute(f"SELECT {columns} FROM message_definitions").fetchall()
        except sqlite3.DatabaseError:  # recorded before there was such a table
            return {}
        return {
            name: MessageDefinition(_FORMATS[encoding], text)
            for name, encoding, text in rows
            if encoding in _FORMATS
        }


class _DoubtedTail:
    """From which row on a cut-off db3 file may be read wrongly.

    What is missing of a page is read as zeros: the end of the last page there is, and the last page
    of a long message, without an error. (When more is missing there is one.) Pages are given out in
    the order of recording, so that one that is there says that all of earlier messages are.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.first_row: int | None = None
        self._since = 0  # bytes of messages behind it

    def begins_with(self, row: int, data: bytes) -> bool:
        """Take note of the next message; true when doubt begins with it."""
        zero = data[-1:] == b"\0"
        long = len(data) > self.page_size // 2  # it may have pages of its own
        self._since += len(data)
        another = self._since > 2 * self.page_size or (long and not zero)
        if another or len(data) > 3 * self.page_size:
            self.first_row = None
        if zero and self.first_row is None:
            self.first_row, self._since = row, 0
            return True
        return False


# --- MCAP ------------------------------------------------------------------------------------
# The official library reads the records and checks the chunks. It stops at the first damaged
# record, so that finding where it can go on is ours: records are walked from the front by their
# lengths, and where the next one makes no sense, the walk goes on at the next chunk, which is
# recognised by its form.

_MAGIC = b"\x89MCAP0\r\n"
_FOOTER = bytes([Opcode.FOOTER]) + (20).to_bytes(8, "little") + bytes(20)
_READ = (Opcode.SCHEMA, Opcode.CHANNEL, Opcode.MESSAGE, Opcode.CHUNK)  # others are passed over
_HEAD = 9  # bytes of opcode and length
_BEFORE_COMPRESSION = 28  # in a chunk: two times, a size and a checksum
_CHUNK_FORM = re.compile(rb"\x06.{36}(?:\x04\0{3}zstd|\x03\0{3}lz4|\0{4})", re.DOTALL)
_MOST_OF_A_PIECE = 1 << 24  # bytes; records outside of chunks are read together up to this
_SHOWN = 5  # pieces that are told one by one


@dataclass
class _Piece:
    """Bytes `start` to `end`, read together: one chunk, or the records between two chunks."""

    start: int
    end: int
    is_chunk: bool
    indexed: int = 0
    """Messages that the index behind the chunk names; 0 where there is none."""


class _SalvageMcap(_SalvageFile):
    """An MCAP file read piece by piece.

    A chunk counts as whole when its checksum is right and all the messages that its index names are
    in it. Channels that are not of ROS 2 (protobuf, JSON) count as unknown topics.
    """

    _file: BinaryIO

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._schemas: dict[int, Schema] = {}
        self._channels: dict[int, Connection] = {}
        self._pieces: list[_Piece] = []

    def open(self) -> None:
        """Find what is whole."""
        self._file = self._opened.enter_context(self.path.open("rb"))
        lost: list[str] = []
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            pieces = _pieces(data, lost)
        # Twice: what stands behind the data repeats the schemas and channels, and may know one that
        # stood in a damaged chunk. It has no checksum, so that the first one counts.
        postponed = [piece for piece in pieces if not self._add_if_whole(piece, None)]
        for piece in postponed:
            self._add_if_whole(piece, lost)
        self._pieces.sort(key=lambda piece: piece.start)
        self.connections = [
            item._replace(msgcount=self.counts[number]) for number, item in self._channels.items()
        ]
        more = [f"{len(lost) - _SHOWN} pieces more"] if len(lost) > _SHOWN else []
        self.lost = ", ".join([*lost[:_SHOWN], *more])

    def rows(self) -> Iterator[tuple[int, int, bytes]]:
        """See `_SalvageFile`."""
        for piece in self._pieces:
            for record in self._records(piece):
                if isinstance(record, Message):
                    yield record.channel_id, record.log_time, record.data

    def _records(self, piece: _Piece) -> Iterator[McapRecord]:
        self._file.seek(piece.start)
        return _records(self._file.read(piece.end - piece.start))

    def _add_if_whole(self, piece: _Piece, lost: list[str] | None) -> bool:
        """Count the messages of a piece that is whole. With `lost`, what is not is told to it, and
        messages of unknown topics do not hinder.
        """
        schemas, channels = dict(self._schemas), dict(self._channels)
        stamps: list[tuple[int, int]] = []
        try:
            for record in self._records(piece):
                if isinstance(record, Schema):
                    schemas.setdefault(record.id, record)
                elif isinstance(record, Channel) and record.id not in channels:
                    connection = self._connection(record, schemas)
                    if connection is not None:
                        channels[record.id] = connection
                elif isinstance(record, Message):
                    stamps.append((record.channel_id, record.log_time))
            if len(stamps) < piece.indexed:
                raise ReaderError(f"only {len(stamps)} messages are in it")
        except Exception as error:  # whatever mcap and its decompressors stumble over
            if lost is not None:
                lost.append(_lost_piece(piece, error))
            return False
        known = [(channel, stamp_ns) for channel, stamp_ns in stamps if channel in channels]
        if len(known) < len(stamps):
            if lost is None:
                return False
            unknown = len(stamps) - len(known)
            lost.append(f"{unknown} messages of unknown topics at byte {piece.start}")
        self._schemas, self._channels = schemas, channels
        self._pieces.append(piece)
        for channel, stamp_ns in known:
            self._add(channel, stamp_ns)
        return True

    def _connection(self, channel: Channel, schemas: dict[int, Schema]) -> Connection | None:
        """As rosbags tells of a channel; None where it is not of ROS 2 or its schema not known."""
        name, definition = "__schemaless__", _NO_DEFINITION
        if channel.schema_id:
            schema = schemas.get(channel.schema_id)
            if schema is None or schema.encoding not in _FORMATS:
                return None
            name = schema.name
            definition = MessageDefinition(_FORMATS[schema.encoding], schema.data.decode())
        qos = channel.metadata.get("offered_qos_profiles")
        ext = ConnectionExtRosbag2(channel.message_encoding, parse_qos(qos) if qos else [])
        return Connection(channel.id, channel.topic, name, definition, "", 0, ext, self)


def _records(data: bytes) -> Iterator[McapRecord]:
    """The records in `data` and in its chunks. Raises where a chunk's size or checksum is wrong, or
    a record is not whole.
    """
    # The reader goes on to a footer, so that the records get one.
    closed = BytesIO(data + _FOOTER + _MAGIC)
    for record in StreamReader(closed, skip_magic=True, emit_chunks=True).records:
        if isinstance(record, Chunk):
            stream, size = get_chunk_data_stream(record, validate_crc=True)
            if size != record.uncompressed_size:
                expected = f"expected {record.uncompressed_size} bytes, got {size}"
                raise ReaderError(f"Chunk size mismatch: {expected}.")
            yield from _records(stream.read(size))
        else:
            yield record


def _lost_piece(piece: _Piece, error: Exception) -> str:
    what = "a damaged chunk" if piece.is_chunk else f"{piece.end - piece.start} bytes"
    how_many = f"{piece.indexed} messages, " if piece.indexed else ""
    why = str(error).rstrip(".") or type(error).__name__
    if isinstance(error, CRCValidationError):
        why = "Chunk checksum mismatch"
    return f"{what} at byte {piece.start} ({how_many}{why})"


def _pieces(data: mmap.mmap, lost: list[str]) -> list[_Piece]:
    """The pieces of a file by their form; what has none is told to `lost`.

    Schemas and channels are repeated behind the data, so that the walk goes on to the footer.
    """
    pieces: list[_Piece] = []
    place, size = len(_MAGIC), len(data)
    before = place
    has_ended = False
    while place < size and data[place] != Opcode.FOOTER:
        end = _end_of_record(data, place)
        if end:
            _append(pieces, data, place, end)
            has_ended |= data[place] == Opcode.DATA_END
            before, place = end if data[place] == Opcode.CHUNK else place, end
            continue
        if has_ended:
            break  # all messages stand before it
        # The record before may be the damaged one, its length being wrong; not so a chunk.
        following = _next_chunk(data, before + 1) or size
        begin = min(place, following)
        while pieces and pieces[-1].end > begin:
            begin = pieces.pop().start
        end_of_all = following == size
        where = "of an unfinished piece at the end" if end_of_all else f"at byte {begin}"
        lost.append(f"{following - begin} bytes {where}")
        before, place = place, following
    return pieces


def _append(pieces: list[_Piece], data: mmap.mmap, place: int, end: int) -> None:
    kind, last = data[place], pieces[-1] if pieces else None
    if kind == Opcode.MESSAGE_INDEX and last and last.is_chunk:
        last.indexed += (end - place - _HEAD - 6) // 16
    if kind not in _READ:
        return
    joins = last and not last.is_chunk and kind != Opcode.CHUNK and last.end == place
    if last and joins and end - last.start <= _MOST_OF_A_PIECE:
        last.end = end
    else:
        pieces.append(_Piece(place, end, kind == Opcode.CHUNK))


def _end_of_record(data: mmap.mmap, place: int) -> int:
    """Where the record at `place` ends; 0 where none that is whole begins."""
    start = place + _HEAD
    length = _number(data, place + 1, 8)
    if not 0 < data[place] < 0x80 or start + length > len(data):
        return 0
    if data[place] == Opcode.CHUNK:
        name = start + _BEFORE_COMPRESSION
        name_end = name + 4 + _number(data, name, 4)
        if name_end + 8 + _number(data, name_end, 8) != start + length:
            return 0
    return start + length


def _next_chunk(data: mmap.mmap, place: int) -> int:
    """Where the next chunk that is all there begins; 0 if there is none."""
    while found := _CHUNK_FORM.search(data, place):
        if _end_of_record(data, found.start()):
            return found.start()
        place = found.start() + 1
    return 0


def _number(data: mmap.mmap, place: int, size: int) -> int:
    return int.from_bytes(data[place : place + size], "little")
