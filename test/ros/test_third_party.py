"""Warnings where Python is told to make errors of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, warnings
from librobot_vlm_ros.ros.third_party import let_libraries_warn
let_libraries_warn()
warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=sys.argv[1])
print("went on")
"""


@pytest.mark.parametrize(
    ("module", "action", "goes_on"),
    [
        ("lark.utils", "error", True),
        ("librobot_vlm_ros.ros.node", "error", False),
        ("librobot_vlm_ros_of_others", "error", True),
        ("__main__", "error", False),
        ("librobot_vlm_ros.ros.node", "ignore", True),
    ],
)
def test_only_our_own_stay_errors(module: str, action: str, goes_on: bool) -> None:
    words = [sys.executable, "-W", action, "-c", SCRIPT, module]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60.0)
    assert (done.stdout == "went on\n") == goes_on, done.stderr
    assert ("DeprecationWarning: old" in done.stderr) == (action == "error")
