"""Bags come back as they were written, in both formats, with quality of service and types."""

from __future__ import annotations

import io
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rectangle_bag import START_NS, rectangle_frames, write_rectangle_bag
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from librobot_vlm_ros.bags import (
    BagQos,
    BagReader,
    BagWriter,
    TruthObject,
    package_typestore,
    read_truth,
    write_camera_bag,
)
from librobot_vlm_ros.core import BagError, ErrorCode

STORAGES = pytest.mark.parametrize("storage", ["mcap", "db3"])


@STORAGES
def test_frames_come_back_with_pixels_stamp_and_truth(tmp_path: Path, storage: str) -> None:
    frames = list(rectangle_frames(4))
    write_camera_bag(tmp_path / "bag", frames, storage=storage, frame_id="wrist")
    with BagReader(tmp_path / "bag") as bag:
        images = [bag.deserialize(message) for message in bag.messages(["/camera/image_raw"])]
        truth = read_truth(bag)
    assert len(images) == len(frames)
    for image, (stamp_ns, pixels, objects) in zip(images, frames, strict=True):
        stamp = image.header.stamp
        assert stamp.sec * 10**9 + stamp.nanosec == stamp_ns
        assert image.header.frame_id == "wrist"
        assert (image.encoding, image.step) == ("rgb8", 3 * image.width)
        np.testing.assert_array_equal(image.data.reshape(pixels.shape), pixels)
        assert list(truth[stamp_ns].objects) == objects


def test_the_jpeg_topic_shows_the_same_picture(tmp_path: Path) -> None:
    frames = list(rectangle_frames(1, width=96, height=64))
    write_camera_bag(tmp_path / "bag", frames)
    with BagReader(tmp_path / "bag") as bag:
        (message,) = bag.messages(["/camera_jpeg/image_raw/compressed"])
        image = bag.deserialize(message)
    assert "jpeg" in image.format
    shown = np.asarray(Image.open(io.BytesIO(image.data.tobytes())), dtype=np.int16)
    difference = np.abs(shown - frames[0][1].astype(np.int16))
    assert shown.shape == frames[0][1].shape
    assert difference.mean() < 3


@STORAGES
def test_messages_come_in_order_of_time_and_can_be_cut(tmp_path: Path, storage: str) -> None:
    write_rectangle_bag(tmp_path / "bag", 5, storage=storage)
    with BagReader(tmp_path / "bag") as bag:
        stamps = [message.stamp_ns for message in bag.messages()]
        assert bag.message_count == len(stamps) == 17
        assert bag.start_ns == stamps[0]
        assert bag.duration_s == pytest.approx((stamps[-1] - stamps[0]) / 1e9)
        middle = [m.stamp_ns for m in bag.messages(start_ns=stamps[4], stop_ns=stamps[-1])]
    assert stamps == sorted(stamps)
    assert middle == [stamp for stamp in stamps if stamps[4] <= stamp < stamps[-1]]


@STORAGES
def test_quality_of_service_survives(tmp_path: Path, storage: str) -> None:
    offered = {
        "/sensor": BagQos("best_effort", "volatile", 5),
        "/map": BagQos("reliable", "transient_local", 1),
        "/log": BagQos("reliable", "volatile", 0),
    }
    with BagWriter(tmp_path / "bag", storage=storage) as bag:
        for name, qos in offered.items():
            bag.add_topic(name, "std_msgs/msg/String", qos)
            bag.write_message(name, 1, bag.make("std_msgs/msg/String", data="x"))
    with BagReader(tmp_path / "bag") as reader:
        assert {topic.name: topic.qos for topic in reader.topics} == offered


def test_results_of_the_node_can_be_recorded_and_read(tmp_path: Path) -> None:
    store = package_typestore()
    with BagWriter(tmp_path / "bag") as bag:
        bag.add_topic("/vlm/caption", "librobot_vlm_ros/msg/Caption")
        words = "request_id camera model revision task prompt dtype device"
        seconds = "preprocess_s inference_s age_s"
        counts = "prompt_tokens generated_tokens instruction_id batch_size"
        info = bag.make(
            "librobot_vlm_ros/msg/InferenceInfo",
            **dict.fromkeys(words.split(), ""),
            **dict.fromkeys(seconds.split(), 0.5),
            **dict.fromkeys(counts.split(), 1),
        )
        caption = bag.make(
            "librobot_vlm_ros/msg/Caption",
            header=bag.header(7, "camera"),
            info=info,
            text="a duck",
            score=0.5,
            error_code=0,
            error_msg="",
        )
        bag.write_message("/vlm/caption", 8, caption)
    with BagReader(tmp_path / "bag") as reader:
        (message,) = reader.messages()
        read = reader.deserialize(message)
        assert (read.text, read.header.stamp.nanosec) == ("a duck", 7)
        recorded = reader.require_topic("/vlm/caption").type_hash
    assert recorded == store.hash_rihs01("librobot_vlm_ros/msg/Caption")


