"""Recordings that are broken, and annotating that is broken off."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hardship import CANNOT
from suite import HERE, Findings, borrowed, row

from librobot_vlm_ros.core import BagError, ErrorCode

_TASKS = ["--tasks", "caption", "ground", "--model", "fake"]
#: Full while the journal is written, and while the bag is.
_DISKS = [("db3", "96k"), ("mcap", "200k"), ("db3", "64k"), ("db3", "400k"), ("mcap", "96k")]
_CUT = (ErrorCode.BAG_TRUNCATED, ErrorCode.BAG_UNREADABLE)


def _annotate(*words: object, limit: int | None = None) -> subprocess.Popen[str]:
    """The command as a process; `limit`: bytes a file may grow to, as on a disk that is full."""

    def full() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "librobot_vlm_ros.cli", "annotate", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=full,
    )


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300.0)
    return process.returncode, errors


def _partial(out: Path) -> Path:
    """Where the work is kept until it is complete."""
    return out.with_name(f"{out.name}.partial")


def _at_work(process: subprocess.Popen[str], out: Path) -> None:
    """Wait until the command has begun, or has ended."""
    while process.poll() is None and not _partial(out).exists():
        time.sleep(0.005)


@row
def bags_cut_off(found: Findings) -> None:
    """A bag cut off anywhere says so; salvaging gives a beginning of it and nothing else."""
    from rectangle_bag import write_rectangle_bag

    from librobot_vlm_ros.bags import BagReader

    def rows(path: Path, salvage: bool) -> list[Any]:
        with BagReader(path, salvage=salvage) as bag:
            return [(m.topic, m.stamp_ns, m.data) for m in bag.messages()]

    rng, salvaged = random.Random(3), 0
    with tempfile.TemporaryDirectory() as base:
        for storage in ("mcap", "db3"):
            whole_bag = Path(base) / storage
            write_rectangle_bag(whole_bag, 60, storage=storage, compress=False)
            whole = rows(whole_bag, False)
            for number in range(found.number(50, 3)):
                cut = Path(base) / f"{storage}-{number}"
                shutil.copytree(whole_bag, cut)
                file = next(item for item in cut.iterdir() if item.suffix in (".mcap", ".db3"))
                at = rng.randrange(file.stat().st_size)
                os.truncate(file, at)
                found.cases += 1
                try:
                    rows(cut, False)
                    found.check(False, f"{storage} cut at {at} was read as if it were whole")
                except BagError as error:
                    found.check(error.code in _CUT, f"{storage} cut at {at}: {error}")
                try:
                    kept = rows(cut, True)
                except BagError as error:
                    found.check(error.code in _CUT, f"{storage} cut at {at}: {error}")
                    continue
                salvaged += bool(kept)
                found.check(kept == whole[: len(kept)], f"{storage} cut at {at}: not a beginning")
    found.note(salvaged=salvaged)


@row
def bag_with_a_wrong_type(found: Findings) -> None:
    """A topic that carries something else is refused by name before any work."""
    from librobot_vlm_ros.bags import BagWriter

    with tempfile.TemporaryDirectory() as base:
        bag, out = Path(base) / "bag", Path(base) / "out"
        with BagWriter(bag) as writer:
            writer.add_topic("/camera/image_raw", "std_msgs/msg/String")
            writer.write("/camera/image_raw", 1, b"\x00\x01\x00\x00\x02\x00\x00\x00a\x00")
        words = [bag, out, *_TASKS, "--topics", "/camera/image_raw"]
        code, errors = _ended(_annotate(*words))
        found.cases += 1
        said = f"WRONG_TYPE({int(ErrorCode.WRONG_TYPE)})"
        found.check(code == 1 and said in errors, f"exit {code}: {errors[-300:]}")
        found.check("Traceback" not in errors and not out.exists(), "something was left")


def _on_a_full_disk(bag: Path, out: Path, size: str, *words: str) -> Any:
    """(exit code, errors) of annotating onto a disk of that size and of the same with space freed;
    the bag is `out` then. None where this machine allows no such disk.
    """
    disk = out.with_name(f"{out.name}-mount")
    disk.mkdir()
    script = [sys.executable, str(HERE / "annotating_full.py"), str(disk), size, f"{out}-kept"]
    command = [*script, "--", str(bag), str(disk / "out"), *_TASKS, *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300.0, check=False)
    if ended.returncode == CANNOT:
        return None
    told = json.loads(ended.stdout)
    if told["left"] != ["out.partial"]:
        told["full"]["errors"] += f" left: {told['left']}"
        told["full"]["code"] = -1
    Path(f"{out}-kept/out").rename(out)
    return [(told[run]["code"], told[run]["errors"]) for run in ("full", "again")]


def _check_full(found: Findings, what: str, full: tuple[int, str], again: tuple[int, str]) -> None:
    """What a run that is out of disk says, and that the same command goes on."""
    code, errors = full
    found.cases += 1
    said = f"DISK_FULL({int(ErrorCode.DISK_FULL)})"
    found.check(code == 1 and said in errors, f"{what}: exit {code}: {errors!a}")
    found.check("Traceback" not in errors, f"{what}: a traceback")
    code, errors = again
    found.check(code == 0, f"after {what}: exit {code}: {errors[-300:]}")


@row
def annotating_broken_off(found: Findings) -> None:
    """Killed at any time, or out of disk (full, or limited): resuming loses and doubles nothing."""
    from rectangle_bag import write_rectangle_bag

    contents = borrowed("annotate/test_annotate.py").contents
    rng = random.Random(5)
    with tempfile.TemporaryDirectory() as base:
        bag, whole = Path(base) / "bag", Path(base) / "whole"
        write_rectangle_bag(bag, 60)
        process = _annotate(bag, whole, *_TASKS)
        _at_work(process, whole)
        began = time.monotonic()
        code, errors = _ended(process)
        took_s = time.monotonic() - began
        found.check(code == 0, f"the run that nothing breaks off: exit {code}: {errors[-300:]}")
        wanted, kills, resumed = contents(whole), 0, 0
        for number in range(found.number(10, 1)):
            out = Path(base) / f"out{number}"
            for share in sorted(rng.random() for _ in range(3)):
                process = _annotate(bag, out, *_TASKS)
                _at_work(process, out)
                time.sleep(0.8 * share * took_s)
                process.send_signal(signal.SIGKILL)
                code, _ = _ended(process)
                kills += code == -signal.SIGKILL
                resumed += _partial(out).exists()
            if not out.exists():
                code, errors = _ended(_annotate(bag, out, *_TASKS))
                found.check(code == 0, f"resuming {number}: exit {code}: {errors[-300:]}")
            found.cases += 1
            found.check(contents(out) == wanted, f"{number}: something is lost or doubled")
        for limit in [40_000, 75_000, 120_000, 300_000][: found.number(4, 1)]:
            out = Path(base) / f"limit{limit}"
            words = [bag, out, *_TASKS, "--storage", "db3"]
            code, errors = _ended(_annotate(*words, limit=limit))
            found.check(not out.exists(), f"full at {limit}: a half bag")
            again = _ended(_annotate(*words))
            _check_full(found, f"limit of {limit} bytes", (code, errors), again)
            same = sorted(map(str, contents(out))) == sorted(map(str, wanted))
            found.check(same, f"full at {limit}: something is lost or doubled")
        real = 0
        for storage, size in _DISKS[: found.number(len(_DISKS), 1)]:
            out = Path(base) / f"disk-{storage}-{size}"
            ends = _on_a_full_disk(bag, out, size, "--storage", storage)
            if ends is None:
                found.note(not_possible_here=["a full disk"])
                break
            real += 1
            _check_full(found, f"disk of {size} ({storage})", *ends)
            same = sorted(map(str, contents(out))) == sorted(map(str, wanted))
            found.check(same, f"disk of {size}: something is lost or doubled")
    found.note(kills=kills, resumed=resumed, full_disks=real)
