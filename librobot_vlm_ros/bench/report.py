"""What was measured, as JSON, as a table to read and as a plot."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from librobot_vlm_ros.bench.measure import Measurement
from librobot_vlm_ros.console import table as in_columns


def machine(device: str) -> dict[str, Any]:
    """What it was measured on, and when (UTC)."""
    import torch
    import transformers

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return found


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write(out: Path, rows: Sequence[Measurement], device: str, failures: Sequence[str]) -> None:
    """summary.json, table.txt and plot.svg in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    summary = {
        "machine": machine(device),
        "failures": list(failures),
        "measurements": [row.as_json() for row in rows],
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    (out / "summary.json").write_text(text, encoding="utf-8")
    (out / "table.txt").write_text(table(rows), encoding="utf-8")
    (out / "plot.svg").write_text(plot(rows), encoding="utf-8")


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _sign(row: Measurement) -> str:
    if row.target is None:
        return ""
    return f"{'≤' if row.share else '≥'} {row.target:g}"


def table(rows: Sequence[Measurement]) -> str:
    """The rows in columns."""
    header = ("measurement", "baseline", "ours", "", "ratio", "from", "to", "aimed at", "tokens")
    tokens = {None: "", True: "same", False: "DIFFER"}
    cells = [
        (
            row.name,
            _number(row.baseline),
            _number(row.ours),
            row.unit,
            f"{row.ratio:.2f}",
            f"{row.ratio_min:.2f}",
            f"{row.ratio_max:.2f}",
            _sign(row) + ("" if row.met else " MISSED"),
            tokens[row.identical_tokens],
        )
        for row in rows
    ]
    lines = [in_columns(cells, header=header, right="lrrlrrrrr")]
    lines += ["", "ratio: baseline / ours; of rows aimed at with ≤ it is ours / baseline"]
    return "\n".join(lines) + "\n"


def markdown(summary: Mapping[str, Any]) -> str:
    """The table of docs/performance.md. Of a CPU only ratios: its seconds mean little."""
    about = summary["machine"]
    where = about.get("gpu") or (
        f"{about['cpu']}, {about['threads']} of {about['cores']} cores at a load of {about['load']}"
    )
    lines = [
        f"`make bench` on {about['date']}: {where}, torch {about['torch']}, "
        f"transformers {about['transformers']}. Medians over pairs of runs, and their spread.",
        "",
        "| measured | ratio | from | to | aimed at | same tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in summary["measurements"]:
        row = Measurement(**found)
        tokens = {None: "", True: "yes", False: "no"}[row.identical_tokens]
        kind = "of the baseline" if row.share else "×"
        lines.append(
            f"| {row.name}: {row.note} | {row.ratio:.2f} {kind} | {row.ratio_min:.2f} | "
            f"{row.ratio_max:.2f} | {_sign(row)} | {tokens} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Measurement]) -> str:
    """How many times faster, a bar a row with its spread; shares of a baseline have none."""
    shown = [row for row in rows if not row.share]
    top = max((row.ratio_max for row in shown), default=1.0) or 1.0
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("plot.svg.jinja").render(rows=shown, top=top) + "\n"
