"""A ROS domain of one's own, so that a demo neither sees nor disturbs other robots and runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from librobot_vlm_ros.core import EngineError, ErrorCode

#: Fast DDS makes port numbers from the domain; from 102 on they meet Linux's ephemeral ports. 0 is
#: what everyone else uses by default.
_DOMAINS = range(1, 102)
# These name other machines, whatever the discovery range is.
_LEAD_OUT = ("ROS_STATIC_PEERS", "ROS_DISCOVERY_SERVER")


@contextlib.contextmanager
def isolated_ros() -> Iterator[int]:
    """Sets ROS_DOMAIN_ID to one that no other run of ours holds and keeps traffic on this machine,
    for this process and its children. Gives the domain. Raises `EngineError` BUSY when all are
    taken.
    """
    with contextlib.ExitStack() as stack:
        domain = stack.enter_context(claimed_domain())
        ours = {"ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
        before = {name: os.environ.get(name) for name in (*ours, *_LEAD_OUT)}
        os.environ.update(ours)
        for name in _LEAD_OUT:
            os.environ.pop(name, None)
        try:
            yield domain
        finally:
            for name in before:
                os.environ.pop(name, None)
            os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def claimed_domain(folder: Path | None = None, domains: Sequence[int] = _DOMAINS) -> Iterator[int]:
    """A domain that no other process holds: the first of `domains` whose lock file in `folder` is
    free. Raises `EngineError` BUSY when all are held.

    The lock belongs to the open file: it ends with the process, whatever ends that. The search
    starts at the process id, so that parallel runs seldom try the same one.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"librobot_vlm_ros_domains_{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    first = os.getpid() % len(domains)
    for domain in [*domains[first:], *domains[:first]]:
        with open(folder / str(domain), "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            yield domain
            return
    raise EngineError(
        ErrorCode.BUSY,
        f"all {len(domains)} ROS domains are held by other runs",
        f"End some of them (the locks are in {folder}).",
    )
