"""Loading, starting, pausing, switching, stopping: bounded in time whatever the model does."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from librobot_vlm_ros.core import ErrorCode, InferenceError, ModelError, VlmError
from librobot_vlm_ros.runtime import (
    CameraConfig,
    Engine,
    EngineConfig,
    EngineState,
    StandingTask,
    model_thread,
)

SOON = 10.0


def engine_threads():
    return sorted(one.name for one in threading.enumerate() if one.name.startswith("vlm-"))


def code(future):
    error = future.result(SOON).error
    return error.code if error is not None else ErrorCode.OK


class Door:
    """A factory whose loading waits until it is opened; `deaf`: it hears of no cancellation."""

    def __init__(self, script, deaf=False):
        self.script = script
        self.free_bytes = 10**9  # as every model that it makes tells
        self.alive_when_making = []
        self.deaf = deaf
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.made = []
        self.failing = {}

    def __call__(self, name, *, should_cancel, **options):
        self.entered.release()
        while not self.open.wait(0.002):
            if should_cancel() and not self.deaf:
                raise ModelError(ErrorCode.LOAD_CANCELLED, "stopped between two files")
        self.alive_when_making.append([one.name for one in self.made if not one.closed])
        if name in self.failing:
            raise self.failing[name]
        backend = self.script(name)
        backend.free_memory = lambda: self.free_bytes
        self.made.append(backend)
        return backend

    def wait_entered(self):
        assert self.entered.acquire(timeout=SOON)


@pytest.fixture
def door(script):
    door = Door(script)
    yield door
    door.open.set()


# -- the plain way -----------------------------------------------------------------------------


def test_the_states_of_a_life(make_engine, backend):
    engine = make_engine(load=False)
    assert engine.state == EngineState.UNLOADED
    report = engine.load("script").result(SOON)
    assert report.model == "script"
    assert engine.state == EngineState.PAUSED
    engine.start()
    assert engine.state == EngineState.RUNNING
    assert engine.pause(SOON)
    assert engine.state == EngineState.PAUSED
    assert engine.stop(SOON)
    assert engine.state == EngineState.STOPPED
    assert backend.closed


def test_three_threads_while_it_lives_and_none_afterwards(make_engine):
    before = engine_threads()
    engine = make_engine()
    assert len(engine_threads()) == len(before) + 3
    assert engine.stop(SOON)
    assert engine_threads() == before
    assert engine.stop(SOON)  # again is fine


def test_starting_without_a_model_says_what_to_do(make_engine):
    engine = make_engine(load=False)
    with pytest.raises(ModelError, match="Configure the node") as caught:
        engine.start()
    assert caught.value.code == ErrorCode.MODEL_NOT_LOADED


def test_starting_twice_and_pausing_twice_is_fine(make_engine):
    engine = make_engine()
    engine.start()
    assert engine.pause(SOON)
    assert engine.pause(SOON)


def test_after_stop_everything_is_refused_with_a_code(make_engine, ask, make_frame):
    engine = make_engine()
    engine.stop(SOON)
    assert code(engine.submit(ask())) == ErrorCode.SHUTTING_DOWN
    assert not engine.offer(make_frame())
    with pytest.raises(VlmError, match="SHUTTING_DOWN"):
        engine.start()
    with pytest.raises(VlmError, match="SHUTTING_DOWN"):
        engine.load("script").result(SOON)


def test_while_not_running_requests_and_frames_are_refused(make_engine, ask, make_frame):
    engine = make_engine(start=False)
    assert code(engine.submit(ask())) == ErrorCode.NOT_ACTIVE
    assert not engine.offer(make_frame())
    assert engine.stats().dropped["not_active"] == 1


def test_hundreds_of_transitions_leave_threads_and_answers_as_they_were(make_engine, ask):
    engine = make_engine(warm_up=False)
    before = engine_threads()
    for _ in range(300):
        assert engine.pause(SOON)
        engine.start()
    for _ in range(5):
        engine.load("script").result(SOON)
        assert engine.pause(SOON)
        engine.start()
    assert engine_threads() == before
    assert code(engine.submit(ask())) == ErrorCode.OK


# -- a slow model ------------------------------------------------------------------------------


@pytest.fixture
def slow(make_engine, backend, ask):
    """An engine whose model hangs in a request; the request's future."""
    engine = make_engine()
    backend.hold()
    running = engine.submit(ask("running"))
    backend.wait_entered()
    return engine, running


def test_pausing_answers_everybody_at_once_and_stops_the_model(slow, ask):
    engine, running = slow
    waiting = engine.submit(ask())
    assert engine.pause(SOON)  # nobody releases the model: it stops at its next token
    assert code(running) == ErrorCode.NOT_ACTIVE
    assert code(waiting) == ErrorCode.NOT_ACTIVE


