"""Standing tasks and their rates."""

from __future__ import annotations

import pytest

from librobot_vlm_ros.core import ErrorCode, RequestError
from librobot_vlm_ros.runtime import StandingTask
from librobot_vlm_ros.runtime.standing import RateGate, check_unique

MS = 1_000_000


def runs_in(gate: RateGate, camera_hz: float, seconds: float) -> int:
    """How often a task runs on a camera of that rate."""
    count = 0
    for number in range(round(seconds * camera_hz)):
        frame, now_ns = object(), round(number / camera_hz * 1e9)
        if gate.due(frame, now_ns):
            gate.ran(frame, now_ns)
            count += 1
    return count


def test_a_task_knows_its_common_name_by_an_alias():
    assert StandingTask("<OD>").task == "detect"
    assert StandingTask("<OD>").name == "detect"


def test_an_unknown_task_is_refused():
    with pytest.raises(RequestError) as caught:
        StandingTask("detekt")
    assert caught.value.code == ErrorCode.UNKNOWN_TASK


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), 1001.0])
def test_a_senseless_rate_is_refused(rate):
    with pytest.raises(RequestError) as caught:
        StandingTask("caption", rate_hz=rate)
    assert caught.value.code == ErrorCode.BAD_PARAMETER


def test_rate_zero_runs_on_every_frame():
    assert runs_in(RateGate(StandingTask("caption").period_ns), camera_hz=30, seconds=10) == 300


@pytest.mark.parametrize("rate_hz", [1.0, 2.0, 7.0, 10.0])
def test_a_rate_below_the_cameras_holds_within_one_run(rate_hz):
    gate = RateGate(StandingTask("caption", rate_hz=rate_hz).period_ns)
    assert abs(runs_in(gate, camera_hz=300, seconds=10) - 10 * rate_hz) <= 1


def test_no_task_runs_twice_on_one_frame():
    gate, frame = RateGate(0), object()
    gate.ran(frame, 0)
    assert not gate.due(frame, 10**12)
    assert gate.due(object(), 0)


def test_after_a_gap_there_is_no_burst_to_catch_up():
    gate = RateGate(100 * MS)
    gate.ran(object(), 0)
    gate.ran(object(), 5_000 * MS)
    assert not gate.due(object(), 5_050 * MS)
    assert gate.due(object(), 5_100 * MS)


def test_on_stamps_a_task_at_half_the_cameras_rate_takes_every_other_frame():
    gate = RateGate(200 * MS)
    assert [gate.passes(number * 100 * MS) for number in range(6)] == [True, False] * 3


def test_on_stamps_jitter_of_the_camera_loses_no_frame():
    gate = RateGate(100 * MS)
    stamps_ms = [0, 99, 203, 298, 401, 499]
    assert all(gate.passes(stamp * MS) for stamp in stamps_ms)


def test_on_stamps_a_bag_that_loops_starts_the_rhythm_anew():
    gate = RateGate(200 * MS)
    assert gate.passes(10_000 * MS)
    assert gate.passes(0)
    assert not gate.passes(100 * MS)
    assert gate.passes(200 * MS)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (StandingTask("ground"), "needs a prompt"),
        (StandingTask("ground", prompt="  "), "needs a prompt"),
        (StandingTask("region_caption"), "needs a region"),
        (StandingTask("ocr"), "can do: caption, ground"),
    ],
)
def test_a_task_that_cannot_run_says_why(task, reason):
    assert reason in task.idle_reason({"caption", "ground", "region_caption"} - {"region_caption"})


def test_a_task_that_can_run_is_not_idle():
    assert StandingTask("ground", prompt="the red cube").idle_reason({"ground"}) == ""
    assert StandingTask("ocr").idle_reason(None) == ""


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(RequestError, match="two standing tasks are called 'caption'"):
        check_unique([StandingTask("caption"), StandingTask("caption")], ["front"])
    check_unique([StandingTask("caption"), StandingTask("caption", name="again")], ["front"])
    check_unique(
        [StandingTask("caption", camera="a"), StandingTask("caption", camera="b")], ["a", "b"]
    )


def test_a_task_on_an_undeclared_camera_is_refused_and_the_declared_are_named():
    with pytest.raises(RequestError, match="declared are: left, right") as caught:
        check_unique([StandingTask("caption", camera="front")], ["right", "left"])
    assert caught.value.code == ErrorCode.UNKNOWN_CAMERA
