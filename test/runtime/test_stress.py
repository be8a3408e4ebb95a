"""Everything at once for a few seconds, on real time with the fake model: what must hold, holds."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from concurrent.futures import wait

import numpy as np
import pytest

from librobot_vlm_ros.core import ErrorCode, Frame, InferenceRequest, ModelError
from librobot_vlm_ros.models.fake import FakeVlm
from librobot_vlm_ros.runtime import (
    CameraConfig,
    Engine,
    EngineConfig,
    EngineState,
    StandingTask,
    model_thread,
)

CAMERAS = ("left", "right", "wrist")
SECONDS = 2.0
SOON = 20.0


def frame_of(engine, camera, number):
    return Frame(
        pixels=np.full((8, 8, 3), number % 256, np.uint8),
        camera=camera,
        stamp_ns=number,
        sequence=number,
        received_ns=engine.now_ns(),
        header=(camera, number),
    )


@contextlib.contextmanager
def closing(engine):
    """End the engine whatever the test says."""
    try:
        yield
    finally:
        engine.stop(SOON)


def play(engine, camera, ends, hz=30.0):
    """A camera that sends until told to stop."""
    number = 0
    while not ends.wait(1.0 / hz):
        number += 1
        engine.offer(frame_of(engine, camera, number))


@pytest.fixture
def run_threads():
    """Run functions of an event in threads of their own until the time is over."""

    def run(functions, seconds):
        ends = threading.Event()
        failures = []

        def guarded(function):
            try:
                function(ends)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(one,)) for one in functions]
        for thread in threads:
            thread.start()
        ends.wait(seconds)
        ends.set()
        for thread in threads:
            thread.join(SOON)
            assert not thread.is_alive(), "a caller of the engine hangs"
        assert failures == []

    return run


def test_three_cameras_share_a_slow_model_evenly_and_results_stay_fresh(run_threads):
    shares, ages = Counter(), []

    def on_result(result, frame):
        assert result.frame_header == frame.header
        assert result.info.age_s >= 0.0
        shares[result.info.camera] += 1
        ages.append(result.info.age_s)

    engine = Engine(
        lambda name, *, should_cancel, **kw: FakeVlm({"latency_s": 0.03}), on_result=on_result
    )
    with closing(engine):
        engine.set_cameras([CameraConfig(name) for name in CAMERAS])
        engine.set_standing_tasks([StandingTask("caption")])
        engine.load("fake").result(SOON)
        engine.start()
        run_threads([lambda ends, name=name: play(engine, name, ends) for name in CAMERAS], SECONDS)
        stats = engine.stats()
        assert engine.pause(SOON)
        after = sum(shares.values())
    assert sum(shares.values()) == after  # nothing came after the pause
    assert max(shares.values()) - min(shares.values()) <= 3
    assert stats.errors == {}
    # Never older than the limit when picked; inference comes on top.
    assert max(ages) < engine.config.max_frame_age_s + 1.0
    for camera in stats.cameras.values():
        # Every frame is processed, dropped with a reason, or the newest that still waits.
        assert camera.received - camera.processed - sum(camera.dropped.values()) in (0, 1)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm_of_callers_faults_and_transitions_leaves_every_request_answered(
    run_threads, seed, monkeypatch
):
    monkeypatch.setattr(model_thread, "FATAL_AFTER", 2)
    before = set(threading.enumerate())
    fatal = []
    futures = []
    queue_size = 4
    deepest = [0]
    free_bytes = [10**12]

    def factory(name, *, should_cancel, **options):
        if name == "broken":
            raise FileNotFoundError("no weights")
        settings = {"latency_s": 0.004, "fail_every": 5, "oom_every": 7, "raise_every": 11}
        backend = FakeVlm(settings, should_cancel=should_cancel)
        backend.free_memory = lambda: free_bytes[0]
        return backend

    engine = Engine(
        factory,
        config=EngineConfig(queue_size=queue_size),
        on_fatal=fatal.append,
    )

    def client(number):
        def ask(ends):
            dice = random.Random(f"{seed} client {number}")
            count = 0
            while not ends.wait(0.001):
                count += 1
                request_id = f"{number}-{count}"
                late = engine.now_ns() + dice.choice([0, 1, 5, 1000]) * 1_000_000
                future = engine.submit(
                    InferenceRequest(
                        request_id=request_id,
                        frame=frame_of(engine, "", count),
                        task=dice.choice(["caption", "detect", "embed"]),
                        deadline_ns=dice.choice([None, late]),
                    ),
                    on_token=dice.choice([None, lambda text: None, lambda text: 1 / 0]),
                )
                futures.append(future)
                deepest[0] = max(deepest[0], engine.stats().queue_depth)
                if dice.random() < 0.2:
                    engine.cancel(request_id)

        return ask

    def operator(ends):
        dice = random.Random(f"{seed} operator")
        while not ends.wait(0.02):
            action = dice.choice(["pause", "start", "start", "load", "tasks"])
            if action == "pause":
                assert engine.pause(SOON)
            elif action == "start":
                with contextlib.suppress(ModelError):  # nothing is loaded just now
                    engine.start()
            elif action == "load":
                free_bytes[0] = dice.choice([10**12, 0])
                engine.load(dice.choice(["fake", "broken"]))
                if dice.random() < 0.3:
                    engine.cancel_load()
            else:
                tasks = dice.sample(["caption", "detect", "embed"], dice.randint(0, 3))
                engine.set_standing_tasks([StandingTask(task) for task in tasks])

    engine.set_cameras([CameraConfig(name, timeout_s=0.05) for name in CAMERAS])
    engine.load("fake").result(SOON)
    engine.start()
    cameras = [lambda ends, name=name: play(engine, name, ends, 100.0) for name in CAMERAS]
    run_threads([*cameras, *(client(number) for number in range(3)), operator], SECONDS)
    while engine.state == EngineState.LOADING:  # what the operator asked for last
        time.sleep(0.01)
    # The last request is to be the new model's first: then none of its faults is due.
    engine.set_standing_tasks([])
    assert not wait(futures, SOON).not_done
    engine.load("fake").result(SOON)
    engine.start()
    last = InferenceRequest(request_id="last", frame=frame_of(engine, "", 0), task="caption")
    assert engine.submit(last).result(SOON).ok, "the engine did not get over it"
    assert engine.stop(SOON)
    codes = Counter()
    for future in futures:
        assert future.done(), "a request was left without an answer"
        codes[future.result().error_code] += 1
    assert len(futures) > 100
    assert set(codes) <= {
        int(one)
        for one in (
            ErrorCode.OK,
            ErrorCode.INFERENCE_FAILED,
            ErrorCode.OUT_OF_MEMORY,
            ErrorCode.INTERNAL,  # the fake raises a bare RuntimeError
            ErrorCode.BUSY,
            ErrorCode.CANCELLED,
            ErrorCode.DEADLINE_EXCEEDED,
            ErrorCode.NOT_ACTIVE,
        )
    }
    assert deepest[0] <= queue_size
    # Other rooms' tests run in this process too, and their libraries start threads when they like.
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in left if name.startswith("vlm-")]


def test_a_flood_is_answered_busy_at_once(run_threads):
    engine = Engine(
        lambda name, *, should_cancel, **kw: FakeVlm({"latency_s": 0.05}),
        config=EngineConfig(queue_size=4),
    )
    with closing(engine):
        engine.load("fake").result(SOON)
        engine.start()
        refused, waits = Counter(), []
        for number in range(2000):
            began = time.perf_counter()
            future = engine.submit(
                InferenceRequest(
                    request_id=str(number), frame=frame_of(engine, "", number), task="caption"
                )
            )
            if future.done() and not future.result().ok:
                waits.append(time.perf_counter() - began)
                refused[future.result().error.code] += 1
        assert set(refused) == {ErrorCode.BUSY}
        assert refused[ErrorCode.BUSY] > 1500
        assert sorted(waits)[len(waits) // 2] < 0.01