def test_pausing_a_deaf_model_answers_everybody_and_says_that_it_still_runs(slow, backend):
    engine, running = slow
    backend.deaf = True
    assert not engine.pause(0.02)
    assert code(running) == ErrorCode.NOT_ACTIVE
    assert engine.state == EngineState.PAUSED
    backend.release()
    assert engine.pause(SOON)


def test_after_pause_no_standing_result_comes(make_engine, backend, make_frame, results):
    engine = make_engine()
    engine.set_standing_tasks([StandingTask("caption")])
    backend.hold()
    engine.offer(make_frame())
    backend.wait_entered()
    engine.offer(make_frame())
    assert engine.pause(SOON)
    backend.release()
    assert engine.drain(SOON)
    assert results.all == []
    engine.start()
    assert engine.drain(SOON)
    assert results.all == []  # frames from before the pause are history
    engine.offer(make_frame())
    assert results.wait(1)[0].stamp_ns == 300_000_000


def test_stats_and_state_answer_while_the_model_hangs(slow, backend):
    engine, _ = slow
    backend.deaf = True
    assert engine.state == EngineState.RUNNING
    assert engine.stats().in_flight == 1


def test_stopping_in_the_middle_of_inference_ends_all_threads(slow, backend):
    engine, running = slow
    assert engine.stop(SOON)
    assert code(running) == ErrorCode.SHUTTING_DOWN
    assert backend.closed


def test_stopping_a_deaf_model_returns_in_time_and_says_that_it_did_not_end(slow, backend):
    engine, running = slow
    backend.deaf = True
    assert not engine.stop(0.02)
    assert code(running) == ErrorCode.SHUTTING_DOWN
    backend.release()
    assert engine.stop(SOON)


def test_pausing_from_a_result_callback_does_not_lock_up(make_engine, make_frame, backend):
    done = threading.Event()
    holder = []

    def pause_it(result, frame):
        assert holder[0].pause(SOON)
        done.set()

    engine = make_engine()
    holder.append(engine)
    engine._shared.on_result = pause_it
    engine.set_standing_tasks([StandingTask("caption"), StandingTask("detect")])
    engine.offer(make_frame())
    assert done.wait(SOON)
    assert engine.state == EngineState.PAUSED


# -- loading -----------------------------------------------------------------------------------


def test_a_load_that_fails_gives_its_code_and_the_next_one_succeeds(make_engine, door):
    door.open.set()
    door.failing["a"] = ModelError(ErrorCode.WEIGHTS_NOT_FOUND, "no such folder")
    engine = make_engine(load=False, factory=door)
    with pytest.raises(ModelError, match="WEIGHTS_NOT_FOUND"):
        engine.load("a").result(SOON)
    assert engine.state == EngineState.UNLOADED
    assert "WEIGHTS_NOT_FOUND" in engine.stats().last_error
    door.failing.clear()
    assert engine.load("a").result(SOON).model == "a"


def test_any_exception_of_a_loader_is_a_coded_error(make_engine, door):
    door.open.set()
    door.failing["a"] = PermissionError(13, "Permission denied")
    engine = make_engine(load=False, factory=door)
    with pytest.raises(VlmError, match="PERMISSION_DENIED"):
        engine.load("a").result(SOON)


def test_loading_shows_in_the_state_and_a_second_load_is_busy(make_engine, door):
    engine = make_engine(load=False, factory=door)
    first = engine.load("a")
    door.wait_entered()
    assert engine.state == EngineState.LOADING
    with pytest.raises(VlmError, match="BUSY"):
        engine.load("b").result(SOON)
    door.open.set()
    assert first.result(SOON).model == "a"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_cancelled_load_ends_at_once_and_its_model_is_thrown_away(make_engine, door, deaf):
    door.deaf = deaf
    engine = make_engine(load=False, factory=door)
    future = engine.load("a")
    door.wait_entered()
    assert engine.cancel_load()
    assert future.done()
    with pytest.raises(ModelError, match="LOAD_CANCELLED"):
        future.result()
    assert engine.state == EngineState.UNLOADED
    assert not engine.cancel_load()
    again = engine.load("b")  # needs not wait for the old loader to come back
    door.open.set()
    assert again.result(SOON).model == "b"
    assert [one.closed for one in door.made] == [True] * (len(door.made) - 1) + [False]
    assert engine.state == EngineState.PAUSED


def test_only_the_load_that_is_meant_is_cancelled(make_engine, door):
    engine = make_engine(load=False, factory=door)
    first = engine.load("a")
    door.wait_entered()
    engine.cancel_load(first)
    second = engine.load("b")
    assert not engine.cancel_load(first)
    assert not second.done()
    assert engine.cancel_load(second)
    assert second.done()


