"""The quick part of `make torture`: a few cases of rows that no other test covers, in one process.

Limits of time don't count here: the machine may be busy with other tests.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).with_name("run.py")
ROWS = [
    "malformed_images",
    "hostile_prompts",
    "broken_checkpoints",
    "lifecycle_storm",
    "service_flood",
    "clients_killed",
    "rogue_participant",
]

pytestmark = pytest.mark.ros


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("torture")
    words = [sys.executable, str(RUN), "--scale", "0.01", "--untimed", "--out", str(out)]
    for row in ROWS:
        words += ["--row", row]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert (out / "summary.json").is_file(), ended.stdout + ended.stderr
    return {entry["name"]: entry for entry in json.loads((out / "summary.json").read_text())}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_the_row_holds(row: str, summary: dict[str, dict[str, Any]]) -> None:
    entry = summary[row]
    assert entry["failures"] == 0, entry
    assert entry["cases"] > 0


def test_every_row_of_the_committed_results_is_one_of_the_suite() -> None:
    rows = set()
    for file in RUN.parent.glob("rows_*.py"):
        text = file.read_text(encoding="utf-8")
        rows |= set(re.findall(r"^@row\ndef (\w+)", text, re.MULTILINE))
    committed = json.loads((RUN.parents[2] / "docs" / "torture.json").read_text("utf-8"))
    assert {entry["name"] for entry in committed["rows"]} == rows
    assert all(entry["cases"] > 0 for entry in committed["rows"])
