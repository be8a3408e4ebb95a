"""Write originals and results into one bag, which appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from librobot_vlm_ros.annotate.journal import Journal, journal_folder
from librobot_vlm_ros.annotate.plan import in_time_order
from librobot_vlm_ros.bags import BagReader, BagWriter
from librobot_vlm_ros.bags.writer import BagSummary, Storage
from librobot_vlm_ros.core import BagError, ErrorCode

#: Key of what `annotate` notes in metadata.yaml.
_NOTE = "librobot_vlm_annotate"


def storage_of(reader: BagReader) -> Storage:
    """The storage format of a bag."""
    path = reader.path
    files = [path] if path.is_file() else list(path.iterdir())
    return "db3" if any(file.suffix == ".db3" for file in files) else "mcap"


def write_bag(
    journal: Journal,
    readers: Sequence[BagReader],
    results: Mapping[str, str],
    storage: Storage,
    note: Mapping[str, Any],
    name: str,
) -> tuple[BagSummary, dict[str, str]]:
    """Write the bag called `name` into the journal's folder; (what it holds, topics left out and
    why). A result stands right behind its image, at the image's time.

    Raises `BagError` DISK_FULL, and INTERNAL should a result have found no place.
    """
    folder = journal.folder / "bag"
    if folder.exists():  # of a run that was killed here
        shutil.rmtree(folder)
    written = 0
    with BagWriter(folder / name, storage=storage) as bag:
        left_out = _declare(bag, readers)
        for topic, kind in results.items():
            bag.add_topic(topic, kind)
        for key, message in in_time_order(readers):
            if message.topic in left_out:
                continue
            bag.write(message.topic, message.stamp_ns, message.data)
            for topic, data in journal.results_at(key):
                bag.write(topic, message.stamp_ns, data)
                written += 1
        bag.note(_NOTE, json.dumps(note))
    expected = sum(journal.counts()[0].values())
    if written != expected:
        raise BagError(
            ErrorCode.BAG_UNREADABLE,
            f"{written} of {expected} results found their frame: a bag changed while it was read",
            "Begin anew with --overwrite.",
        )
    return bag.summary(), left_out


def _declare(bag: BagWriter, readers: Sequence[BagReader]) -> dict[str, str]:
    left_out: dict[str, str] = {}
    for reader in readers:
        for topic in reader.topics:
            definition = reader.definition(topic.name)
            if not all(definition) and topic.type not in bag.types.fielddefs:
                left_out[topic.name] = f"{topic.type} is unknown here and defined in no bag"
                continue
            bag.add_topic(topic.name, topic.type, topic.qos, definition)
    return left_out


def put_in_place(out: Path, name: str) -> None:
    """Move the written bag to `out` in one step, after everything has reached the disk."""
    folder = journal_folder(out)
    new = folder / "bag" / name
    for file in sorted(new.iterdir()):
        _to_disk(file)
    _to_disk(new)
    if out.exists():
        old = folder / "old"
        if old.exists():
            shutil.rmtree(old)
        out.rename(old)
    new.rename(out)
    _to_disk(out.absolute().parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_finished(out: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether `out` is the finished bag of this very job."""
    try:
        with BagReader(out) as reader:
            note = json.loads(reader.notes.get(_NOTE, "{}"))
    except (BagError, ValueError):
        return False
    return bool(note.get("fingerprint") == fingerprint)
