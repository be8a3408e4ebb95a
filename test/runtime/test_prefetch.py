"""The next frame is prepared while the model works on another."""

from __future__ import annotations

import threading
import time

import pytest

from librobot_vlm_ros.runtime import StandingTask

SOON = 10.0


class Preparing:
    """Adds `prepare_frame` to the script backend, and says which frames it got."""

    def __init__(self, backend, monkeypatch):
        self.frames = []
        self.threads = set()
        self.failing = False
        self.go = threading.Event()
        self.go.set()
        self._changed = threading.Condition()
        monkeypatch.setattr(backend, "prepare_frame", self, raising=False)
        monkeypatch.setattr(backend, "prepares_ahead", True, raising=False)

    def __call__(self, frame):
        self.threads.add(threading.current_thread().name)
        with self._changed:
            self.frames.append(frame)
            self._changed.notify_all()
        assert self.go.wait(SOON)
        if self.failing:
            raise ValueError("cannot be prepared")

    def wait(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.frames) >= count, SOON), self.frames
            return list(self.frames)

    def stays(self, count):
        """No more than `count` were prepared, a moment being given."""
        time.sleep(0.05)
        return len(self.frames) == count


@pytest.fixture
def preparing(backend, monkeypatch):
    return Preparing(backend, monkeypatch)


@pytest.fixture
def busy(make_engine, backend, make_frame, results, preparing):
    """An engine with a camera of 10 Hz, whose model holds a frame and mostly takes 1 s for one."""

    def make(**options):
        engine = make_engine(max_frame_age_s=0.0, **options)
        engine.set_standing_tasks([StandingTask("caption")])
        engine._shared.meter.run_ended(1.0, 0, engine.now_ns())
        backend.hold()
        engine.offer(make_frame())
        backend.wait_entered()
        return engine

    return make


def test_frames_that_will_be_replaced_are_not_prepared(busy, clock, make_frame, preparing):
    engine = busy()
    for _ in range(5):
        clock.advance(0.1)
        engine.offer(make_frame())
    assert preparing.stays(0)


def test_the_frame_that_will_be_the_newest_when_the_model_is_done_is_prepared(
    busy, clock, make_frame, preparing, backend, results
):
    engine = busy()
    clock.advance(0.05)
    engine.offer(make_frame())
    for _ in range(9):
        clock.advance(0.1)
        last = make_frame()
        engine.offer(last)
    assert preparing.wait(1) == [last]
    assert preparing.threads == {"vlm-prefetch"}
    backend.release()
    results.wait(2)
    assert backend.batches[1][0].frame is last


def test_a_camera_that_sends_nothing_more_has_its_frame_prepared_in_time(
    busy, clock, make_frame, preparing
):
    engine = busy()
    clock.advance(0.1)
    engine.offer(make_frame())
    clock.advance(0.1)
    last = make_frame()
    engine.offer(last)
    assert preparing.stays(0)
    clock.advance(0.9)
    assert preparing.wait(1) == [last]


def test_a_model_that_takes_longer_than_it_mostly_does_has_newer_frames_prepared_now_and_then(
    busy, clock, make_frame, preparing
):
    engine = busy()
    clock.advance(2.0)
    engine.offer(make_frame())
    preparing.wait(1)
    engine.offer(make_frame())
    assert preparing.stays(1)  # preparing must not keep a core busy
    for count in range(2, 4):
        clock.advance(15.0)
        engine.offer(make_frame())
        preparing.wait(count)
        engine.poke()
    assert preparing.stays(3)


def test_nothing_is_prepared_where_it_would_take_the_models_own_cores(
    backend, monkeypatch, ask, busy, preparing
):
    monkeypatch.setattr(backend, "prepares_ahead", False)
    busy().submit(ask())
    assert preparing.stays(0)


