"""Eight cameras, and eight questions, on a model to which a batch costs little more than one frame.

Throughput is counted in the model's own time, which the batches' sizes decide.
"""

from __future__ import annotations

import time

import pytest

from librobot_vlm_ros.runtime import StandingTask

SOON = 10.0
# A machine that is busy with other things may measure a batch wrong; then it is tried again.
ROUNDS = 60
LONG_S = 700.0
CAMERAS = tuple(f"camera{number}" for number in range(8))


def costs_s(frames: int) -> float:
    """Like a GPU's decoding: reading the weights is most of it, however many rows there are."""
    return 0.02 + 0.001 * frames


@pytest.fixture
def frames_per_s(backend):
    backend.before_run = lambda batch: time.sleep(costs_s(len(batch)))

    def tell(last):
        sizes = [len(batch) for batch in backend.batches[-last:]]
        return sum(sizes) / sum(costs_s(size) for size in sizes)

    return tell


def test_eight_cameras_together_give_four_times_the_frames_of_one(
    make_engine, make_frame, results, frames_per_s, backend, clock
):
    engine = make_engine(cameras=CAMERAS, max_frame_age_s=0.0)
    for number in range(ROUNDS):
        engine.set_standing_tasks([])  # so that all frames are there when it begins
        for camera in CAMERAS:
            engine.offer(make_frame(camera))
        engine.set_standing_tasks([StandingTask("caption")])
        results.wait(8 * (number + 1))
        clock.advance(LONG_S)
        if len(backend.batches[-1]) == 8:
            break
    assert frames_per_s(1) >= 4 / costs_s(1)
    assert {request.frame.camera for request in backend.batches[-1]} == set(CAMERAS)


def test_eight_questions_on_eight_frames_together_give_four_times_the_answers_of_one(
    make_engine, ask, frames_per_s, backend, clock
):
    engine = make_engine(queue_size=64)
    for _ in range(ROUNDS):
        backend.hold()
        backend.forget_entered()
        engine.submit(ask(task="caption"))  # so that all questions are there when it begins
        backend.wait_entered()
        futures = [engine.submit(ask(task="answer", prompt="what is it")) for _ in range(8)]
        backend.release()
        assert all(future.result(SOON).error is None for future in futures)
        clock.advance(LONG_S)
        if len(backend.batches[-1]) == 8:
            break
    assert frames_per_s(1) >= 4 / costs_s(1)


def test_questions_about_one_frame_go_together_from_the_first(
    make_engine, ask, make_frame, backend
):
    engine, frame = make_engine(), make_frame()
    backend.hold()
    engine.submit(ask(frame=frame))
    backend.wait_entered()
    futures = [
        engine.submit(ask(frame=frame, task="answer", prompt=f"question {number}"))
        for number in range(8)
    ]
    backend.release()
    assert all(future.result(SOON).error is None for future in futures)
    assert [len(batch) for batch in backend.batches] == [1, 8]
