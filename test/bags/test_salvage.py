"""A recording that was cut off or damaged: what is whole is read, and what is lost is said."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from mcap.writer import Writer
from rectangle_bag import write_rectangle_bag

from librobot_vlm_ros.bags import BagReader
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


def chunks_of(file: Path) -> list[tuple[int, int]]:
    """(place, size) of the chunks of an MCAP file, by its records."""
    data, place, found = file.read_bytes(), 8, []
    while data[place] != 0x0F:
        size = 9 + int.from_bytes(data[place + 1 : place + 9], "little")
        if data[place] == 0x06:
            found.append((place, size))
        place += size
    return found


def damage(file: Path, place: int, size: int = 1) -> None:
    bad = bytearray(file.read_bytes())
    for byte in range(place, place + size):
        bad[byte] ^= 0xFF
    file.write_bytes(bytes(bad))


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    ("place", "size"),
    [(0.5, 1), (0.5, 500), (0.0, 1), (1, 1), (1, 8), (25, 4)],
    ids=["one byte", "many", "opcode", "near", "length", "size"],
)
def test_chunks_behind_a_damaged_one_are_read(
    tmp_path: Path, compress: bool, index: bool, place: float, size: int
) -> None:
    write_rectangle_bag(tmp_path / "bag", 400, compress=compress)
    whole = rows(tmp_path / "bag")
    file = storage_file(tmp_path / "bag")
    chunks = chunks_of(file)
    assert len(chunks) >= 3
    begin, length = chunks[1]
    damage(file, begin + (int(length * place) if isinstance(place, float) else place), size)
    if not index:
        os.truncate(file, file.stat().st_size - 20)
    kept = rows(tmp_path / "bag", salvage=True)
    with BagReader(tmp_path / "bag", salvage=True) as bag:
        lost, count = bag.lost, bag.message_count
    assert count == len(kept)
    if index and place != 0.5:  # the index knows what the head of the chunk does not say any more
        assert kept == whole
        assert lost == ""
        return
    assert kept[0] == whole[0]
    assert kept[-1] == whole[-1]
    assert 0 < len(whole) - len(kept) < len(whole) / 2
    assert set(kept) < set(whole)
    assert f"at byte {begin}" in lost


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("compress", [True, False])
def test_one_flipped_byte_in_a_chunk_is_noticed(
    tmp_path: Path, compress: bool, share: float
) -> None:
    write_rectangle_bag(tmp_path / "bag", 30, compress=compress)
    file = storage_file(tmp_path / "bag")
    begin, length = chunks_of(file)[-1]
    damage(file, begin + 60 + int((length - 60) * share))
    with pytest.raises(BagError, match=r"after \d+ messages.*--salvage") as caught:
        rows(tmp_path / "bag")
    assert caught.value.code == ErrorCode.BAG_UNREADABLE


def test_the_topics_of_a_first_chunk_that_is_damaged_are_known_all_the_same(
    tmp_path: Path,
) -> None:
    write_rectangle_bag(tmp_path / "bag", 400, compress=False)
    whole = rows(tmp_path / "bag")
    file = storage_file(tmp_path / "bag")
    begin, length = chunks_of(file)[0]
    damage(file, begin + length // 2)
    kept = rows(tmp_path / "bag", salvage=True)
    assert kept
    assert set(kept) < set(whole)
    with BagReader(tmp_path / "bag", salvage=True) as bag:
        assert {topic.type for topic in bag.topics} > {"sensor_msgs/msg/Image"}


def test_damage_that_hides_messages_without_a_checksum_is_found_by_the_index(
    tmp_path: Path,
) -> None:
    """As rosbags writes them: a record that looks like another kind is passed over in silence."""
    write_rectangle_bag(tmp_path / "bag", 400, compress=False)
    whole = rows(tmp_path / "bag")
    file = storage_file(tmp_path / "bag")
    data = bytearray(file.read_bytes())
    begin = chunks_of(file)[1][0]
    data[begin + 33 : begin + 37] = bytes(4)  # no checksum
    first = begin + 9 + 40  # of the chunk's messages
    assert data[first] == 0x05
    data[first] = 0x15
    file.write_bytes(bytes(data))
    with BagReader(tmp_path / "bag", salvage=True) as bag:
        assert "messages are in it" in bag.lost
        assert [message.data for message in bag.messages()][-1] == whole[-1][2]


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_of_a_damaged_db3_what_stands_before_the_damage_is_read(
    tmp_path: Path, share: float
) -> None:
    write_rectangle_bag(tmp_path / "bag", 200, storage="db3")
    whole = rows(tmp_path / "bag")
    file = storage_file(tmp_path / "bag")
    damage(file, int(file.stat().st_size * share), 40000)
    kept: list[tuple[str, int, bytes]] = []
    with BagReader(tmp_path / "bag", salvage=True) as bag:
        kept.extend((m.topic, m.stamp_ns, m.data) for m in bag.messages())
        assert bag.message_count == len(kept)
        assert bag.lost or len(kept) == len(whole)  # a page of nothing but pixels looks whole
    assert [row[:2] for row in kept] == [row[:2] for row in whole[: len(kept)]]
    assert len(kept) > (share - 0.2) * len(whole)


def test_a_file_that_was_never_a_bag_is_said_to_be_none(tmp_path: Path) -> None:
    for name in ("picture.mcap", "picture.db3"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff\xe0 a picture" * 20)
        with pytest.raises(BagError, match="not what its name says"):
            rows(tmp_path / name, salvage=True)


@pytest.mark.parametrize("cut", [False, True])
def test_a_flipped_byte_anywhere_costs_a_piece_and_makes_up_nothing(
    tmp_path: Path, cut: bool
) -> None:
    write_rectangle_bag(tmp_path / "bag", 250, compress=False)
    file = storage_file(tmp_path / "bag")
    whole = rows(tmp_path / "bag")
    good = file.read_bytes()
    behind = sum(chunks_of(file)[-1])
    seeded = random.Random(7)
    places = [seeded.randrange(8, behind) for _ in range(12)]
    places += [seeded.randrange(behind, len(good)) for _ in range(12)]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 0xFF
        file.write_bytes(bytes(bad[:-8] if cut else bad))
        with BagReader(tmp_path / "bag", salvage=True) as bag:
            kept = [(m.topic, m.stamp_ns, m.data) for m in bag.messages()]
            assert set(kept) <= set(whole), place
            assert len(kept) > len(whole) / 4, place
            assert bag.lost or len(kept) == len(whole), place


@pytest.mark.parametrize("together", [True, False])
def test_channels_of_other_systems_are_passed_over_and_counted(
    tmp_path: Path, together: bool
) -> None:
    """ROS 2 topics and protobuf in one file, in one chunk or in several."""
    file = tmp_path / "mixed.mcap"
    with file.open("wb") as stream:
        writer = Writer(stream, chunk_size=1 << 20 if together else 1)
        writer.start(profile="ros2")
        for number, (name, encoding, data) in enumerate(
            [("std_msgs/msg/String", "ros2msg", b"string data"), ("foo.Bar", "protobuf", b"\x0a")]
        ):
            schema = writer.register_schema(name, encoding, data)
            coding = "protobuf" if number else "cdr"
            channel = writer.register_channel(f"/topic_{number}", coding, schema)
            for stamp_ns in range(1, 4):
                cdr = b"\x00\x01\x00\x00\x02\x00\x00\x00a\x00"
                writer.add_message(channel, stamp_ns, cdr, stamp_ns)
        writer.finish()
    with pytest.raises(BagError) as caught:
        rows(file)
    assert caught.value.code == ErrorCode.BAG_UNREADABLE
    with BagReader(file, salvage=True) as bag:
        assert [(topic.name, topic.type) for topic in bag.topics] == [
            ("/topic_0", "std_msgs/msg/String")
        ]
        messages = list(bag.messages())
        assert [message.stamp_ns for message in messages] == [1, 2, 3]
        assert [bag.deserialize(message).data for message in messages] == ["a"] * 3
        assert "messages of unknown topics" in bag.lost
