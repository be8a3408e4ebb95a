"""`python test/torture/run.py [--row NAME]... [--scale 1.0]`: build/torture/summary.json.

The whole suite takes about 15 minutes. `--soak 3600` (or `8h`) gives the soak row that long.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import ROWS, Findings

# In the order of the table in docs/reliability.md.
for _name in (
    "rows_images",
    "rows_prompts",
    "rows_cameras",
    "rows_life",
    "rows_weights",
    "rows_clients",
    "rows_bags",
    "rows_soak",
    "rows_rogue",
):
    importlib.import_module(_name)

SOAK_S = 240.0


def seconds(text: str) -> float:
    """`3600`, `3600s`, `60m`, `8h` or `8 h` in seconds."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([smh]?)\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, expected such as 3600, 60m or 8h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def run(name: str, found: Findings) -> dict[str, object]:
    """One row's object for the summary; what it raises is a failure."""
    began = time.monotonic()
    try:
        ROWS[name](found)
    except (Exception, pytest.fail.Exception, SystemExit) as error:
        found.check(False, f"{type(error).__name__}: {error}")
    what = " ".join((ROWS[name].__doc__ or "").split())
    took_s, load = time.monotonic() - began, os.getloadavg()[0]
    entry = {"name": name, "what": what, **found.summary(), "took_s": round(took_s, 1)}
    if os.sched_getscheduler(0) != os.SCHED_OTHER:  # on a machine that is busy with other things
        entry["priority"] = "real-time"
    return {**entry, "machine_load": round(load, 1)}


def keep(entries: list[dict[str, object]], file: Path) -> None:
    """Put rows into the committed results, from which the table of docs/reliability.md is made."""
    kept = json.loads(file.read_text("utf-8"))["rows"] if file.is_file() else []
    rows = {entry["name"]: entry for entry in [*kept, *entries]}
    for entry in rows.values():
        entry.pop("failed", None)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    ordered = [rows[name] for name in ROWS if name in rows]
    found = {"machine": f"{machine}, Python {platform.python_version()}", "rows": ordered}
    file.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def main() -> int:
    """Run the rows; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", action="append", choices=sorted(ROWS), help="only this one")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full run's cases")
    parser.add_argument("--soak", type=seconds, default=None, help="time of the soak, such as 8h")
    parser.add_argument("--untimed", action="store_true", help="limits of time don't count")
    parser.add_argument("--keep", type=Path, help="also put the rows into docs/torture.json")
    parser.add_argument("--out", type=Path, default=Path("build/torture"))
    words = parser.parse_args()
    if words.soak and not words.row:
        words.row = ["soak"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait
    words.out.mkdir(parents=True, exist_ok=True)
    summary: list[dict[str, object]] = []
    for name in words.row or ROWS:
        soak_s = words.soak or max(20.0, SOAK_S * words.scale)
        found = Findings(words.scale, timed=not words.untimed, seconds=soak_s)
        summary.append(run(name, found))
        print(json.dumps(summary[-1]), flush=True)
        (words.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if words.keep:
        keep(summary, words.keep)
    failed = [entry["name"] for entry in summary if entry["failures"]]
    print(
        f"{len(summary) - len(failed)} of {len(summary)} rows hold"
        + f", not {failed}" * bool(failed)
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
