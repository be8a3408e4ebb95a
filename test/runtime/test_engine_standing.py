"""Standing tasks on frames of cameras."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from librobot_vlm_ros.core import ErrorCode, RequestError
from librobot_vlm_ros.runtime import CameraConfig, DropReason, StandingTask, with_age

SOON = 10.0


@pytest.fixture
def watch(make_engine):
    """An engine that captions and detects on every frame."""

    def make(*tasks, **options):
        engine = make_engine(**options)
        engine.set_standing_tasks(tasks or [StandingTask("caption"), StandingTask("detect")])
        return engine

    return make


def test_tasks_on_one_frame_are_one_batch_and_each_gives_a_result(
    watch, backend, make_frame, results
):
    engine = watch()
    frame = make_frame()
    assert engine.offer(frame)
    got = results.wait(2)
    assert [result.info.task for result in got] == ["caption", "detect"]
    assert [[request.task for request in batch] for batch in backend.batches] == [
        ["caption", "detect"]
    ]
    assert all(result.frame_header is frame.header for result in got)
    assert all(source is frame for _, source in results.all)
    assert got[0].info.request_id != got[1].info.request_id


def test_while_the_model_is_busy_the_newest_frame_wins(watch, backend, make_frame, results):
    engine = watch(StandingTask("caption"))
    backend.hold()
    engine.offer(make_frame())
    backend.wait_entered()
    for _ in range(5):
        engine.offer(make_frame())
    backend.release()
    assert [result.stamp_ns for result in results.wait(2)] == [100_000_000, 600_000_000]
    stats = engine.stats()
    assert stats.dropped["replaced"] == 4
    assert (stats.frames_received, stats.frames_processed) == (6, 2)


def test_cameras_share_the_model_evenly(watch, make_frame, results):
    cameras = ("left", "right", "wrist")
    engine = watch(StandingTask("caption"), cameras=cameras)
    for number in range(30):
        for camera in cameras:
            engine.offer(make_frame(camera))
        results.wait(3 * (number + 1))
    share = Counter(result.info.camera for result in results.wait(90))
    assert share == dict.fromkeys(cameras, 30)


def test_where_a_batch_is_as_fast_as_one_frame_cameras_are_batched(
    watch, backend, make_frame, results
):
    cameras = ("left", "right", "wrist")
    engine = watch(StandingTask("caption"), cameras=cameras)
    takes_time = threading.Event()  # never set: a batch takes 10 ms, however large
    backend.before_run = lambda batch: takes_time.wait(0.01) and None
    for number in range(15):
        for camera in cameras:
            engine.offer(make_frame(camera))
        results.wait(3 * (number + 1))
    assert max(len(batch) for batch in backend.batches) > 1


def test_more_tasks_than_a_batch_holds_all_run(watch, backend, make_frame, results):
    engine = watch(
        *(StandingTask("caption", name=f"c{number}") for number in range(5)), max_batch=2
    )
    engine.offer(make_frame())
    results.wait(5)
    assert [len(batch) for batch in backend.batches] == [2, 2, 1]


def test_a_slow_task_wakes_up_when_its_time_comes(watch, make_frame, results, clock):
    engine = watch(StandingTask("caption", rate_hz=2.0))
    engine.offer(make_frame())
    results.wait(1)
    clock.advance(0.3)
    engine.offer(make_frame())
    assert engine.drain(SOON)
    assert len(results.all) == 1
    clock.advance(0.2)
    assert results.wait(2)[1].stamp_ns == 200_000_000


def test_a_frame_older_than_the_limit_is_refused_on_arrival(watch, make_frame, clock):
    engine = watch(max_frame_age_s=0.5)
    old = make_frame()
    clock.advance(0.6)
    assert not engine.offer(old)
    assert engine.stats().dropped["too_old"] == 1


def test_a_frame_that_grew_too_old_behind_a_slow_model_gives_no_result(
    watch, backend, make_frame, results, clock
):
    engine = watch(StandingTask("caption"), max_frame_age_s=0.5)
    backend.hold()
    engine.offer(make_frame())
    backend.wait_entered()
    engine.offer(make_frame())
    clock.advance(0.6)
    backend.release()
    results.wait(1)
    assert engine.drain(SOON)
    assert len(results.all) == 1
    assert engine.stats().dropped["too_old"] == 1


def test_frames_of_undeclared_cameras_are_refused_and_counted(watch, make_frame):
    engine = watch()
    assert not engine.offer(make_frame("attic"))
    assert engine.stats().dropped["unknown_camera"] == 1
    assert set(engine.stats().cameras) == {"front"}


def test_images_that_never_became_frames_are_counted(watch):
    engine = watch()
    engine.count_drop("front", DropReason.BAD_IMAGE)
    engine.count_drop("front", DropReason.TOO_OLD)
    camera = engine.stats().cameras["front"]
    assert (camera.received, camera.dropped) == (2, {"bad_image": 1, "too_old": 1})


def test_a_new_instruction_is_answered_at_once_and_told_apart_from_the_old(
    watch, backend, make_frame, results
):
    engine = watch(StandingTask("ground", prompt="cube", instruction_id=1, rate_hz=0.1))
    engine.offer(make_frame())
    results.wait(1)
    engine.set_standing_tasks(
        [StandingTask("ground", prompt="duck", instruction_id=2, rate_hz=0.1)]
    )
    got = results.wait(2)
    assert [(one.info.prompt, one.info.instruction_id) for one in got] == [("cube", 1), ("duck", 2)]


def test_tasks_without_instruction_wait_and_say_so(watch, make_frame, results):
    engine = watch(StandingTask("ground"), StandingTask("caption"), StandingTask("ocr"))
    engine.offer(make_frame())
    assert results.wait(1)[0].info.task == "caption"
    idle = dict(engine.stats().idle_tasks)
    assert "needs a prompt" in idle["ground"]
    assert "can do" in idle["ocr"]


def test_wrong_tasks_are_refused_and_the_old_ones_stay(watch, make_frame, results):
    engine = watch(StandingTask("caption"))
    with pytest.raises(RequestError) as caught:
        engine.set_standing_tasks([StandingTask("detect", camera="attic")])
    assert caught.value.code == ErrorCode.UNKNOWN_CAMERA
    engine.offer(make_frame())
    assert results.wait(1)[0].info.task == "caption"


def test_latest_and_history_serve_queries(watch, backend, make_frame, clock):
    engine = watch(max_frame_age_s=1.0)
    backend.hold()
    frames = [make_frame() for _ in range(3)]
    for frame in frames:
        engine.offer(frame)
    assert engine.latest("front", max_age_s=1.0) is frames[2]
    assert engine.frame_at("front", 200_000_000) is frames[1]
    clock.advance(1.5)
    with pytest.raises(RequestError, match="FRAME_TOO_OLD"):
        engine.latest("front", max_age_s=1.0)
    assert engine.latest("front", max_age_s=2.0) is frames[2]
    with pytest.raises(RequestError, match="UNKNOWN_CAMERA"):
        engine.latest("attic", max_age_s=1.0)


def test_a_listener_that_fails_is_logged_counted_and_asked_again(
    make_engine, make_frame, results, caplog
):
    calls = []

    def broken(result, frame):
        calls.append(result)
        results(result, frame)
        raise ValueError("publisher is gone")

    engine = make_engine()
    engine._shared.on_result = broken
    engine.set_standing_tasks([StandingTask("caption")])
    engine.offer(make_frame())
    results.wait(1)
    engine.offer(make_frame())
    results.wait(2)
    assert engine.drain(SOON)
    assert len(calls) == 2
    assert "on_result failed" in caplog.text
    assert engine.stats().errors == {"INTERNAL": 2}


def test_age_is_taken_when_the_result_is_published(watch, make_frame, results, clock):
    engine = watch(StandingTask("caption"))
    frame = make_frame()
    clock.advance(0.1)
    engine.offer(frame)
    result = results.wait(1)[0]
    assert result.info.age_s == pytest.approx(0.1)
    clock.advance(0.2)
    assert with_age(result, frame, engine.now_ns()).info.age_s == pytest.approx(0.3)


def test_stats_tell_ages_times_and_cameras(watch, make_frame, results, clock):
    engine = watch(StandingTask("caption"))
    for count in range(1, 11):
        frame = make_frame()
        clock.advance(0.1)
        engine.offer(frame)
        results.wait(count)
    assert engine.drain(SOON)
    stats = engine.stats()
    assert stats.results == 10
    assert stats.age_p50_s == pytest.approx(0.1)
    assert stats.age_p99_s == pytest.approx(0.1)
    assert stats.inference_p99_s >= stats.inference_p50_s >= 0.0
    assert stats.tokens_per_s > 0.0
    assert stats.memory_bytes == 1000
    assert (stats.model, stats.revision, stats.in_flight, stats.busy_s) == (
        "script",
        "script-r1",
        0,
        0.0,
    )
    assert stats.cameras["front"].rate_hz == pytest.approx(10.0)
    assert stats.cameras["front"].processed == 10


def test_stats_tell_how_long_a_run_takes_while_it_does(watch, backend, make_frame, clock):
    engine = watch()
    backend.hold()
    engine.offer(make_frame())
    backend.wait_entered()
    clock.advance(30.0)
    stats = engine.stats()
    assert stats.busy_s == pytest.approx(30.0)
    assert stats.in_flight == 2


class Events:
    def __init__(self):
        self.all = []
        self.changed = threading.Condition()

    def __call__(self, event):
        with self.changed:
            self.all.append(event)
            self.changed.notify_all()

    def wait(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.all) >= count, SOON), self.all
            return self.all


def test_a_silent_camera_is_reported_while_the_model_is_busy_and_recovers_by_itself(
    make_engine, backend, make_frame, clock
):
    events = Events()
    engine = make_engine(on_camera=events)
    engine.set_cameras([CameraConfig("front", timeout_s=1.0)])
    engine.set_standing_tasks([StandingTask("caption")])
    backend.hold()
    engine.offer(make_frame())
    backend.wait_entered()
    for cycle in range(20):
        clock.advance(1.0)
        assert events.wait(2 * cycle + 1)[-1].stale
        assert engine.stats().cameras["front"].stale
        engine.offer(make_frame())
        assert not events.wait(2 * cycle + 2)[-1].stale
    assert [event.stale for event in events.all] == [True, False] * 20


def test_a_camera_that_sends_only_bad_images_is_not_silent(make_engine, clock):
    events = Events()
    engine = make_engine(on_camera=events)
    engine.set_cameras([CameraConfig("front", timeout_s=1.0)])
    for _ in range(5):
        clock.advance(0.9)
        engine.count_drop("front", DropReason.BAD_IMAGE)
    assert events.all == []


def test_limits_change_while_frames_come(watch, make_frame, clock):
    engine = watch(max_frame_age_s=1.0)
    engine.reconfigure(max_frame_age_s=0.1, queue_size=3)
    frame = make_frame()
    clock.advance(0.2)
    assert not engine.offer(frame)
    assert engine.config.queue_size == 3


@pytest.mark.parametrize("changes", [{"queue_size": 0}, {"max_frame_age_s": -1}])
def test_wrong_limits_are_refused_and_change_nothing(watch, changes):
    engine = watch()
    before = engine.config
    with pytest.raises(RequestError) as caught:
        engine.reconfigure(**{"queue_size": 8, "max_frame_age_s": 1.0, **changes})
    assert caught.value.code == ErrorCode.BAD_PARAMETER
    assert engine.config == before
