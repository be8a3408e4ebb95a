"""Lock-step: every frame is answered under its own header, and again the same the next time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rectangle_bag import rectangle_frames, write_rectangle_bag

from librobot_vlm_ros.bags import BagReader, BagWriter
from librobot_vlm_ros.cli.main import main
from librobot_vlm_ros.core import (
    EngineError,
    ErrorCode,
    Frame,
    InferenceRequest,
    RequestError,
    decode_compressed,
)

TASKS = "tasks:=[caption,detect,ground,embed]"
FRAMES = 6


@pytest.fixture
def bag(tmp_path: Path) -> Path:
    """Six frames; the instruction is "red box" for three of them, then "blue box"."""
    write_rectangle_bag(tmp_path / "bag", FRAMES, frame_id="wrist_camera")
    return tmp_path / "bag"


def answered_directly(pixels: Any, stamp_ns: int, task: str, prompt: str) -> Any:
    """What the fake model says when it is asked without node, DDS or bag."""
    from librobot_vlm_ros.models.fake import FakeVlm

    frame = Frame(
        pixels=pixels,
        camera="camera",
        stamp_ns=stamp_ns,
        frame_id="wrist_camera",
        sequence=0,
        received_ns=0,
        header=None,
    )
    (answer,) = FakeVlm().run([InferenceRequest("x", frame, task, prompt)])
    return answer


def check_against_model(results: list[Any], pictures: dict[int, Any], prompts: list[str]) -> None:
    """Each result belongs to the frame whose stamp it carries: its content follows from those
    pixels alone.
    """
    stamps = sorted(pictures)
    for result in results:
        message, task = result.message, result.message.info.task
        pixels = pictures[result.stamp_ns]
        prompt = prompts[stamps.index(result.stamp_ns)] if task == "ground" else ""
        expected = answered_directly(pixels, result.stamp_ns, task, prompt)
        assert message.header.frame_id == "wrist_camera"
        assert message.error_code == 0
        assert message.info.prompt == prompt
        if task == "caption":
            assert message.text == expected.text
        elif task == "embed":
            assert bytes(message.data) == expected.embedding.array.tobytes()
        else:
            assert (message.image_width, message.image_height) == (64, 48)
            found = [(r.label, (r.x_min, r.y_min, r.x_max, r.y_max)) for r in message.regions]
            assert found == [
                (region.label, pytest.approx(region.box, abs=1e-4)) for region in expected.regions
            ]
        assert message.info.age_s >= 0


def content(result: Any) -> tuple[Any, ...]:
    """All of a result that must not depend on when it was made."""
    message = result.message
    regions = [
        (r.label, r.score if not math.isnan(r.score) else None, r.x_min, r.y_min, r.x_max, r.y_max)
        for r in getattr(message, "regions", [])
    ]
    return (
        result.topic,
        result.stamp_ns,
        message.info.task,
        message.info.prompt,
        message.info.generated_tokens,
        getattr(message, "text", ""),
        regions,
        bytes(getattr(message, "data", b"")),
        message.error_code,
    )


def test_every_frame_gets_all_its_results_and_two_replays_are_identical(
    bag: Path, start_node: Callable[..., Any], lock_step: Callable[..., tuple[Any, list[Any]]]
) -> None:
    node = start_node("model:=fake", "lock_step:=true", TASKS)
    pictures = {stamp_ns: pixels for stamp_ns, pixels, _ in rectangle_frames(FRAMES)}
    prompts = ["red box"] * 3 + ["blue box"] * 3
    replays = []
    for _ in range(2):
        report, results = lock_step(bag)
        assert report.unanswered == []
        assert report.frames == FRAMES
        due = Counter((stamp, task) for stamp in pictures for task in _TASK_NAMES)
        assert Counter((r.stamp_ns, r.message.info.task) for r in results) == due
        check_against_model(results, pictures, prompts)
        # A frame's results come before those of the next frame.
        order = [result.stamp_ns for result in results]
        assert order == sorted(order)
        replays.append([content(result) for result in sorted(results, key=_by_frame_and_task)])
    assert replays[0] == replays[1]
    assert node.terminate() == 0


def test_the_compressed_topic_is_answered_frame_by_frame_too(
    bag: Path, start_node: Callable[..., Any], lock_step: Callable[..., tuple[Any, list[Any]]]
) -> None:
    topic = "/camera_jpeg/image_raw/compressed"
    start_node(
        "model:=fake",
        "lock_step:=true",
        TASKS,
        "image_topic:=/camera_jpeg/image_raw",
        "image_transport:=compressed",
    )
    with BagReader(bag) as reader:
        decoded = [reader.deserialize(message) for message in reader.messages([topic])]
    pictures = {
        image.header.stamp.sec * 10**9 + image.header.stamp.nanosec: decode_compressed(image.data)
        for image in decoded
    }
    report, results = lock_step(bag, topics=(topic, "/instruction"))
    assert report.unanswered == []
    assert len(results) == FRAMES * len(_TASK_NAMES)
    check_against_model(results, pictures, ["red box"] * 3 + ["blue box"] * 3)


def test_a_malformed_image_is_refused_and_the_next_frame_is_served(
    tmp_path: Path,
    start_node: Callable[..., Any],
    lock_step: Callable[..., tuple[Any, list[Any]]],
) -> None:
    """The bag's third frame says that it is larger than its data."""
    bag = tmp_path / "bag"
    write_rectangle_bag(tmp_path / "good", 4)
    spoilt_ns = 0
    with BagReader(tmp_path / "good") as reader, BagWriter(bag) as writer:
        writer.add_topic("/camera/image_raw", "sensor_msgs/msg/Image")
        for number, message in enumerate(reader.messages(["/camera/image_raw"])):
            image = reader.deserialize(message)
            if number == 2:
                image.height, spoilt_ns = 4000, message.stamp_ns
            writer.write_message("/camera/image_raw", message.stamp_ns, image)
    node = start_node("model:=fake", "lock_step:=true", "tasks:=[detect]")
    report, results = lock_step(bag, remap={}, answer_timeout_s=1.5)
    assert report.unanswered == [spoilt_ns]
    assert len({result.stamp_ns for result in results}) == 3
    assert f"BAD_DATA_LENGTH({int(ErrorCode.BAD_DATA_LENGTH)})" in node.output()
    assert node.alive


