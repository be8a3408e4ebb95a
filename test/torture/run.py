"""`python test/torture/run.py [--row NAME]... [--scale 1.0]`: build/torture/summary.json."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from rows import ROWS


def main() -> int:
    """Run the rows; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", action="append", choices=sorted(ROWS), help="only this one")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full run's cases")
    parser.add_argument("--out", type=Path, default=Path("build/torture"))
    words = parser.parse_args()
    summary = []
    words.out.mkdir(parents=True, exist_ok=True)
    for name in words.row or ROWS:
        started = time.monotonic()
        try:
            figures = ROWS[name](words.scale)
        except (Exception, SystemExit) as error:
            figures = {"cases": 1, "failures": 1, "error": f"{type(error).__name__}: {error}"}
        summary.append({"name": name, **figures, "took_s": round(time.monotonic() - started, 1)})
        print(json.dumps(summary[-1]), flush=True)
        (words.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return int(any(entry["failures"] for entry in summary))


if __name__ == "__main__":
    sys.exit(main())
