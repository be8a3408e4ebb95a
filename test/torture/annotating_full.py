"""Annotate onto a disk that fills up, then onto the same disk with space freed.

    python test/torture/annotating_full.py DISK SIZE KEPT -- words of annotate, out on DISK ...

The disk is a tmpfs that only this process and its children see, so that both runs are made here and
what is left at the end is copied to KEPT. Prints one JSON object; exit code 77 without the means.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from hardship import CANNOT, own_mounts, resized_disk, small_disk

_ENOUGH = "256m"


def _annotate(words: list[str]) -> dict[str, object]:
    ended = subprocess.run(
        [sys.executable, "-m", "librobot_vlm_ros.cli", "annotate", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300.0,
        check=False,
    )
    return {"code": ended.returncode, "errors": ended.stderr}


def main() -> int:
    """Both runs."""
    disk, size, kept, _, *words = sys.argv[1:]
    try:
        own_mounts()
        small_disk(disk, size)
    except OSError as error:
        print(f"no disk of its own: {error}", file=sys.stderr)
        return CANNOT
    full = _annotate(words)
    left = sorted(path.name for path in Path(disk).iterdir())
    resized_disk(disk, _ENOUGH)
    again = _annotate(words)
    shutil.copytree(disk, kept, dirs_exist_ok=True)
    print(json.dumps({"full": full, "left": left, "again": again}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