def test_the_command_says_which_frame_stayed_unanswered(
    bag: Path, start_node: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    start_node("model:=fake", "lock_step:=true", "tasks:=[detect]")
    words = ["replay", str(bag), "--lock-step", "--wait", "10"]
    assert main(words) == 0
    assert f"{FRAMES} of {FRAMES} frames answered" in capsys.readouterr().out


def test_a_node_that_is_too_slow_is_reported(
    bag: Path, start_node: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    slow = """model_config:={"latency_s": 5.0}"""
    start_node("model:=fake", "lock_step:=true", "tasks:=[detect]", "warm_up:=false", slow)
    words = ["replay", str(bag), "--lock-step", "--wait", "10", "--duration", "0.05"]
    assert main([*words, "--timeout", "0.5"]) == 1
    shown = capsys.readouterr()
    assert "0 of 1 frames answered" in shown.out
    assert "DEADLINE_EXCEEDED(502)" in shown.err


def test_tasks_that_all_have_a_rate_cannot_be_waited_for(
    bag: Path, start_node: Callable[..., Any], lock_step: Callable[..., Any]
) -> None:
    start_node("model:=fake", "lock_step:=true", "tasks:=[detect@2]")
    with pytest.raises(RequestError, match="lock-step has nothing to wait for") as caught:
        lock_step(bag)
    assert caught.value.code == ErrorCode.BAD_PARAMETER


def test_a_bag_without_the_cameras_topic_names_those_it_has(
    bag: Path, start_node: Callable[..., Any], lock_step: Callable[..., Any]
) -> None:
    start_node("model:=fake", "lock_step:=true", "tasks:=[detect]", "image_topic:=/front/image")
    with pytest.raises(EngineError, match="/camera/image_raw") as caught:
        lock_step(bag)
    assert caught.value.code == ErrorCode.TOPIC_MISSING
    report, _ = lock_step(bag, remap={"/camera/image_raw": "/front/image"})
    assert report.unanswered == []


def test_without_a_node_the_command_says_what_to_start(
    bag: Path, ros_env: dict[str, str], session: Any
) -> None:
    from librobot_vlm_ros.replay.lock_step import NodeLink

    with pytest.raises(EngineError, match="librobot-vlm run") as caught:
        NodeLink(session, "/nobody").connect(0.5)
    assert caught.value.code == ErrorCode.DEADLINE_EXCEEDED


_TASK_NAMES = ("caption", "detect", "ground", "embed")


def _by_frame_and_task(result: Any) -> tuple[int, str]:
    return (result.stamp_ns, result.message.info.task)
