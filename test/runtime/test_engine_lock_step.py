"""Lock-step: every frame, in order, twice the same."""

from __future__ import annotations

import numpy as np
import pytest

from librobot_vlm_ros.runtime import StandingTask

SOON = 10.0


def test_nothing_is_dropped_however_slow_the_model(make_engine, make_frame, results, clock):
    engine = make_engine(lock_step=True, max_frame_age_s=0.1)
    engine.set_standing_tasks([StandingTask("caption"), StandingTask("detect")])
    for _ in range(50):
        assert engine.offer(make_frame())
        clock.advance(1.0)
    assert engine.drain(SOON)
    stamps = [result.stamp_ns for result in results.all_results()]
    assert stamps == [number * 100_000_000 for number in range(1, 51) for _ in range(2)]
    stats = engine.stats()
    assert sum(stats.dropped.values()) == 0
    assert (stats.frames_received, stats.frames_processed) == (50, 50)


def test_two_replays_with_instructions_between_the_frames_are_identical(
    make_engine, make_frame, results, clock, backend
):
    def replay(pause_between):
        engine = make_engine(cameras=("a", "b"), lock_step=True)
        results.all.clear()
        for number in range(30):
            if number % 7 == 0:
                engine.set_standing_tasks(
                    [
                        StandingTask("caption", rate_hz=3.0),
                        StandingTask("ground", prompt=f"thing {number}", instruction_id=number),
                    ]
                )
            camera = "ab"[number % 2]
            pixels = np.full((2, 2, 3), number, np.uint8)
            engine.offer(
                make_frame(camera, stamp_ns=number * 50_000_000, pixels=pixels, sequence=number)
            )
            if pause_between and number % 3 == 0:
                engine.drain(SOON)
                clock.advance(0.7)
        assert engine.drain(SOON)
        engine.stop(SOON)
        return [
            (one.stamp_ns, one.info.camera, one.info.task, one.info.instruction_id, one.answer.text)
            for one in results.all_results()
        ]

    first, second = replay(pause_between=False), replay(pause_between=True)
    assert first == second
    assert {task for _, _, task, _, _ in first} == {"caption", "ground"}
    assert len([one for one in first if one[2] == "ground"]) == 30


@pytest.mark.parametrize("rate_hz", [0.0, 5.0])
def test_rates_count_stamps_not_seconds(make_engine, make_frame, results, rate_hz):
    engine = make_engine(lock_step=True)
    engine.set_standing_tasks([StandingTask("caption", rate_hz=rate_hz)])
    for _ in range(10):
        engine.offer(make_frame())
    assert engine.drain(SOON)
    assert len(results.all) == (10 if rate_hz == 0.0 else 5)
