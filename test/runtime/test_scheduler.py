"""Which standing work runs next."""

from __future__ import annotations

from collections import Counter

import pytest

from librobot_vlm_ros.core import ErrorCode, RequestError
from librobot_vlm_ros.runtime import CameraConfig, DropReason, EngineConfig, StandingTask
from librobot_vlm_ros.runtime.scheduler import Scheduler, drops


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
    assert not scheduler.anything(clock.ns)
    assert scheduler.take(clock.ns) == []
    assert scheduler.next_due_ns(clock.ns) is None


def test_tasks_due_on_one_frame_come_as_one_piece_of_work(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=["caption", "detect"])
    frame = make_frame()
    scheduler.offer(frame, clock.ns)
    (work,) = scheduler.take(clock.ns)
    assert (work.frame, work.names) == (frame, ("caption", "detect"))
    assert not scheduler.anything(clock.ns)


def test_a_slow_task_uses_the_newest_frame_when_its_time_comes(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=[StandingTask("caption", rate_hz=2.0)])
    scheduler.offer(make_frame(), clock.ns)
    scheduler.take(clock.ns)
    clock.advance(0.4)
    newest = make_frame()
    scheduler.offer(newest, clock.ns)
    assert not scheduler.anything(clock.ns)
    assert scheduler.next_due_ns(clock.ns) == clock.ns + 100_000_000
    clock.advance(0.1)
    assert scheduler.take(clock.ns)[0].frame is newest


def test_cameras_take_turns(make_scheduler, make_frame, clock):
    cameras = ("left", "right", "wrist")
    scheduler = make_scheduler(cameras=cameras)
    served = Counter()
    for _ in range(30):
        for camera in cameras:
            scheduler.offer(make_frame(camera), clock.ns)
        served.update(work.camera for work in scheduler.take(clock.ns))
    assert served == {"left": 10, "right": 10, "wrist": 10}


