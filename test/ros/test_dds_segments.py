"""Shared memory is given back: at an orderly end by the node, after a kill by the next one."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from librobot_vlm_ros.ros.dds import SHARED_MEMORY, clear_dead_segments


def make_segment(folder: Path, name: str, age_s: float = 60.0) -> Path:
    segment = folder / f"fastrtps_{name}"
    segment.write_bytes(b"x" * 1000)
    lock = folder / f"fastrtps_{name}_el"
    lock.touch()
    os.utime(lock, (time.time() - age_s, time.time() - age_s))
    return segment


def test_what_nobody_holds_is_removed_and_what_lives_or_is_new_stays(tmp_path: Path) -> None:
    dead = make_segment(tmp_path, "0123456789abcdef")
    new = make_segment(tmp_path, "1123456789abcdef", age_s=0.0)
    held = make_segment(tmp_path, "2123456789abcdef")
    without_lock = tmp_path / "fastrtps_3123456789abcdef"
    without_lock.touch()
    other = tmp_path / "fastrtps_port7410"
    other.touch()
    with open(tmp_path / f"{held.name}_el") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert clear_dead_segments(tmp_path) == 1000
    assert not dead.exists()
    assert not (tmp_path / f"{dead.name}_el").exists()
    assert all(path.exists() for path in (new, held, without_lock, other))
    assert clear_dead_segments(tmp_path) == 1000  # its owner has gone meanwhile
    assert not held.exists()


def test_a_machine_without_such_a_folder_is_no_error(tmp_path: Path) -> None:
    assert clear_dead_segments(tmp_path / "nowhere") == 0


def segments_of(pid: int) -> set[str]:
    """Segments that the process has a lock on, by the inodes of /proc/locks."""
    held = {
        int(line.split()[5].rpartition(":")[2])
        for line in Path("/proc/locks").read_text().splitlines()
        if "FLOCK" in line and line.split()[4] == str(pid)
    }
    return {
        path.name.removesuffix("_el")
        for path in SHARED_MEMORY.glob("fastrtps_*_el")
        if path.stat().st_ino in held and "port" not in path.name
    }


@pytest.mark.ros
def test_an_orderly_end_leaves_nothing_and_a_killed_node_is_cleaned_up_after(
    start_vlm: Callable[..., Any], wait_until: Callable[..., Any]
) -> None:
    first = start_vlm(autostart=True)
    first.wait_for_state("active")
    mine = segments_of(first.process.pid)
    if not mine:
        pytest.skip("this Fast DDS holds no locks on segments that /proc/locks shows")
    assert first.process.terminate() == 0
    assert not any((SHARED_MEMORY / name).exists() for name in mine)

    second = start_vlm(autostart=True)
    second.wait_for_state("active")
    left = segments_of(second.process.pid)
    second.process.kill_group()
    assert all((SHARED_MEMORY / name).exists() for name in left)
    for name in left:  # as if that had been a while ago
        os.utime(SHARED_MEMORY / f"{name}_el", (0, 0))
    third = start_vlm(autostart=True)
    third.wait_for_state("active")
    assert "shared memory that ended processes had left" in third.log()
    assert not any((SHARED_MEMORY / name).exists() for name in left)
