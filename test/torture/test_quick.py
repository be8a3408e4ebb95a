"""The quick part of `make torture`: a few cases of each row that holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


@pytest.mark.parametrize(
    "row",
    [
        "malformed_images",
        "hostile_prompts",
        "broken_checkpoints",
        pytest.param("out_of_memory", marks=pytest.mark.ros),
        pytest.param("lifecycle_storm", marks=pytest.mark.ros),
        pytest.param("signals", marks=pytest.mark.ros),
    ],
)
def test_the_row_holds(row: str, tmp_path: Path) -> None:
    words = [sys.executable, str(RUN), "--row", row, "--scale", "0.05", "--out", str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (summary,) = json.loads((tmp_path / "summary.json").read_text())
    assert summary["name"] == row
    assert summary["cases"] > 0