def test_frames_that_come_while_one_is_prepared_do_not_queue_up(busy, clock, make_frame, preparing):
    engine = busy()
    clock.advance(2.0)
    preparing.go.clear()
    frames = [make_frame() for _ in range(4)]
    for frame in frames:
        engine.offer(frame)
        preparing.wait(1)
    clock.advance(60.0)
    preparing.go.set()
    assert preparing.wait(2) == [frames[0], frames[3]]
    assert preparing.stays(2)


def test_the_frame_of_a_waiting_request_is_prepared_at_once(busy, ask, preparing):
    engine, request = busy(), ask()
    engine.submit(request)
    assert preparing.wait(1) == [request.frame]


def test_frames_in_line_are_prepared_in_order_in_lock_step(
    make_engine, make_frame, backend, preparing, results
):
    engine = make_engine(lock_step=True)
    engine.set_standing_tasks([StandingTask("caption")])
    backend.hold()
    frames = [make_frame() for _ in range(6)]
    for frame in frames[:5]:
        engine.offer(frame)
    backend.wait_entered()
    assert preparing.wait(2) == frames[1:3]
    assert preparing.stays(2)
    backend.release()
    engine.offer(frames[5])
    results.wait(6)
    assert [batch[0].frame for batch in backend.batches] == frames


def test_nothing_is_prepared_while_the_model_has_nothing_to_do(
    make_engine, make_frame, preparing, results
):
    engine = make_engine()
    engine.set_standing_tasks([StandingTask("caption")])
    for count in range(1, 4):
        engine.offer(make_frame())
        results.wait(count)
    assert preparing.stays(0)


def test_what_cannot_be_prepared_is_asked_of_the_model_all_the_same(busy, ask, preparing, backend):
    engine, preparing.failing = busy(), True
    future = engine.submit(ask())
    preparing.wait(1)
    second = engine.submit(ask())
    preparing.wait(2)
    backend.release()
    assert future.result(SOON).error is None
    assert second.result(SOON).error is None


def test_a_model_is_not_freed_while_it_prepares_a_frame(busy, ask, preparing, backend):
    engine = busy()
    preparing.go.clear()
    engine.submit(ask())
    preparing.wait(1)
    backend.release()
    gone = threading.Thread(target=engine.stop, args=(SOON,))
    gone.start()
    time.sleep(0.05)
    assert not backend.closed
    preparing.go.set()
    gone.join(SOON)
    assert backend.closed


def test_a_frame_is_let_go_once_it_is_prepared(busy, ask, preparing, make_frame, backend):
    import gc
    import weakref

    engine = busy()
    frame = make_frame()
    future = engine.submit(ask(frame=frame))
    preparing.wait(1)
    backend.release()
    future.result(SOON)
    preparing.frames.clear()
    backend.batches.clear()
    gone, frame = weakref.ref(frame), None
    del future
    until = time.monotonic() + SOON
    while gone() is not None and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None


def test_counts_of_the_model_are_in_the_statistics(make_engine, ask, backend, monkeypatch):
    counts = {"hits": 3, "misses": 2, "ahead": 1}
    monkeypatch.setattr(backend, "frame_counts", lambda: counts, raising=False)
    engine = make_engine()
    engine.submit(ask()).result(SOON)
    stats = engine.stats()
    assert (stats.features_shared, stats.features_computed, stats.prepared_ahead) == (3, 2, 1)
    monkeypatch.setattr(backend, "frame_counts", lambda: 1 / 0)
    assert engine.submit(ask()).result(SOON).error is None


def test_the_engine_tells_the_input_size_of_the_model_that_is_loaded(
    make_engine, backend, monkeypatch
):
    assert make_engine().input_size(640, 480) is None
    monkeypatch.setattr(backend, "input_size", lambda w, h: (w // 2, h // 2), raising=False)
    engine = make_engine()
    assert engine.input_size(640, 480) == (320, 240)
    assert engine.stop(SOON)
    assert engine.input_size(640, 480) is None