def test_stopping_while_loading_ends_all(make_engine, door):
    engine = make_engine(load=False, factory=door)
    loading = engine.load("a")
    door.wait_entered()
    assert engine.stop(SOON)
    with pytest.raises(VlmError, match="SHUTTING_DOWN"):
        loading.result(SOON)


def test_options_reach_the_factory(make_engine, backend):
    seen = {}

    def factory(name, *, should_cancel, **options):
        seen.update(options, name=name)
        return backend

    engine = make_engine(load=False, factory=factory)
    engine.load("x", device="cpu", dtype="float16").result(SOON)
    assert seen == {"name": "x", "device": "cpu", "dtype": "float16"}


# -- switching ---------------------------------------------------------------------------------


@pytest.fixture
def two(make_engine, door):
    """A running engine with model "a" and room for another beside it."""
    door.open.set()
    engine = make_engine(load=False, factory=door)
    engine.load("a").result(SOON)
    door.wait_entered()
    engine.start()
    return engine


def test_switching_keeps_running_and_loses_no_request(two, door, ask):
    door.open.clear()
    switching = two.load("b")
    door.wait_entered()
    assert two.state == EngineState.LOADING
    waiting = two.submit(ask())
    door.open.set()
    switching.result(SOON)
    assert door.alive_when_making == [[], ["a"]]
    assert two.state == EngineState.RUNNING
    assert waiting.result(SOON).info.model == "b"
    assert [one.closed for one in door.made] == [True, False]


def test_deadlines_hold_while_a_model_is_being_switched(two, door, ask, clock):
    door.open.clear()
    two.load("b")
    door.wait_entered()
    waiting = two.submit(ask(deadline_ns=clock.ns + 1_000_000_000))
    clock.advance(1.0)
    assert code(waiting) == ErrorCode.DEADLINE_EXCEEDED


def test_a_failed_switch_goes_on_with_the_old_model(two, door, ask):
    door.failing["b"] = ModelError(ErrorCode.SHAPE_MISMATCH, "other shape")
    for free_bytes in (10**9, 0):
        door.made[-1].free_memory = lambda: free_bytes  # noqa: B023
        with pytest.raises(ModelError, match="SHAPE_MISMATCH"):
            two.load("b").result(SOON)
        assert door.made[0].closed is (free_bytes == 0)
        assert two.state == EngineState.RUNNING
        assert two.submit(ask()).result(SOON).info.model == "a"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_cancelled_switch_goes_on_with_the_old_model(two, door, ask, deaf):
    door.open.clear()
    door.deaf = deaf
    switching = two.load("b")
    door.wait_entered()
    assert two.cancel_load()
    with pytest.raises(ModelError, match="LOAD_CANCELLED"):
        switching.result(SOON)
    assert two.state == EngineState.RUNNING
    door.open.set()
    assert two.submit(ask()).result(SOON).info.model == "a"


def test_pausing_while_switching_leaves_the_new_model_paused(two, door):
    door.open.clear()
    switching = two.load("b")
    door.wait_entered()
    assert two.pause(SOON)  # needs not wait for the loader
    door.open.set()
    switching.result(SOON)
    assert two.state == EngineState.PAUSED
    assert two.stats().model == "b"


def test_when_switching_loses_both_models_the_node_is_told(make_engine, door):
    door.open.set()
    told = []
    ready = threading.Event()

    def on_fatal(error):
        told.append(error.code)
        ready.set()

    engine = make_engine(load=False, factory=door, on_fatal=on_fatal)
    door.free_bytes = 0
    engine.load("a").result(SOON)
    engine.start()
    door.failing = dict.fromkeys("ab", ModelError(ErrorCode.WEIGHTS_NOT_FOUND, "disk is gone"))
    with pytest.raises(ModelError):
        engine.load("b").result(SOON)
    assert ready.wait(SOON)
    assert told == [ErrorCode.WEIGHTS_NOT_FOUND]
    assert engine.state == EngineState.UNLOADED
    door.failing = {}
    engine.load("a").result(SOON)
    engine.start()


def test_after_a_switch_the_tasks_of_the_new_model_run(two, door, make_frame, results, script):
    two.set_standing_tasks([StandingTask("caption"), StandingTask("ocr")])
    assert [name for name, _ in two.stats().idle_tasks] == ["ocr"]
    reader = script("b")
    reader.tasks = frozenset({"ocr"})
    door.script = lambda name: reader
    two.load("b").result(SOON)
    assert [name for name, _ in two.stats().idle_tasks] == ["caption"]
    two.offer(make_frame())
    assert results.wait(1)[0].info.task == "ocr"