def test_a_bag_of_an_older_distribution_without_definitions_is_read(tmp_path: Path) -> None:
    write_rectangle_bag(tmp_path / "bag", 2, storage="db3")
    (tmp_path / "bag" / "metadata.yaml").unlink()
    file = tmp_path / "bag" / "bag.db3"
    with sqlite3.connect(file) as base:  # as Humble wrote it
        base.executescript(
            "DROP TABLE message_definitions; ALTER TABLE topics DROP COLUMN type_description_hash;"
            "UPDATE schema SET schema_version = 3; DROP TABLE metadata;"
        )
    base.close()
    with BagReader(file) as bag:
        message = next(bag.messages(["/camera/image_raw"]))
        assert bag.deserialize(message).encoding == "rgb8"


def test_a_missing_topic_is_named_with_those_there_are(tmp_path: Path) -> None:
    write_rectangle_bag(tmp_path / "bag", 1)
    with BagReader(tmp_path / "bag") as bag:
        with pytest.raises(BagError, match="/camera/image_raw") as caught:
            list(bag.messages(["/camera/depth"]))
        assert caught.value.code == ErrorCode.TOPIC_NOT_IN_BAG
        with pytest.raises(BagError) as caught:
            bag.require_topic("/instruction", "sensor_msgs/msg/Image")
        assert caught.value.code == ErrorCode.WRONG_TYPE


def test_truth_of_another_kind_is_refused(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "bag") as bag:
        bag.add_topic("/ground_truth", "std_msgs/msg/String")
        bag.write_message("/ground_truth", 1, bag.make("std_msgs/msg/String", data='{"a": 1}'))
    with BagReader(tmp_path / "bag") as reader, pytest.raises(BagError) as caught:
        read_truth(reader)
    assert caught.value.code == ErrorCode.WRONG_TYPE


def test_an_existing_bag_is_only_replaced_on_request_and_other_files_never(tmp_path: Path) -> None:
    write_rectangle_bag(tmp_path / "bag", 1)
    with pytest.raises(BagError) as caught:
        write_rectangle_bag(tmp_path / "bag", 1)
    assert caught.value.code == ErrorCode.PATH_NOT_ALLOWED
    summary = write_rectangle_bag(tmp_path / "bag", 2, overwrite=True)
    assert summary.counts["/camera/image_raw"] == 2
    (tmp_path / "bag" / "thesis.tex").write_text("years of work")
    with pytest.raises(BagError) as caught:
        write_rectangle_bag(tmp_path / "bag", 1, overwrite=True)
    assert caught.value.code == ErrorCode.PATH_NOT_ALLOWED
    assert (tmp_path / "bag" / "thesis.tex").exists()


def test_a_recording_that_fails_leaves_no_metadata(tmp_path: Path) -> None:
    def failing():  # type: ignore[no-untyped-def]
        yield from rectangle_frames(2)
        yield START_NS, np.zeros((4, 4), np.uint8), []

    with pytest.raises(BagError) as caught:
        write_camera_bag(tmp_path / "bag", failing())
    assert caught.value.code == ErrorCode.WRONG_TYPE
    assert not (tmp_path / "bag" / "metadata.yaml").exists()


def test_objects_may_be_given_as_pairs_and_mappings(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    objects = [("duck", (0, 0, 1, 1)), {"label": "mug", "box": [1, 1, 2, 2]}]
    write_camera_bag(tmp_path / "bag", [(5, pixels, objects)], raw_topic=None, jpeg_topic=None)
    with BagReader(tmp_path / "bag") as bag:
        assert [topic.name for topic in bag.topics] == ["/ground_truth"]
        assert read_truth(bag)[5].objects == (
            TruthObject("duck", (0.0, 0.0, 1.0, 1.0)),
            TruthObject("mug", (1.0, 1.0, 2.0, 2.0)),
        )


@STORAGES
def test_the_definition_in_the_bag_wins_over_the_one_known_here(
    tmp_path: Path, storage: str
) -> None:
    """An older recording of a message that has changed since, and a type unknown here."""
    older = get_typestore(Stores.EMPTY)
    older.register(
        {
            **get_types_from_msg("string text\nint32 votes", "librobot_vlm_ros/msg/Caption"),
            **get_types_from_msg("uint8[] bytes", "foo_msgs/msg/Thing"),
        }
    )
    with BagWriter(tmp_path / "bag", storage=storage, types=older) as bag:
        bag.add_topic("/caption", "librobot_vlm_ros/msg/Caption")
        bag.add_topic("/thing", "foo_msgs/msg/Thing")
        old = bag.make("librobot_vlm_ros/msg/Caption", text="a duck", votes=3)
        bag.write_message("/caption", 1, old)
        thing = bag.make("foo_msgs/msg/Thing", bytes=np.arange(3, dtype=np.uint8))
        bag.write_message("/thing", 2, thing)
    with BagReader(tmp_path / "bag") as reader:
        caption, thing = (reader.deserialize(message) for message in reader.messages())
    assert (caption.text, caption.votes) == ("a duck", 3)
    assert thing.bytes.tolist() == [0, 1, 2]
