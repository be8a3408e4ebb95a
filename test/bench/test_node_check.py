"""A few seconds of `make node-check`: node and three cameras, processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from librobot_vlm_ros.bench.node_check.__main__ import check

pytestmark = pytest.mark.ros


def test_a_short_run_gives_all_figures(tmp_path: Path) -> None:
    figures = check(tmp_path / "node", seconds=4.0, rate_hz=15.0, single_s=2.0)
    assert json.loads((tmp_path / "node" / "summary.json").read_text()) == figures
    assert figures["frames_sent"] == 180
    # A machine busy with other things may lose some; more would be a fault of ours.
    assert 0 <= figures["lost_frames"] <= 18
    assert figures["frames_in"] == figures["frames_sent"] - figures["lost_frames"]
    assert figures["results"] >= 12
    assert (figures["stale_results"], figures["result_errors"]) == (0, 0)
    assert 0.05 <= figures["age_p50_s"] <= figures["age_p99_s"] < 20.0
    assert 1.0 <= figures["per_camera_share"] < 3.0
    assert figures["queries"] >= 1
    assert figures["query_errors"] == 0
    assert figures["cpu_share"] > 0
    assert figures["overhead_results"] >= 20
    assert 0 < figures["overhead_p50_s"] <= figures["overhead_p99_s"] < 5.0
    assert figures["slow_model_s"] == pytest.approx(1 / 3, abs=1e-5)
    assert 1 / 3 <= figures["slow_age_p50_s"] <= figures["slow_age_p99_s"] < 20.0