def test_a_camera_that_is_slower_loses_no_turn_to_a_faster_one(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(cameras=("fast", "slow"))
    order = []
    for number in range(12):
        scheduler.offer(make_frame("fast"), clock.ns)
        if number % 3 == 0:
            scheduler.offer(make_frame("slow"), clock.ns)
        order += [work.camera for work in scheduler.take(clock.ns)]
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
    assert [work.camera for work in scheduler.take(clock.ns, frames=3)] == ["a", "c"]
    assert [work.camera for work in scheduler.take(clock.ns, frames=3)] == ["b"]


def test_a_frame_too_old_is_not_worked_on_and_nobody_waits_for_it(
    make_scheduler, make_frame, clock
):
    scheduler = make_scheduler(
        tasks=["caption", StandingTask("detect", rate_hz=1.0)], max_frame_age_s=0.5
    )
    scheduler.offer(make_frame(), clock.ns)
    clock.advance(0.6)
    assert not scheduler.anything(clock.ns)
    assert scheduler.next_due_ns(clock.ns) is None
    assert drops(scheduler.mailboxes, 0)["too_old"] == 1


def test_replaced_and_not_due_frames_are_told_apart(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=[StandingTask("caption", rate_hz=1.0)])
    scheduler.offer(make_frame(), clock.ns)
    scheduler.offer(make_frame(), clock.ns)  # the task waited for the first: replaced
    scheduler.take(clock.ns)
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
    scheduler.take(clock.ns)
    scheduler.set_tasks([StandingTask("ground", prompt="duck", rate_hz=0.1, instruction_id=2)])
    (work,) = scheduler.take(clock.ns)
    assert (work.frame, work.tasks[0].prompt) == (frame, "duck")


def test_setting_the_same_tasks_again_keeps_their_rhythm(make_scheduler, make_frame, clock):
    tasks = [StandingTask("caption", rate_hz=1.0)]
    scheduler = make_scheduler(tasks=tasks)
    scheduler.offer(make_frame(), clock.ns)
    scheduler.take(clock.ns)
    scheduler.set_tasks(tasks)
    scheduler.offer(make_frame(), clock.ns)
    assert not scheduler.anything(clock.ns)


def test_a_faster_rate_holds_at_once(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=[StandingTask("caption", rate_hz=0.1)])
    scheduler.offer(make_frame(), clock.ns)
    scheduler.take(clock.ns)
    scheduler.set_tasks([StandingTask("caption", rate_hz=10.0)])
    scheduler.offer(make_frame(), clock.ns)
    assert scheduler.anything(clock.ns)


def test_tasks_that_cannot_run_are_set_aside_until_they_can(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=["ground", "caption", "ocr"])
    scheduler.set_supported(frozenset({"caption", "ground"}))
    scheduler.offer(make_frame(), clock.ns)
    assert scheduler.take(clock.ns)[0].names == ("caption",)
    assert [name for name, _ in scheduler.idle] == ["ground", "ocr"]
    scheduler.set_supported(frozenset({"ocr"}))
    assert scheduler.take(clock.ns)[0].names == ("ocr",)


def test_wrong_tasks_leave_the_right_ones_in_place(make_scheduler):
    scheduler = make_scheduler()
    with pytest.raises(RequestError) as caught:
        scheduler.set_tasks([StandingTask("detect", camera="attic")])
    assert caught.value.code == ErrorCode.UNKNOWN_CAMERA
    assert [task.name for task in scheduler.tasks] == ["caption"]


def test_after_a_pause_frames_from_before_it_are_not_worked_on(make_scheduler, make_frame, clock):
    scheduler = make_scheduler()
    scheduler.offer(make_frame(), clock.ns)
    scheduler.hold()
    assert not scheduler.anything(clock.ns)
    assert scheduler.mailboxes["front"].dropped == {DropReason.NOT_ACTIVE: 1}
    scheduler.offer(make_frame(), clock.ns)
    assert scheduler.anything(clock.ns)


def test_a_camera_can_be_added_and_removed_while_frames_come(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(cameras=("a", "b"))
    scheduler.offer(make_frame("a"), clock.ns)
    scheduler.set_cameras([CameraConfig("a"), CameraConfig("c")])
    assert set(scheduler.mailboxes) == {"a", "c"}
    assert scheduler.take(clock.ns)[0].camera == "a"


def test_the_only_camera_needs_no_name_and_several_do(make_scheduler):
    assert make_scheduler().mailbox("").camera == "front"
    with pytest.raises(RequestError, match="declared are: a, b"):
        make_scheduler(cameras=("a", "b")).mailbox("")


def test_in_lock_step_every_frame_comes_in_order_however_old(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(cameras=("a", "b"), lock_step=True)
    frames = [make_frame(camera) for camera in "aabab"]
    for frame in frames:
        scheduler.offer(frame, clock.ns)
    clock.advance(3600.0)
    taken = [scheduler.take(clock.ns, frames=4) for _ in frames]
    assert [work.frame for works in taken for work in works] == frames
    assert not any(box.dropped for box in scheduler.mailboxes.values())


def test_in_lock_step_a_frame_is_asked_what_stood_when_it_came(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(tasks=[StandingTask("ground", prompt="cube")], lock_step=True)
    scheduler.offer(make_frame(), clock.ns)
    scheduler.set_tasks([StandingTask("ground", prompt="duck", instruction_id=1)])
    scheduler.offer(make_frame(), clock.ns)
    prompts = [scheduler.take(clock.ns)[0].tasks[0].prompt for _ in range(2)]
    assert prompts == ["cube", "duck"]


def test_in_lock_step_rates_follow_the_stamps(make_scheduler, make_frame, clock):
    scheduler = make_scheduler(
        tasks=["caption", StandingTask("detect", rate_hz=5.0)], lock_step=True
    )
    for _ in range(4):  # stamped 0.1 s apart, whatever the clock does
        scheduler.offer(make_frame(), clock.ns)
    names = [scheduler.take(clock.ns)[0].names for _ in range(4)]
    assert names == [("caption", "detect"), ("caption",)] * 2