# -- a failing model ---------------------------------------------------------------------------


def test_models_that_fail_again_and_again_are_reported_once_and_paused(make_engine, backend, ask):
    told = []
    ready = threading.Event()

    def on_fatal(error):
        told.append(error.code)
        ready.set()

    engine = make_engine(on_fatal=on_fatal, queue_size=8)

    def fail(batch):
        raise MemoryError

    backend.before_run = fail
    codes = [code(engine.submit(ask(str(number)))) for number in range(3)]
    assert codes == [ErrorCode.OUT_OF_MEMORY] * 3
    assert ready.wait(SOON)
    assert told == [ErrorCode.OUT_OF_MEMORY]
    assert engine.state == EngineState.PAUSED
    assert engine._shared.meter.consecutive_failures == 3
    backend.before_run = lambda batch: None
    engine.load("script").result(SOON)
    engine.start()
    assert code(engine.submit(ask())) == ErrorCode.OK


def test_requests_behind_a_fatal_failure_are_answered(make_engine, backend, ask, monkeypatch):
    monkeypatch.setattr(model_thread, "FATAL_AFTER", 1)
    engine = make_engine()
    backend.hold()
    first = engine.submit(ask("first"))
    backend.wait_entered()
    second = engine.submit(ask("second", task="detect"))

    def fail(request):
        raise InferenceError(ErrorCode.INFERENCE_FAILED, "broken")

    backend.answer = fail
    backend.release()
    assert code(first) == ErrorCode.INFERENCE_FAILED
    assert code(second) == ErrorCode.NOT_ACTIVE


def test_a_success_between_failures_starts_the_count_anew(make_engine, backend, ask, monkeypatch):
    monkeypatch.setattr(model_thread, "FATAL_AFTER", 2)
    told = []
    engine = make_engine(on_fatal=told.append)
    good = backend.answer

    def fail(request):
        raise InferenceError(ErrorCode.INFERENCE_FAILED, "once")

    for _ in range(4):
        backend.answer = fail
        assert code(engine.submit(ask())) == ErrorCode.INFERENCE_FAILED
        backend.answer = good
        assert code(engine.submit(ask())) == ErrorCode.OK
    assert engine.drain(SOON)
    assert told == []


def test_bad_requests_are_not_the_models_fault(make_engine, backend, ask, monkeypatch):
    monkeypatch.setattr(model_thread, "FATAL_AFTER", 1)
    told = []
    engine = make_engine(on_fatal=told.append)
    assert code(engine.submit(ask(task="ocr"))) == ErrorCode.TASK_NOT_SUPPORTED
    assert engine.state == EngineState.RUNNING
    assert told == []


def test_after_out_of_memory_the_next_request_is_served(make_engine, backend, ask):
    engine = make_engine()
    failed = []

    def once(batch):
        if not failed:
            failed.append(1)
            raise MemoryError

    backend.before_run = once
    assert code(engine.submit(ask())) == ErrorCode.OUT_OF_MEMORY
    assert backend.caches_freed == 1
    assert code(engine.submit(ask())) == ErrorCode.OK


def test_a_defect_of_the_engine_itself_is_an_answer_and_not_the_end(
    make_engine, backend, ask, monkeypatch, caplog
):
    engine = make_engine()

    def broken(*args, **kwargs):
        raise AssertionError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr("librobot_vlm_ros.runtime.model_thread.run_batch", broken)
        assert code(engine.submit(ask())) == ErrorCode.INTERNAL
        assert engine.drain(SOON)
    assert "a defect" in caplog.text
    assert code(engine.submit(ask())) == ErrorCode.OK
    assert engine.stats().in_flight == 0


def test_memory_is_let_go_when_the_engine_is_stopped(make_frame, backend, results, clock):
    engine = Engine(lambda name, *, should_cancel, **kw: backend, on_result=results, clock=clock)
    engine.set_cameras([CameraConfig("front", timeout_s=0.0)])
    engine.load("script").result(SOON)
    engine.start()
    engine.set_standing_tasks([StandingTask("caption")])
    frame = make_frame()
    watched = weakref.ref(frame)
    engine.offer(frame)
    results.wait(1)
    assert engine.stop(SOON)
    del frame, engine
    results.all.clear()
    backend.batches.clear()
    gc.collect()
    assert watched() is None


def test_an_engine_needs_sensible_limits():
    with pytest.raises(VlmError, match="queue_size is 0"):
        EngineConfig(queue_size=0)
    with pytest.raises(VlmError, match="timeout_s is nan"):
        CameraConfig("front", timeout_s=float("nan"))
    with pytest.raises(VlmError, match="without a name"):
        CameraConfig("")
