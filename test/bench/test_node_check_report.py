"""The figures of node-check, and that it can fail."""

from __future__ import annotations

import math
from typing import Any

from librobot_vlm_ros.bench.node_check.report import (
    Answer,
    Ask,
    limits,
    misses,
    single_limits,
    single_summary,
    summary,
)


def figures_of(answers: list[Answer], **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "names": ["a", "b"],
        "sent": 4,
        "received": {"a": 2, "b": 2},
        "cpu_share": 0.25,
    }
    return summary(answers, [Ask(0.1)], **{**values, **changes})


GOOD = [Answer(camera, stamp, 0.08, 0.09) for stamp in (1, 2) for camera in ("a", "b")]
LIMITS = limits(0.05, 30.0)


def test_a_good_run_is_within_all_limits() -> None:
    figures = figures_of(GOOD)
    assert misses(figures, LIMITS) == []
    assert (figures["frames_in"], figures["lost_frames"], figures["results"]) == (4, 0, 4)
    assert (figures["per_camera_share"], figures["stale_results"]) == (1.0, 0)
    assert math.isclose(LIMITS["age_p99_s"], 2 * 0.05 + 1 / 30 + 0.02)


def test_each_fault_is_named() -> None:
    late = [*GOOD, Answer("a", 3, 0.2, 0.2)]
    again = [*GOOD, Answer("a", 2, 0.08, 0.09)]
    backwards = [*GOOD, Answer("b", 1, 0.08, 0.09)]
    failed = [*GOOD[:-1], Answer("b", 2, 0.08, 0.09, error_code=400)]
    for answers, changes, wrong in [
        (GOOD, {"received": {"a": 2, "b": 1}}, "lost_frames"),
        (late, {}, "age_p99_s"),
        (again, {}, "stale_results"),
        (backwards, {}, "stale_results"),
        (failed, {}, "result_errors"),
        (GOOD[:3], {}, "per_camera_share"),
        (GOOD[::2], {}, "per_camera_share"),  # nothing at all of one camera
        ([], {}, "age_p99_s"),
    ]:
        found = misses(figures_of(answers, **changes), LIMITS)
        assert any(miss.startswith(wrong) for miss in found), (wrong, found)


def single(model_s: float, ages: list[float]) -> list[Answer]:
    return [Answer("front", place, age, age, model_s=model_s) for place, age in enumerate(ages)]


def test_overhead_is_the_age_less_the_time_of_the_model() -> None:
    idle = single(0.5, [0.501, 0.502, 0.51])
    figures = single_summary(idle, single(0.2, [0.3, 0.25]), 0.2)
    assert (figures["overhead_p50_s"], figures["overhead_p99_s"]) == (0.002, 0.01)
    assert (figures["slow_age_p50_s"], figures["slow_age_p99_s"]) == (0.25, 0.3)
    assert (figures["overhead_results"], figures["slow_results"]) == (3, 2)
    assert misses(figures, single_limits(0.2, 10.0)) == []


def test_overhead_and_age_behind_a_slow_model_are_held_to_limits() -> None:
    figures = single_summary(single(0.0, [0.0021]), single(0.2, [0.51]), 0.2)
    found = misses(figures, single_limits(0.2, 10.0))
    assert [text.split()[0] for text in found] == ["overhead_p50_s", "slow_age_p99_s"]


def test_no_results_are_a_miss() -> None:
    figures = single_summary([], [], 0.2)
    assert len(misses(figures, single_limits(0.2, 10.0))) == 2
