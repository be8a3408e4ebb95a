"""The figures of node-check, and that it can fail."""

from __future__ import annotations

import math
from typing import Any

from librobot_vlm_ros.cli.node_check_report import Answer, Ask, limits, misses, summary
from librobot_vlm_ros.runtime.stats import percentile


def figures_of(answers: list[Answer], **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "names": ["a", "b"],
        "sent": 4,
        "received": {"a": 2, "b": 2},
        "cpu_share": 0.25,
        "percentile": percentile,
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
