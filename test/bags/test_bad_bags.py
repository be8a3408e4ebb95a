"""Whatever is wrong with a file, a `BagError` says so; nothing else comes out."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import pytest
from rectangle_bag import write_rectangle_bag

from librobot_vlm_ros.bags import BagMessage, BagReader
from librobot_vlm_ros.core import BagError, ErrorCode

STORAGES = pytest.mark.parametrize("storage", ["mcap", "db3"])


def read_all(path: Path) -> int:
    count = 0
    with BagReader(path) as bag:
        for message in bag.messages():
            bag.deserialize(message)
            count += 1
    return count


def code_of(path: Path) -> ErrorCode:
    with pytest.raises(BagError) as caught:
        read_all(path)
    return caught.value.code


@pytest.fixture
def bag(tmp_path: Path, storage: str) -> Path:
    write_rectangle_bag(tmp_path / "bag", 5, storage=storage)
    return tmp_path / "bag"


def storage_file(bag: Path) -> Path:
    return next(item for item in bag.iterdir() if item.suffix in (".mcap", ".db3"))


@STORAGES
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_bag_cut_off_anywhere_says_so(bag: Path, share: float) -> None:
    file = storage_file(bag)
    size = file.stat().st_size
    os.truncate(file, min(int(size * share), size - 1))
    for path in (bag, file):
        assert code_of(path) in (ErrorCode.BAG_TRUNCATED, ErrorCode.BAG_UNREADABLE)
    if share in (0.0, 0.1, 0.5, 0.9):
        assert code_of(bag) == ErrorCode.BAG_TRUNCATED


@STORAGES
def test_damage_in_the_middle_never_raises_anything_but_bag_errors(bag: Path) -> None:
    file = storage_file(bag)
    good = file.read_bytes()
    seeded = random.Random(4)
    refused = 0
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(seeded.choice((1, 20, 400))):
            bad[seeded.randrange(len(bad))] = seeded.randrange(256)
        file.write_bytes(bytes(bad))
        with contextlib.suppress(BagError):  # anything else fails the test
            read_all(bag)
            continue
        refused += 1
    assert refused > 20


def test_what_lies_before_a_damaged_chunk_is_handed_out(tmp_path: Path) -> None:
    bag = tmp_path / "long"
    write_rectangle_bag(bag, 200, jpeg_topic=None)
    file = storage_file(bag)
    bad = bytearray(file.read_bytes())
    first, last = len(bad) * 3 // 4, len(bad) * 3 // 4 + len(bad) // 16
    bad[first:last] = b"\xff" * (last - first)
    file.write_bytes(bytes(bad))
    read: list[BagMessage] = []
    with BagReader(bag) as reader, pytest.raises(BagError, match="after"):
        read.extend(reader.messages())
    assert len(read) > 50


@STORAGES
def test_a_folder_without_metadata_points_to_the_file_itself(bag: Path) -> None:
    (bag / "metadata.yaml").unlink()
    with pytest.raises(BagError, match=storage_file(bag).name) as caught:
        read_all(bag)
    assert caught.value.code == ErrorCode.BAG_TRUNCATED
    assert read_all(storage_file(bag)) == 17


@STORAGES
def test_a_folder_without_its_file_is_incomplete(bag: Path) -> None:
    storage_file(bag).unlink()
    assert code_of(bag) == ErrorCode.BAG_TRUNCATED


@STORAGES
@pytest.mark.parametrize("text", ["", "a: [", "rosbag2_bagfile_information: 3", "[]", "\x00\x01"])
def test_broken_metadata_is_refused(bag: Path, text: str) -> None:
    (bag / "metadata.yaml").write_text(text)
    assert code_of(bag) == ErrorCode.BAG_UNREADABLE


def test_what_is_no_bag_is_named(tmp_path: Path) -> None:
    assert code_of(tmp_path / "nothing") == ErrorCode.FILE_NOT_FOUND
    assert code_of(tmp_path) == ErrorCode.BAG_UNREADABLE
    for name in ("notes.txt", "old.bag", "picture.mcap", "picture.db3"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff\xe0 a picture" * 20)
        assert code_of(tmp_path / name) == ErrorCode.BAG_UNREADABLE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_bag_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    write_rectangle_bag(tmp_path / "bag", 1)
    storage_file(tmp_path / "bag").chmod(0)
    assert code_of(tmp_path / "bag") == ErrorCode.PERMISSION_DENIED


def test_messages_that_the_recorder_left_in_its_log_are_not_lost_in_silence(
    tmp_path: Path,
) -> None:
    write_rectangle_bag(tmp_path / "bag", 1, storage="db3")
    file = storage_file(tmp_path / "bag")
    file.with_name(file.name + "-wal").write_bytes(b"x" * 100)
    assert code_of(tmp_path / "bag") == ErrorCode.BAG_TRUNCATED


@STORAGES
@pytest.mark.parametrize("salvage", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_without_opening_it(
    bag: Path, kind: str, salvage: bool
) -> None:
    file = storage_file(bag)
    file.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[
        kind
    ](file)
    paths = [bag] if kind == "folder" else [bag, file]
    for path in paths:
        with pytest.raises(BagError, match=f"is a {kind}, expected a regular file") as caught:
            BagReader(path, salvage=salvage).__enter__()
        assert caught.value.code == ErrorCode.BAG_UNREADABLE


@STORAGES
def test_a_path_that_cannot_be_followed_is_refused(bag: Path) -> None:
    loop = bag.with_name("loop.mcap")
    loop.symlink_to(loop)
    assert code_of(loop) == ErrorCode.PATH_NOT_ALLOWED
    assert code_of(bag / ("x" * 5000)) == ErrorCode.PATH_NOT_ALLOWED
    assert code_of(storage_file(bag) / "bag.mcap") in (
        ErrorCode.PATH_NOT_ALLOWED,
        ErrorCode.FILE_NOT_FOUND,
    )
