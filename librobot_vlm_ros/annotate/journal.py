"""What a run of `annotate` has done so far, in one SQLite file: plan, finished segments, results.

A segment is written in one transaction. Whatever ends the process, the file holds whole segments
and nothing else, which is all that resuming needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from librobot_vlm_ros.annotate.plan import FramePlan, Key
from librobot_vlm_ros.bags.writer import disk_full, is_disk_full
from librobot_vlm_ros.core import BagError, EngineError, ErrorCode

_FILE = "journal.db"
_LOCK = "lock"
_FOLDERS = ("bag", "old")  # the new bag being written, and the one it replaces
_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE frames (
    number INTEGER PRIMARY KEY, segment INTEGER, bag INTEGER, topic TEXT, stamp_ns INTEGER,
    nth INTEGER, camera TEXT, sequence INTEGER, instruction INTEGER, tasks TEXT
);
CREATE UNIQUE INDEX frames_by_place ON frames (bag, topic, stamp_ns, nth);
CREATE INDEX frames_by_segment ON frames (segment);
CREATE TABLE segments (number INTEGER PRIMARY KEY, frames INTEGER NOT NULL);
CREATE TABLE results (
    frame INTEGER, place INTEGER, topic TEXT, code INTEGER, data BLOB, PRIMARY KEY (frame, place)
) WITHOUT ROWID;
CREATE TABLE bad (frame INTEGER PRIMARY KEY, code INTEGER, text TEXT);
"""


class ResultRow(NamedTuple):
    """One serialized result of a frame."""

    frame: int
    place: int
    topic: str
    code: int
    """Its error code; 0 for an answer."""
    data: bytes


class BadFrame(NamedTuple):
    """A frame that is no usable image."""

    frame: int
    code: int
    text: str


class SegmentDone(NamedTuple):
    """Everything that answering a segment gave."""

    number: int
    frames: int
    results: list[ResultRow]
    bad: list[BadFrame]


def journal_folder(out: Path) -> Path:
    """Where the unfinished work for the bag `out` lies: beside it."""
    return Path(f"{out.absolute()}.partial")


