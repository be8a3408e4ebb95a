"""A recording that was cut off: what is whole in it is read, and what is lost is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from librobot_vlm_ros.bags import BagReader
from librobot_vlm_ros.bags.synthetic import write_rectangle_bag
from librobot_vlm_ros.core import BagError, ErrorCode

STORAGES = pytest.mark.parametrize("storage", ["mcap", "db3"])


def storage_file(bag: Path) -> Path:
    return next(item for item in bag.iterdir() if item.suffix in (".mcap", ".db3"))


def rows(path: Path, *, salvage: bool = False) -> list[tuple[str, int, bytes]]:
    with BagReader(path, salvage=salvage) as bag:
        return [(m.topic, m.stamp_ns, m.data) for m in bag.messages()]


@STORAGES
@pytest.mark.parametrize("share", [0.55, 0.97])
def test_whole_messages_are_read_and_no_other(tmp_path: Path, storage: str, share: float) -> None:
    # uncompressed: 200 frames are more than one chunk of an MCAP file
    write_rectangle_bag(tmp_path / "bag", 200, storage=storage, compress=False)
    whole = rows(tmp_path / "bag")
    file = storage_file(tmp_path / "bag")
    size = file.stat().st_size
    os.truncate(file, int(size * share))
    with pytest.raises(BagError, match="--salvage") as caught:
        rows(tmp_path / "bag")
    assert caught.value.code == ErrorCode.BAG_TRUNCATED
    for path in (tmp_path / "bag", file):
        kept = rows(path, salvage=True)
        assert kept == whole[: len(kept)]
        assert len(kept) > (share - 0.5) * len(whole)  # a chunk of an MCAP file is 1 MiB
        with BagReader(path, salvage=True) as bag:
            assert bag.lost
            assert bag.message_count == len(kept) == sum(topic.count for topic in bag.topics)
            assert bag.start_ns == whole[0][1]
            images = list(bag.messages(["/camera/image_raw"], start_ns=whole[9][1]))
            expected = [row for row in kept if row[0] == "/camera/image_raw"]
            assert [m.data for m in images] == [r[2] for r in expected if r[1] >= whole[9][1]]
            assert bag.deserialize(images[0]).width == 64


@STORAGES
def test_a_recording_without_metadata_is_read_whole(tmp_path: Path, storage: str) -> None:
    """The recorder was killed before it could write metadata.yaml."""
    write_rectangle_bag(tmp_path / "bag", 5, storage=storage)
    whole = rows(tmp_path / "bag")
    (tmp_path / "bag" / "metadata.yaml").unlink()
    assert rows(tmp_path / "bag", salvage=True) == whole
    with BagReader(tmp_path / "bag", salvage=True) as bag:
        assert bag.lost == ""


@STORAGES
def test_with_nothing_whole_it_is_refused(tmp_path: Path, storage: str) -> None:
    write_rectangle_bag(tmp_path / "bag", 5, storage=storage)
    file = storage_file(tmp_path / "bag")
    os.truncate(file, 60)
    with pytest.raises(BagError) as caught:
        rows(tmp_path / "bag", salvage=True)
    assert caught.value.code == ErrorCode.BAG_TRUNCATED


def test_a_bag_that_is_whole_is_read_as_ever(tmp_path: Path) -> None:
    write_rectangle_bag(tmp_path / "bag", 5)
    assert rows(tmp_path / "bag", salvage=True) == rows(tmp_path / "bag")
