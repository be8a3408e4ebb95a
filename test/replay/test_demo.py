"""`librobot-vlm demo` from outside: what it leaves, and that it never leaves a node behind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rectangle_bag import write_rectangle_bag

from librobot_vlm_ros.bags import BagReader, read_truth
from librobot_vlm_ros.demo.data import DemoRun
from librobot_vlm_ros.demo.scores import summarize

FRAMES = 8
SUMMARY_KEYS = tuple(summarize(DemoRun("", Path(), ""), 0.0))


@pytest.fixture
def demo(
    tmp_path: Path, start_process: Callable[..., Any], ros_env: dict[str, str]
) -> Callable[..., Any]:
    """`demo(*words)` starts it with the fake model on a bag of eight frames."""

    def start(*words: str, rate_hz: float = 10.0) -> Any:
        write_rectangle_bag(tmp_path / "bag", FRAMES, rate_hz=rate_hz)
        command = ["python", "-m", "librobot_vlm_ros.cli", "demo", "--model", "fake"]
        command += ["--bag", str(tmp_path / "bag"), "--out", str(tmp_path / "out"), *words]
        return start_process(command, name="demo", env=ros_env)

    return start


def node_pid(process: Any) -> int:
    text = process.wait_for_output("active after", 60)
    found = re.search(r"process (\d+), active", text)
    assert found, text
    return int(found[1])


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that has ended and that nobody has waited for is no process any more.
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")


def test_it_leaves_pictures_report_bag_and_summary(
    tmp_path: Path, demo: Callable[..., Any]
) -> None:
    process = demo()
    pid = node_pid(process)
    assert process.wait(120) == 0, process.output()
    assert not is_there(pid)
    out = tmp_path / "out"
    assert sorted(item.name for item in out.iterdir()) == [
        *("frames", "node.log", "output_bag", "overview.png", "report.html", "summary.json")
    ]
    assert len(list((out / "frames").glob("*.png"))) == FRAMES
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert tuple(summary) == SUMMARY_KEYS
    # Caption, detection, embedding and, with an instruction from the start, grounding.
    assert (summary["frames"], summary["results"]) == (FRAMES, 4 * FRAMES)
    assert summary["stamps_equal"] is True
    assert summary["queries_ok"] == 8
    assert 0 <= summary["frame_age_p50_s"] <= summary["frame_age_p99_s"]
    assert summary["model"] == "fake"
    assert 0 < summary["wall_s"] < 120
    # The fake model's boxes have nothing to do with what is in the picture.
    assert summary["precision"] < 0.5
    shown = process.output()
    for key in SUMMARY_KEYS:
        assert f"\n{key} " in shown
    assert f"frames {FRAMES}/{FRAMES}" in shown

    with BagReader(tmp_path / "bag") as given, BagReader(out / "output_bag") as left:
        counts = {topic.name: topic.count for topic in left.topics}
        for topic in given.topics:
            assert counts.pop(topic.name) == topic.count
            ours = list(left.messages([topic.name]))
            assert ours == list(given.messages([topic.name]))
        assert counts == {
            "/vlm/caption": FRAMES,
            "/vlm/grounding": 2 * FRAMES,
            "/vlm/embedding": FRAMES,
        }
        stamps = set(read_truth(given))
        for message in left.messages(["/vlm/caption", "/vlm/grounding", "/vlm/embedding"]):
            header = left.deserialize(message).header
            stamp_ns = header.stamp.sec * 10**9 + header.stamp.nanosec
            assert stamp_ns in stamps
            assert message.stamp_ns > stamp_ns  # an answer follows its frame


def test_a_second_run_replaces_the_first_and_nothing_else(
    tmp_path: Path, demo: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    (out / "frames").mkdir(parents=True)
    (out / "summary.json").write_text("old")
    (out / "frames" / "frame_9999.png").write_text("old")
    (out / "notes.txt").write_text("mine")
    process = demo("--image-topic", "/no/such/topic")
    assert process.wait(60) == 1
    assert "TOPIC_NOT_IN_BAG(601)" in process.output()
    assert not (out / "summary.json").exists()  # no old figure passes for new
    assert not (out / "frames" / "frame_9999.png").exists()
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_the_node_ends_with_the_demo_however_that_ends(
    demo: Callable[..., Any], wait_until: Callable[..., Any], number: int, code: int
) -> None:
    process = demo(rate_hz=0.5)
    pid = node_pid(process)
    process.wait_for_output("==> playing", 30)
    process.send(number)
    assert process.wait(30) == code
    wait_until(lambda: not is_there(pid), 15, "the end of the node")


def test_a_node_that_dies_fails_the_demo_and_is_named(
    tmp_path: Path, demo: Callable[..., Any]
) -> None:
    process = demo(rate_hz=1.0)
    pid = node_pid(process)
    process.wait_for_output("==> playing", 30)
    os.kill(pid, signal.SIGKILL)
    assert process.wait(60) == 1
    assert "the node ended with exit code -9" in process.output()
    assert not (tmp_path / "out" / "summary.json").exists()


def test_the_jpeg_topic_can_be_shown_too(tmp_path: Path, demo: Callable[..., Any]) -> None:
    process = demo("--image-topic", "/camera_jpeg/image_raw/compressed")
    assert process.wait(120) == 0, process.output()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["stamps_equal"] is True
    assert summary["results"] == 4 * FRAMES


def test_two_demos_at_once_do_not_see_each_other(
    tmp_path: Path, demo: Callable[..., Any], start_process: Callable[..., Any]
) -> None:
    first = demo()
    command = list(first.args)
    command[command.index("--out") + 1] = str(tmp_path / "other")
    time.sleep(0.1)
    second = start_process(command, name="second")
    for process, out in ((first, "out"), (second, "other")):
        assert process.wait(150) == 0, process.output()
        summary = json.loads((tmp_path / out / "summary.json").read_text(encoding="utf-8"))
        assert summary["results"] == 4 * FRAMES
        assert summary["queries_ok"] == 8
