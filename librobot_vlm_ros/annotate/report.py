"""What a run of `annotate` tells when it is through: in words, and as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from librobot_vlm_ros.annotate.job import Job
from librobot_vlm_ros.annotate.journal import Journal
from librobot_vlm_ros.bags import BagReader
from librobot_vlm_ros.console import Console
from librobot_vlm_ros.core import ErrorCode

__all__ = ["SHOWN", "Run", "model_of", "summarise"]

#: Single faults shown in words; all are counted.
SHOWN = 5


@dataclasses.dataclass
class Run:
    """What a run knows by the time it ends."""

    args: argparse.Namespace
    console: Console
    job: Job
    out: Path
    results: dict[str, str]
    began_s: float = dataclasses.field(default_factory=time.monotonic)
    model: Any = None
    resumed: int = 0
    total: int = 0
    model_s: float = 0.0


def model_of(run: Run) -> dict[str, str]:
    """Which model answered, as far as this run knows."""
    if run.model is None:  # all frames were done before
        return {"name": run.job.values["model"]}
    names = ("revision", "device", "dtype")
    return {"name": run.model.model, **{name: getattr(run.model, name) for name in names}}


def summarise(
    run: Run,
    journal: Journal,
    topics: dict[str, int],
    left_out: dict[str, str],
    readers: Sequence[BagReader],
) -> int:
    """Show counts and faults; the exit code, 1 when no frame got an answer."""
    results, bad = journal.counts()
    good = results.pop(0, 0)
    failed = sum(results.values())
    bad_count = sum(bad.values())
    seconds = time.monotonic() - run.began_s
    console = run.console
    for topic, reason in left_out.items():
        console.warn(f"{topic} is not in {run.out}: {reason}")
    for topic, stamp_ns, text in journal.bad_frames(SHOWN):
        console.warn(f"bad frame on {topic} at {stamp_ns}: {text}")
    if bad_count > SHOWN:
        console.warn(f"{bad_count} bad frames in all")
    if failed:
        codes = ", ".join(f"{ErrorCode(code).name} {n}" for code, n in sorted(results.items()))
        console.warn(f"{failed} results are errors: {codes}")
    rows = [(name, str(number)) for name, number in sorted(topics.items())]
    console.table(rows, header=("topic", "messages"), right="lr")
    console.line(
        f"{run.total} frames ({bad_count} bad), {good + failed} results, {seconds:.1f} s: {run.out}"
    )
    if run.args.json:
        summary = {
            "out": str(run.out),
            "bags": [str(path) for path in run.job.bags],
            "model": model_of(run),
            "frames": run.total,
            "resumed_frames": run.resumed,
            "bad_frames": bad_count,
            "bad_frames_by_code": {ErrorCode(code).name: n for code, n in sorted(bad.items())},
            "results": good + failed,
            "failed_results": failed,
            "failed_results_by_code": {
                ErrorCode(code).name: n for code, n in sorted(results.items())
            },
            "topics": topics,
            "left_out": left_out,
            "lost": {str(reader.path): reader.lost for reader in readers if reader.lost},
            "model_s": round(run.model_s, 3),
            "seconds": round(seconds, 3),
        }
        print(json.dumps(summary, indent=2))
    return 1 if run.total and not good else 0