class Journal:
    """The journal of one output bag; a context manager. One process at a time may hold it.

    Raises `BagError` DISK_FULL when it cannot grow, `EngineError` BUSY when another run holds it.
    """

    def __init__(self, out: Path) -> None:
        self.folder = journal_folder(out)
        self._lock: IO[str]
        self._db: sqlite3.Connection

    def __enter__(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise EngineError(
                ErrorCode.BUSY, f"another run works in {self.folder}", "Wait for it, or end it."
            ) from error
        self._connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._lock.close()

    def _connect(self) -> None:
        self._db = sqlite3.connect(self.folder / _FILE, isolation_level=None)

    # -- the plan

    def clear(self) -> None:
        """Throw everything away and begin anew."""
        self._db.close()
        for item in self.folder.glob(f"{_FILE}*"):
            item.unlink()
        self._connect()

    def meta(self) -> dict[str, Any]:
        """The `meta` given to `write_plan`; empty when no plan was completed."""
        try:
            rows = self._db.execute("SELECT name, value FROM meta").fetchall()
        except sqlite3.DatabaseError:  # killed before there were tables, or no journal of ours
            return {}
        return {name: json.loads(value) for name, value in rows}

    def write_plan(self, frames: Iterable[FramePlan], meta: Callable[[], dict[str, Any]]) -> None:
        """Store the plan: all of it or nothing. `meta` is called after the last frame."""
        with self._transaction() as db:
            for statement in _TABLES.split(";"):
                db.execute(statement)
            rows = ((*frame[:9], ",".join(map(str, frame.tasks))) for frame in frames)
            db.executemany("INSERT INTO frames VALUES (?,?,?,?,?,?,?,?,?,?)", rows)
            pairs = [(name, json.dumps(value)) for name, value in meta().items()]
            db.executemany("INSERT INTO meta VALUES (?, ?)", pairs)

    def open_segments(self) -> list[int]:
        """Numbers of the segments that are not done."""
        rows = self._db.execute(
            "SELECT DISTINCT segment FROM frames "
            "WHERE segment NOT IN (SELECT number FROM segments) ORDER BY segment"
        )
        return [number for (number,) in rows]

    def frames_of(self, segment: int) -> list[FramePlan]:
        """The frames of a segment."""
        text = "SELECT * FROM frames WHERE segment = ? ORDER BY number"
        return [
            FramePlan._make((*row[:9], tuple(map(int, row[9].split(",")))))
            for row in self._db.execute(text, (segment,))
        ]

    # -- the work

    def commit(self, done: SegmentDone) -> None:
        """Store a finished segment: all of it or nothing."""
        with self._transaction() as db:
            db.execute("INSERT INTO segments VALUES (?, ?)", (done.number, done.frames))
            db.executemany("INSERT INTO results VALUES (?,?,?,?,?)", done.results)
            db.executemany("INSERT INTO bad VALUES (?,?,?)", done.bad)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except BaseException as error:
            # Not by ROLLBACK, for which a full disk may have no room: opening it anew undoes it.
            self._db.close()
            self._connect()
            if is_disk_full(error):
                raise disk_full(self.folder / _FILE, error) from error
            raise

    # -- what there is

    def frame_count(self) -> int:
        """Frames of the plan."""
        return self._sum("SELECT count(*) FROM frames")

    def done_count(self) -> int:
        """Frames of finished segments."""
        return self._sum("SELECT coalesce(sum(frames), 0) FROM segments")

    def _sum(self, text: str) -> int:
        return int(self._db.execute(text).fetchone()[0])

    def results_at(self, key: Key) -> list[tuple[str, bytes]]:
        """(topic, data) of the results of one frame, in order."""
        text = (
            "SELECT results.topic, data FROM frames JOIN results ON results.frame = frames.number "
            "WHERE bag = ? AND frames.topic = ? AND stamp_ns = ? AND nth = ? ORDER BY place"
        )
        return self._db.execute(text, key).fetchall()

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Results and bad frames, by the name of their error code."""
        text = "SELECT code, count(*) FROM {} GROUP BY code ORDER BY code"

        def count(table: str) -> dict[str, int]:
            rows = self._db.execute(text.format(table))
            return {ErrorCode(code).name: number for code, number in rows}

        return count("results"), count("bad")

    def bad_frames(self, most: int) -> list[tuple[str, int, str]]:
        """(topic, time, why) of the first bad frames."""
        text = (
            "SELECT topic, stamp_ns, text FROM bad JOIN frames ON bad.frame = frames.number "
            "ORDER BY bad.frame LIMIT ?"
        )
        return self._db.execute(text, (most,)).fetchall()


def remove_work(out: Path) -> None:
    """Remove what an earlier run left for `out`; refuses a folder that holds anything else."""
    check_work(out)
    if journal_folder(out).exists():
        shutil.rmtree(journal_folder(out))


def check_work(out: Path) -> None:
    """Raise `BagError` PATH_NOT_ALLOWED where something that annotate did not make is in the place
    of the work for `out`; changes nothing.
    """
    folder = journal_folder(out)
    wrong = ""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        wrong = "it is a link or a file, expected a folder of annotate or nothing"
    elif folder.exists():
        foreign = sorted(item.name for item in folder.iterdir() if not _is_ours(item))
        if foreign:
            wrong = f"it holds {foreign[:3]}, which is not of annotate"
    if wrong:
        raise BagError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{folder} cannot be used for the unfinished work: {wrong}",
            "Remove it yourself or choose another output.",
        )


def _is_ours(item: Path) -> bool:
    if item.is_symlink():
        return False
    if item.name in _FOLDERS:
        return item.is_dir()
    return item.is_file() and (item.name == _LOCK or item.name.startswith(_FILE))
