"""Standing tasks, their rates, and which of them runs next."""

from __future__ import annotations

from collections import Counter

import pytest

from librobot_vlm_ros.core import ErrorCode, RequestError
from librobot_vlm_ros.runtime import CameraConfig, DropReason, EngineConfig, StandingTask
from librobot_vlm_ros.runtime.scheduler import RateGate, Scheduler


@pytest.fixture
def make_scheduler():
    def make(cameras=("front",), tasks=("caption",), **settings):
        scheduler = Scheduler(EngineConfig(**settings))
        scheduler.set_cameras([CameraConfig(name) for name in cameras])
        scheduler.set_tasks(
            [task if isinstance(task, StandingTask) else StandingTask(task) for task in tasks]
        )
        return scheduler

    return make


def test_without_a_frame_there_is_nothing_to_do(make_scheduler, clock):
    scheduler = make_scheduler()
    assert not scheduler.has_work(clock.ns)
    assert scheduler.next_work(clock.ns) == []
    assert scheduler.next_due_ns(clock.ns) is None


def test_tasks_due_on_one_frame_come_as_one_piece_of_work(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=["caption", "detect"])
    frame = make_frame()
    scheduler.offer(frame, clock.ns)
    (work,) = scheduler.next_work(clock.ns)
    assert (work.frame, work.names) == (frame, ("caption", "detect"))
    assert not scheduler.has_work(clock.ns)


def test_a_slow_task_uses_the_newest_frame_when_its_time_comes(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=[StandingTask("caption", rate_hz=2.0)])
    scheduler.offer(make_frame(), clock.ns)
    scheduler.next_work(clock.ns)
    clock.advance(0.4)
    newest = make_frame()
    scheduler.offer(newest, clock.ns)
    assert not scheduler.has_work(clock.ns)
    assert scheduler.next_due_ns(clock.ns) == clock.ns + 100_000_000
    clock.advance(0.1)
    assert scheduler.next_work(clock.ns)[0].frame is newest


def test_cameras_take_turns(make_scheduler, make_frame, clock):
    cameras = ("left", "right", "wrist")
    scheduler = make_scheduler(cameras=cameras)
    served = Counter()
    for _ in range(30):
        for camera in cameras:
            scheduler.offer(make_frame(camera), clock.ns)
        served.update(work.camera for work in scheduler.next_work(clock.ns))
    assert served == {"left": 10, "right": 10, "wrist": 10}


