"""`librobot-vlm replay` as a process of its own: what arrives is what was recorded, when it was."""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rectangle_bag import START_NS, write_rectangle_bag
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from librobot_vlm_ros.bags import BagQos, BagReader, BagWriter

TOPICS = {
    "/camera/image_raw": "sensor_msgs/msg/Image",
    "/camera_jpeg/image_raw/compressed": "sensor_msgs/msg/CompressedImage",
    "/ground_truth": "std_msgs/msg/String",
    "/instruction": "std_msgs/msg/String",
}


class Listener:
    """Subscribes raw; `received[topic]` holds (arrival, bytes)."""

    def __init__(self, session: Any, topics: dict[str, str], reliable: bool = True) -> None:
        from rclpy.qos import QoSProfile, ReliabilityPolicy

        from librobot_vlm_ros.replay.message_types import import_message

        self.received: dict[str, list[tuple[float, bytes]]] = defaultdict(list)
        kind = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
        for name, type_name in topics.items():
            session.node.create_subscription(
                import_message(type_name),
                name,
                lambda data, name=name: self.received[name].append((time.monotonic(), data)),
                QoSProfile(depth=100, reliability=kind),
                raw=True,
            )

    def count(self) -> int:
        return sum(len(rows) for rows in self.received.values())


@pytest.fixture
def replay(start_process: Callable[..., Any], ros_env: dict[str, str]) -> Callable[..., Any]:
    """`replay(bag, ...)` starts the command; with None for the bag none is named."""

    def start(bag: Path | None, *words: str) -> Any:
        bags = [] if bag is None else [bag]
        command = ["python", "-m", "librobot_vlm_ros.cli", "replay", *bags, "--wait", "10", *words]
        return start_process(command, name="replay", env=ros_env)

    return start


def ended(session: Any, process: Any, timeout_s: float = 30.0) -> int:
    """Receive until the process has ended; its exit code."""
    assert session.spin_until(lambda: not process.alive, time.monotonic() + timeout_s)
    session.spin_until(lambda: False, time.monotonic() + 0.3)
    return int(process.wait())


def recorded(bag: Path) -> dict[str, list[bytes]]:
    with BagReader(bag) as reader:
        found: dict[str, list[bytes]] = defaultdict(list)
        for message in reader.messages():
            found[message.topic].append(message.data)
    return found


def padded(data: bytes) -> bytes:
    """As DDS delivers it: filled up to whole words."""
    return data + bytes(-len(data) % 4)


@pytest.mark.parametrize("storage", ["mcap", "db3"])
def test_every_message_arrives_byte_for_byte_at_its_time(
    tmp_path: Path, session: Any, replay: Callable[..., Any], storage: str
) -> None:
    write_rectangle_bag(tmp_path / "bag", 6, rate_hz=5.0, storage=storage)  # one second
    listener = Listener(session, TOPICS)
    process = replay(tmp_path / "bag")
    assert ended(session, process) == 0, process.output()
    expected = recorded(tmp_path / "bag")
    for name in TOPICS:
        assert [data for _, data in listener.received[name]] == list(map(padded, expected[name]))
    arrived = np.array([at for at, _ in listener.received["/camera/image_raw"]])
    # Spread over the second; single ones are late by what this machine is busy with.
    assert 0.5 < arrived[-1] - arrived[0] < 10.0
    assert (np.diff(arrived) > 0.05).sum() >= 3


def test_without_a_bag_the_one_that_ships_is_played(
    session: Any, replay: Callable[..., Any]
) -> None:
    listener = Listener(session, {"/camera/image_raw": "sensor_msgs/msg/Image"})
    process = replay(None, "--duration", "1", "--topics", "/camera/image_raw")
    assert ended(session, process) == 0, process.output()
    assert len(listener.received["/camera/image_raw"]) == 3
    assert "bags/tabletop" in process.output()


def test_rate_start_duration_topics_and_remapping(
    tmp_path: Path, session: Any, replay: Callable[..., Any]
) -> None:
    """Frames lie at 0, 0.5, ... 4.5 s; the bag begins 1 ms before, with an instruction."""
    write_rectangle_bag(tmp_path / "bag", 10, rate_hz=2.0)
    listener = Listener(session, {"/front": "sensor_msgs/msg/Image", **TOPICS})
    process = replay(
        tmp_path / "bag",
        *("--rate", "4", "--start", "0.9", "--duration", "3", "--topics", "/camera/image_raw"),
        *("--remap", "/camera/image_raw:=/front"),
    )
    assert ended(session, process) == 0, process.output()
    assert list(listener.received) == ["/front"]
    expected = recorded(tmp_path / "bag")["/camera/image_raw"]
    assert [data for _, data in listener.received["/front"]] == list(map(padded, expected[2:8]))
    arrived = [at for at, _ in listener.received["/front"]]
    assert 0.2 < arrived[-1] - arrived[0] < 2.4  # 2.5 s of the bag


