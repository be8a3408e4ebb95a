"""The node under the load of a robot, measured: cameras at full rate, the fake model, queries.

`make node-check` runs it. Node and cameras are processes of their own on a ROS domain of their own,
over real DDS with the profile that ships; figures and the limits they are held to go to
`summary.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from librobot_vlm_ros.bench.node_check.report import (
    SLOWER,
    Answer,
    Ask,
    limits,
    misses,
    single_limits,
    single_summary,
    summary,
)
from librobot_vlm_ros.bench.node_check.robot import (
    NODE,
    Robot,
    camera_process,
    images_sent,
    start_sending,
)
from librobot_vlm_ros.cli.arguments import positive
from librobot_vlm_ros.client.node_process import NodeProcess
from librobot_vlm_ros.client.ros_domain import isolated_ros
from librobot_vlm_ros.client.session import Session

_START_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the figures; 1 when one is outside its limit."""
    parser = argparse.ArgumentParser(prog="node-check", description=__doc__)
    number = partial(parser.add_argument, type=positive)
    number("--seconds", default=60.0, help="default 60")
    parser.add_argument("--cameras", type=int, default=3, choices=range(1, 9), help="default 3")
    number("--rate", dest="rate_hz", default=30.0, help="of a camera [Hz], default 30")
    number("--latency", dest="latency_s", default=0.05, help="of the model [s]")
    number("--query-period", dest="query_period_s", default=0.5, help="[s], default 0.5")
    single = "of the runs with one camera [s], default 10"
    number("--single", dest="single_s", type=float, default=10.0, help=single)
    parser.add_argument("--reliable", action="store_true", help="cameras publish as reliable")
    parser.add_argument("--out", type=Path, default=Path("build/node"), help="folder")
    figures = check(**vars(parser.parse_args(argv)))
    print(json.dumps(figures, indent=2))
    for miss in figures["misses"]:
        print(f"node-check: {miss}", file=sys.stderr)
    return 1 if figures["misses"] else 0


def check(
    out: Path,
    *,
    seconds: float = 60.0,
    cameras: int = 3,
    rate_hz: float = 30.0,
    latency_s: float = 0.05,
    query_period_s: float = 0.5,
    reliable: bool = False,
    single_s: float = 10.0,
) -> dict[str, Any]:
    """Run once; the figures, which are also written to `out`/summary.json.

    After the run with all cameras, two of `single_s` seconds with one camera (0 leaves them out):
    of a model that takes no time, for the node's own overhead, and of one that takes five periods
    of the camera. Raises `VlmError` when node or cameras cannot be started.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = [f"camera{number}" for number in range(1, cameras + 1)]
    answers, asks, counts = _measure(
        out / "node.log", names, seconds, rate_hz, latency_s, query_period_s, reliable
    )
    figures = summary(answers, asks, names=names, **counts)
    figures["seconds"] = seconds
    figures["limits"] = limits(latency_s, rate_hz)
    if single_s:
        slow_s = SLOWER / rate_hz
        single = partial(
            _measure, names=names[:1], seconds=single_s, rate_hz=rate_hz, query_period_s=0.0,
            reliable=reliable, counted=False,
        )  # fmt: skip
        idle, *_ = single(out / "node-overhead.log", latency_s=0.0)
        slow, *_ = single(out / "node-slow.log", latency_s=slow_s)
        figures |= single_summary(idle, slow, slow_s)
        figures["limits"] |= single_limits(slow_s, rate_hz)
    figures["misses"] = misses(figures, figures["limits"])
    (out / "summary.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def _measure(
    log: Path,
    names: Sequence[str],
    seconds: float,
    rate_hz: float,
    latency_s: float,
    query_period_s: float,
    reliable: bool,
    counted: bool = True,
) -> tuple[list[Answer], list[Ask], dict[str, Any]]:
    """One node from its start to its end: results, queries, and what `summary` takes besides.

    `counted`: whether to wait for the node's own count of frames at the end.
    """
    arguments = [
        "model:=fake",
        f"model_config:={json.dumps({'latency_s': latency_s})}",
        f"cameras:=[{', '.join(f'{name}=/{name}/image_raw' for name in names)}]",
        "tasks:=[caption]",
        "autostart:=true",
        "camera_timeout_s:=30.0",  # between the parts of the run the cameras pause
    ]
    with ExitStack() as stack:
        stack.enter_context(isolated_ros())
        process = stack.enter_context(NodeProcess(arguments, log))
        running = [
            stack.enter_context(camera_process(f"/{name}/image_raw", rate_hz, reliable))
            for name in names
        ]
        session = stack.enter_context(Session("node_check"))
        process.wait_until_active(session, NODE, _START_S)
        robot = Robot(session, names)
        robot.find(_START_S, running)
        before, cpu_before = robot.received(), _cpu_s(process.pid)
        started = time.monotonic()
        answers_from = len(robot.answers)
        for camera in running:
            start_sending(camera, seconds)
        asks = robot.ask(started + seconds, query_period_s)
        wall_s = time.monotonic() - started
        cpu_s = _cpu_s(process.pid) - cpu_before
        sent = sum(images_sent(camera) for camera in running)
        if counted:
            robot.settle()
        received = {name: count - before[name] for name, count in robot.received().items()}
        process.check()
    counts = {"sent": sent, "received": received, "cpu_share": cpu_s / wall_s}
    return robot.answers[answers_from:], asks, counts


def _cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
