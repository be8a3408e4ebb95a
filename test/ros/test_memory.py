"""Cleaning up gives the memory of a real model back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.ros,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
]

#: The weights of the shipped model in float32 take 34 MB: a copy left behind would be seen.
_SLACK_MB = 20.0


def resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def test_cleanup_goes_back_to_the_baseline_round_after_round(
    start_vlm: Callable[..., Any], make_camera: Callable[..., Any]
) -> None:
    from librobot_vlm_ros.msg import GroundingArray

    vlm = start_vlm(model="florence-2-tabletop", image_topic="/memory/image", tasks=["detect"])
    camera = make_camera("/memory/image")
    results = vlm.listen(GroundingArray, "grounding")
    after = []
    for _ in range(3):
        assert vlm.change_state("configure", 60.0), vlm.log()
        assert vlm.change_state("activate"), vlm.log()
        camera.warm_up(results, vlm.wait_for)
        assert vlm.change_state("deactivate"), vlm.log()
        assert vlm.change_state("cleanup"), vlm.log()
        after.append(resident_mb(vlm.process.pid))
    # The first round brings torch and transformers in, which stay: it is the baseline.
    assert max(after[1:]) <= after[0] + _SLACK_MB, after