def test_the_bags_time_on_the_clock_and_a_loop_until_ctrl_c(
    tmp_path: Path, session: Any, replay: Callable[..., Any]
) -> None:
    from rclpy.serialization import deserialize_message
    from rosgraph_msgs.msg import Clock

    write_rectangle_bag(tmp_path / "bag", 3, rate_hz=10.0)
    listener = Listener(session, {"/clock": "rosgraph_msgs/msg/Clock", **TOPICS})
    process = replay(tmp_path / "bag", "--loop", "--clock", "100")
    frames = listener.received["/camera/image_raw"]
    assert session.spin_until(lambda: len(frames) >= 9, time.monotonic() + 30), process.output()
    process.send(signal.SIGINT)
    assert ended(session, process) == 0, process.output()
    once = recorded(tmp_path / "bag")["/camera/image_raw"]
    assert [data for _, data in frames[:9]] == list(map(padded, once * 3))
    ticks = [deserialize_message(data, Clock).clock for _, data in listener.received["/clock"]]
    times = np.array([tick.sec * 10**9 + tick.nanosec for tick in ticks])
    assert times.min() >= START_NS - 1_000_000
    assert times.max() <= START_NS + 200_000_000
    back = int((np.diff(times) < 0).sum())
    assert back >= 2  # the loop begins anew
    assert len(times) > 3 * 12  # ticks between the messages too: a frame has three


def test_quality_of_service_is_that_of_the_recording(
    tmp_path: Path, session: Any, replay: Callable[..., Any], wait_until: Callable[..., Any]
) -> None:
    from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

    with BagWriter(tmp_path / "bag") as bag:
        bag.add_topic("/sensor", "std_msgs/msg/String", BagQos("best_effort", "volatile", 5))
        bag.add_topic("/map", "std_msgs/msg/String", BagQos("reliable", "transient_local", 1))
        for name in ("/sensor", "/map"):
            bag.write_message(name, 10**9, bag.make("std_msgs/msg/String", data=name))
            bag.write_message(name, 9 * 10**9, bag.make("std_msgs/msg/String", data=name))
    process = replay(tmp_path / "bag", "--wait", "0")

    def offered(topic: str) -> Any:
        def found() -> Any:
            session.spin_until(lambda: False, time.monotonic())
            return session.node.get_publishers_info_by_topic(topic)

        (info,) = wait_until(found, 20, f"the publisher of {topic}")
        return info.qos_profile

    assert offered("/sensor").reliability == ReliabilityPolicy.BEST_EFFORT
    assert offered("/map").reliability == ReliabilityPolicy.RELIABLE
    assert offered("/map").durability == DurabilityPolicy.TRANSIENT_LOCAL
    assert process.terminate() == 130


def with_foreign_types(path: Path) -> Path:
    """A string, a message of a package that is not here, one whose definition is another here."""
    types = get_typestore(Stores.ROS2_JAZZY)
    types.register(get_types_from_msg("int32 number", "foo_msgs/msg/Thing"))
    other = get_typestore(Stores.EMPTY)
    other.register({**types.fielddefs, **get_types_from_msg("int64 data", "std_msgs/msg/Float64")})
    with BagWriter(path, types=other) as bag:
        for number, (name, kind, value) in enumerate(
            [
                ("/words", "std_msgs/msg/String", "hello"),
                ("/other", "std_msgs/msg/Float64", 7),
            ]
        ):
            bag.add_topic(name, kind)
            bag.write_message(name, 10**9 + number, bag.make(kind, data=value))
        bag.add_topic("/things", "foo_msgs/msg/Thing")
        bag.write_message("/things", 10**9 + 5, bag.make("foo_msgs/msg/Thing", number=1))
    return path


def test_types_that_are_not_here_are_named_and_left_out(
    tmp_path: Path, session: Any, replay: Callable[..., Any]
) -> None:
    bag = with_foreign_types(tmp_path / "bag")
    topics = {"/words": "std_msgs/msg/String", "/other": "std_msgs/msg/Float64"}
    listener = Listener(session, topics)
    process = replay(bag, "--wait", "3")
    assert ended(session, process) == 0, process.output()
    assert list(listener.received) == ["/words"]
    assert "foo_msgs/msg/Thing is not installed here" in process.output()
    assert "std_msgs/msg/Float64 was recorded with another definition" in process.output()


@pytest.mark.parametrize("words", [["--strict"], ["--topics", "/things"], ["--topics", "/other"]])
def test_types_that_are_not_here_are_refused_when_they_matter(
    tmp_path: Path, session: Any, replay: Callable[..., Any], words: list[str]
) -> None:
    process = replay(with_foreign_types(tmp_path / "bag"), *words)
    assert ended(session, process) == 1
    assert "WRONG_TYPE(602)" in process.output()


def test_a_bag_that_ends_in_damage_plays_what_is_before_it(
    tmp_path: Path, session: Any, replay: Callable[..., Any]
) -> None:
    write_rectangle_bag(tmp_path / "bag", 200, rate_hz=200.0, jpeg_topic=None)
    file = tmp_path / "bag" / "bag.mcap"
    bad = bytearray(file.read_bytes())
    first = len(bad) * 3 // 4
    bad[first : first + 2000] = b"\xff" * 2000
    file.write_bytes(bytes(bad))
    listener = Listener(session, {"/camera/image_raw": "sensor_msgs/msg/Image"})
    process = replay(tmp_path / "bag", "--topics", "/camera/image_raw")
    assert ended(session, process) == 1
    assert "BAG_UNREADABLE(600)" in process.output()
    assert "Traceback" not in process.output()
    assert len(listener.received["/camera/image_raw"]) > 50