def test_a_camera_that_is_slower_loses_no_turn_to_a_faster_one(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(cameras=("fast", "slow"))
    order = []
    for number in range(12):
        scheduler.offer(make_frame("fast"), clock.ns)
        if number % 3 == 0:
            scheduler.offer(make_frame("slow"), clock.ns)
        order += [work.camera for work in scheduler.next_work(clock.ns)]
    assert order.count("slow") == 4


def test_cameras_with_the_same_tasks_can_share_a_batch(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(
        cameras=("a", "b", "c"),
        tasks=[
            StandingTask("caption", camera="a"),
            StandingTask("detect", camera="b"),
            StandingTask("caption", camera="c"),
        ],
    )
    for camera in ("a", "b", "c"):
        scheduler.offer(make_frame(camera), clock.ns)
    assert [work.camera for work in scheduler.next_work(clock.ns, frames=3)] == ["a", "c"]
    assert [work.camera for work in scheduler.next_work(clock.ns, frames=3)] == ["b"]


def test_a_frame_too_old_is_not_worked_on_and_nobody_waits_for_it(
    make_scheduler, make_frame, clock
):
    scheduler = make_scheduler(
        tasks=["caption", StandingTask("detect", rate_hz=1.0)], max_frame_age_s=0.5
    )
    scheduler.offer(make_frame(), clock.ns)
    clock.advance(0.6)
    assert not scheduler.has_work(clock.ns)
    assert scheduler.next_due_ns(clock.ns) is None
    assert scheduler.drops()["too_old"] == 1


def test_replaced_and_not_due_frames_are_told_apart(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=[StandingTask("caption", rate_hz=1.0)])
    scheduler.offer(make_frame(), clock.ns)
    scheduler.offer(make_frame(), clock.ns)  # the task waited for the first: replaced
    scheduler.next_work(clock.ns)
    scheduler.offer(make_frame(), clock.ns)
    scheduler.offer(make_frame(), clock.ns)  # the task is not due: not wanted
    assert scheduler.mailboxes["front"].dropped == {
        DropReason.REPLACED: 1,
        DropReason.NOT_DUE: 1,
    }


def test_a_new_instruction_is_acted_on_at_once_on_the_frame_that_is_there(
    make_scheduler, make_frame, clock
):
    scheduler = make_scheduler(tasks=[StandingTask("ground", prompt="cube", rate_hz=0.1)])
    frame = make_frame()
    scheduler.offer(frame, clock.ns)
    scheduler.next_work(clock.ns)
    scheduler.set_tasks([StandingTask("ground", prompt="duck", rate_hz=0.1, instruction_id=2)])
    (work,) = scheduler.next_work(clock.ns)
    assert (work.frame, work.tasks[0].prompt) == (frame, "duck")


def test_setting_the_same_tasks_again_keeps_their_rhythm(make_scheduler, make_frame, clock):
    tasks = [StandingTask("caption", rate_hz=1.0)]
    scheduler = make_scheduler(tasks=tasks)
    scheduler.offer(make_frame(), clock.ns)
    scheduler.next_work(clock.ns)
    scheduler.set_tasks(tasks)
    scheduler.offer(make_frame(), clock.ns)
    assert not scheduler.has_work(clock.ns)


def test_a_faster_rate_holds_at_once(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=[StandingTask("caption", rate_hz=0.1)])
    scheduler.offer(make_frame(), clock.ns)
    scheduler.next_work(clock.ns)
    scheduler.set_tasks([StandingTask("caption", rate_hz=10.0)])
    scheduler.offer(make_frame(), clock.ns)
    assert scheduler.has_work(clock.ns)


def test_tasks_that_cannot_run_are_set_aside_until_they_can(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=["ground", "caption", "ocr"])
    scheduler.set_supported(frozenset({"caption", "ground"}))
    scheduler.offer(make_frame(), clock.ns)
    assert scheduler.next_work(clock.ns)[0].names == ("caption",)
    assert [name for name, _ in scheduler.idle] == ["ground", "ocr"]
    scheduler.set_supported(frozenset({"ocr"}))
    assert scheduler.next_work(clock.ns)[0].names == ("ocr",)


def test_wrong_tasks_leave_the_right_ones_in_place(make_scheduler):
    scheduler = make_scheduler()
    with pytest.raises(RequestError) as caught:
        scheduler.set_tasks([StandingTask("detect", camera="attic")])
    assert caught.value.code == ErrorCode.UNKNOWN_CAMERA
    assert [task.name for task in scheduler.tasks] == ["caption"]


def test_after_a_pause_frames_from_before_it_are_not_worked_on(make_scheduler, make_frame, clock):
    scheduler = make_scheduler()
    scheduler.offer(make_frame(), clock.ns)
    scheduler.pause()
    assert not scheduler.has_work(clock.ns)
    assert scheduler.mailboxes["front"].dropped == {DropReason.NOT_ACTIVE: 1}
    scheduler.offer(make_frame(), clock.ns)
    assert scheduler.has_work(clock.ns)


def test_a_camera_can_be_added_and_removed_while_frames_come(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(cameras=("a", "b"))
    scheduler.offer(make_frame("a"), clock.ns)
    scheduler.set_cameras([CameraConfig("a"), CameraConfig("c")])
    assert set(scheduler.mailboxes) == {"a", "c"}
    assert scheduler.next_work(clock.ns)[0].camera == "a"


def test_a_camera_that_is_not_declared_is_refused_and_the_declared_are_named(make_scheduler):
    assert make_scheduler().mailbox("front").camera == "front"
    with pytest.raises(RequestError, match="declared are: a, b"):
        make_scheduler(cameras=("a", "b")).mailbox("front")


def test_in_lock_step_every_frame_comes_in_order_however_old(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(cameras=("a", "b"), lock_step=True)
    frames = [make_frame(camera) for camera in "aabab"]
    for frame in frames:
        scheduler.offer(frame, clock.ns)
    clock.advance(3600.0)
    taken = [scheduler.next_work(clock.ns, frames=4) for _ in frames]
    assert [work.frame for works in taken for work in works] == frames
    assert not any(box.dropped for box in scheduler.mailboxes.values())


def test_in_lock_step_a_frame_is_asked_what_stood_when_it_came(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=[StandingTask("ground", prompt="cube")], lock_step=True)
    scheduler.offer(make_frame(), clock.ns)
    scheduler.set_tasks([StandingTask("ground", prompt="duck", instruction_id=1)])
    scheduler.offer(make_frame(), clock.ns)
    prompts = [scheduler.next_work(clock.ns)[0].tasks[0].prompt for _ in range(2)]
    assert prompts == ["cube", "duck"]


def test_in_lock_step_rates_follow_the_stamps(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(
        tasks=["caption", StandingTask("detect", rate_hz=5.0)], lock_step=True
    )
    for _ in range(4):  # stamped 0.1 s apart, whatever the clock does
        scheduler.offer(make_frame(), clock.ns)
    names = [scheduler.next_work(clock.ns)[0].names for _ in range(4)]
    assert names == [("caption", "detect"), ("caption",)] * 2


# -- standing tasks and their rates ---------------------------------------------------------------

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


def test_two_tasks_of_one_name_are_refused(make_scheduler):
    with pytest.raises(RequestError, match="two standing tasks are called 'caption'"):
        make_scheduler(tasks=["caption", "caption"])
    make_scheduler(tasks=["caption", StandingTask("caption", name="again")])
    make_scheduler(
        ["a", "b"], [StandingTask("caption", camera="a"), StandingTask("caption", camera="b")]
    )


def test_a_task_on_an_undeclared_camera_is_refused_and_the_declared_are_named(make_scheduler):
    with pytest.raises(RequestError, match="declared are: left, right") as caught:
        make_scheduler(["right", "left"], [StandingTask("caption", camera="front")])
    assert caught.value.code == ErrorCode.UNKNOWN_CAMERA
