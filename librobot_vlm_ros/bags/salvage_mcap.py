"""What is whole in an MCAP file that is cut off or damaged, without its index.

Its records are walked from the front. Where the next one makes no sense, the walk goes on at the
next chunk, which is found by its form. Each chunk counts as whole when its checksum is right and
all the messages that its index names are in it.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from rosbags.interfaces import Connection
from rosbags.rosbag2.errors import ReaderError
from rosbags.rosbag2.metadata import ReaderMetadata
from rosbags.rosbag2.storage_mcap import McapReader

__all__ = ["LATEST", "SalvageMcap", "counted"]

LATEST = 2**63 - 1
_MAGIC = 8
_HEAD = 9  # opcode and length
_FOOTER, _CHUNK, _INDEX, _DATA_END = 0x02, 0x06, 0x07, 0x0F
_BEFORE_COMPRESSION = 28  # two times, a size and a checksum
_CHUNK_FORM = re.compile(rb"\x06.{36}(?:\x04\0{3}zstd|\x03\0{3}lz4|\0{4})", re.DOTALL)
_MOST_OF_A_PIECE = 1 << 24  # records outside of chunks are read together up to this
_SHOWN = 5


@dataclass
class _Piece:
    """Records that are read together: one chunk, or what stands between two."""

    start: int
    end: int
    is_chunk: bool
    indexed: int = 0
    """Messages that the index behind the chunk names; 0 where there is none."""


class SalvageMcap:
    """Reads like `rosbags`' storages; `lost` says what is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = ""
        self.connections: list[Connection] = []
        self.metadata = counted(0, LATEST, 0)
        self._known = McapReader(path)  # schemas, channels and connections found so far
        self._file: BinaryIO | None = None
        self._pieces: list[_Piece] = []
        self._counts: Counter[int] = Counter()  # messages of each channel
        self._first_ns, self._last_ns = LATEST, 0

    def open(self) -> None:
        """Find what is whole. Raises what Python and rosbags raise for a file that is no MCAP."""
        self._file = self.path.open("rb")
        lost: list[str] = []
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            pieces = _pieces(data, lost)
        # Twice: what stands behind the data repeats the schemas and channels, and may know one that
        # stood in a damaged chunk. It has no checksum, so that the first one counts.
        postponed = [piece for piece in pieces if not self._take(piece, None)]
        for piece in postponed:
            self._take(piece, lost)
        self._pieces.sort(key=lambda piece: piece.start)
        self.connections = [
            item._replace(msgcount=self._counts[item.id], owner=self)
            for item in self._known.connections
        ]
        self.metadata = counted(sum(self._counts.values()), self._first_ns, self._last_ns)
        more = [f"{len(lost) - _SHOWN} pieces more"] if len(lost) > _SHOWN else []
        self.lost = ", ".join([*lost[:_SHOWN], *more])

    def close(self) -> None:
        """Close the file; fine when it is closed already, as after a failed opening."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reader(self, piece: _Piece) -> McapReader:
        """A reader of that piece alone, which knows what was found so far."""
        if self._file is None:
            raise ReaderError(f"{self.path} is not open")
        self._file.seek(piece.start)
        reader = McapReader(self.path)
        reader.bio = BytesIO(self._file.read(piece.end - piece.start))
        reader.data_end = piece.end - piece.start
        reader.schemas = dict(self._known.schemas)
        reader.channels = dict(self._known.channels)
        reader.connections = list(self._known.connections)
        return reader

    def _take(self, piece: _Piece, lost: list[str] | None) -> bool:
        """Count the messages of a piece that is whole. With `lost`, what is not is told to it, and
        messages of unknown topics do not hinder.
        """
        try:
            reader = self._reader(piece)
            reader.meta_scan()
            there = reader.statistics.message_count
            if there < piece.indexed:
                raise ReaderError(f"only {there} messages are in it")
            rows = reader.messages_scan(reader.connections)
            stamps = [(connection.id, stamp_ns) for connection, stamp_ns, _ in rows]
        except Exception as error:  # whatever rosbags and its decompressors stumble over
            if lost is not None:
                lost.append(_lost_piece(piece, error))
            return False
        if len(stamps) < there:
            if lost is None:
                return False
            lost.append(f"{there - len(stamps)} messages of unknown topics at byte {piece.start}")
        self._known = reader
        self._pieces.append(piece)
        for channel, stamp_ns in stamps:
            self._counts[channel] += 1
            self._first_ns = min(self._first_ns, stamp_ns)
            self._last_ns = max(self._last_ns, stamp_ns)
        return True

    def messages(
        self, connections: Collection[Connection], start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[Connection, int, bytes]]:
        """In the order of recording, which rosbags would want to be that of the stamps."""
        for piece in self._pieces:
            yield from self._reader(piece).messages_scan(connections, start, stop)


def counted(count: int, first_ns: int, last_ns: int) -> Any:
    """What rosbags calls the metadata of `count` messages."""
    if not count:
        return ReaderMetadata(0, LATEST, 0, 0, None, None, None, None)
    span = last_ns - first_ns + 1
    return ReaderMetadata(span, first_ns, last_ns + 1, count, None, None, None, None)


def _lost_piece(piece: _Piece, error: Exception) -> str:
    what = "a damaged chunk" if piece.is_chunk else f"{piece.end - piece.start} bytes"
    how_many = f"{piece.indexed} messages, " if piece.indexed else ""
    why = str(error).rstrip(".") or type(error).__name__
    return f"{what} at byte {piece.start} ({how_many}{why})"


def _pieces(data: mmap.mmap, lost: list[str]) -> list[_Piece]:
    """The pieces of a file by their form; what has none is told to `lost`.

    Schemas and channels are repeated behind the data, so that the walk goes on to the footer.
    """
    pieces: list[_Piece] = []
    place, size = _MAGIC, len(data)
    before = place
    has_ended = False
    while place < size and data[place] != _FOOTER:
        end = _end_of_record(data, place)
        if end:
            _append(pieces, data, place, end)
            has_ended |= data[place] == _DATA_END
            before, place = end if data[place] == _CHUNK else place, end
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
    if kind == _INDEX and last and last.is_chunk:
        last.indexed += (end - place - _HEAD - 6) // 16
    if kind in (_INDEX, _DATA_END):
        return
    joins = last and not last.is_chunk and kind != _CHUNK and last.end == place
    if last and joins and end - last.start <= _MOST_OF_A_PIECE:
        last.end = end
    else:
        pieces.append(_Piece(place, end, kind == _CHUNK))


def _end_of_record(data: mmap.mmap, place: int) -> int:
    """Where the record at `place` ends; 0 where none that is whole begins."""
    start = place + _HEAD
    length = _number(data, place + 1, 8)
    if not 0 < data[place] < 0x80 or start + length > len(data):
        return 0
    if data[place] == _CHUNK:
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
