"""The node under the load of a robot, measured: cameras at full rate, the fake model, queries.

`make node-check` runs it. Node and cameras are processes of their own on a ROS domain of their own,
over real DDS with the profile that ships; figures and the limits they are held to go to
`summary.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import EngineError, ErrorCode
from librobot_vlm_ros.runtime.stats import percentile

from .argument_types import positive
from .isolation import isolated_ros
from .node_check_report import Answer, Ask, limits, misses, summary
from .node_process import NodeProcess
from .spinning import Session

__all__ = ["check", "main"]

_NODE = "/vlm"
_START_S = 60.0
_WARM_UP_S = 2.0
_SETTLE_S = 2.5  # diagnostics come once a second


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the figures; 1 when one is outside its limit."""
    parser = argparse.ArgumentParser(prog="node-check", description=__doc__)
    parser.add_argument("--seconds", type=positive, default=60.0, help="default 60")
    parser.add_argument("--cameras", type=int, default=3, choices=range(1, 9), help="default 3")
    parser.add_argument("--rate", type=positive, default=30.0, help="of a camera [Hz], default 30")
    parser.add_argument("--latency", type=positive, default=0.05, help="of the model [s]")
    parser.add_argument("--query-period", type=positive, default=0.5, help="[s], default 0.5")
    parser.add_argument("--reliable", action="store_true", help="cameras publish as reliable")
    parser.add_argument("--out", type=Path, default=Path("build/node"), help="folder")
    args = parser.parse_args(argv)
    figures = check(
        args.out,
        seconds=args.seconds,
        cameras=args.cameras,
        rate_hz=args.rate,
        latency_s=args.latency,
        query_period_s=args.query_period,
        reliable=args.reliable,
    )
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
) -> dict[str, Any]:
    """Run once; the figures, which are also written to `out`/summary.json.

    Raises `VlmError` when node or cameras cannot be started.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = [f"camera{number}" for number in range(1, cameras + 1)]
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
        process = stack.enter_context(NodeProcess(arguments, out / "node.log"))
        running = [
            stack.enter_context(_camera(f"/{name}/image_raw", rate_hz, reliable)) for name in names
        ]
        session = stack.enter_context(Session("node_check"))
        process.wait_until_active(session, _NODE, _START_S)
        robot = _Robot(session, names)
        robot.find(_START_S, running)
        before, cpu_before = robot.received(), _cpu_s(process.pid)
        started = time.monotonic()
        answers_from = len(robot.answers)
        for camera in running:
            _say(camera, seconds)
        asks = robot.ask(started + seconds, query_period_s)
        wall_s = time.monotonic() - started
        cpu_s = _cpu_s(process.pid) - cpu_before
        sent = sum(_said(camera) for camera in running)
        robot.settle()
        received = {name: count - before[name] for name, count in robot.received().items()}
        process.check()
    figures = summary(
        robot.answers[answers_from:],
        asks,
        names=names,
        sent=sent,
        received=received,
        cpu_share=cpu_s / wall_s,
        percentile=percentile,
    )
    figures["seconds"] = seconds
    figures["limits"] = limits(latency_s, rate_hz)
    figures["misses"] = misses(figures, figures["limits"])
    (out / "summary.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


class _Robot:
    """What listens to the node and asks it."""

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        from diagnostic_msgs.msg import DiagnosticArray

        from librobot_vlm_ros.msg import Caption
        from librobot_vlm_ros.srv import Query

        self.answers: list[Answer] = []
        self._session = session
        self._names = list(names)
        self._received: dict[str, int] = {}
        self._reports = 0
        node = session.node
        self._caption = node.create_subscription(
            Caption, f"{_NODE}/caption", lambda message: self.answers.append(_answer(message)), 100
        )
        self._diagnostics = node.create_subscription(
            DiagnosticArray, "/diagnostics", self._on_diagnostics, 10
        )
        self._query = node.create_client(Query, f"{_NODE}/query")

    def find(self, timeout_s: float, cameras: Sequence[subprocess.Popen[str]]) -> None:
        """Let the cameras send until the node answers each: only then has all found each other."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            self.answers.clear()
            for camera in cameras:
                _say(camera, _WARM_UP_S)
            self._session.spin_until(lambda: False, time.monotonic() + _WARM_UP_S)
            for camera in cameras:
                _said(camera)
            self.settle()
            heard = {answer.camera for answer in self.answers}
            if heard == set(self._names) and set(self._received) == heard:
                return
        raise EngineError(
            ErrorCode.DEADLINE_EXCEEDED,
            f"only {sorted({answer.camera for answer in self.answers})} of {self._names} were "
            f"answered within {timeout_s:g} s",
            "See node.log beside the summary.",
        )

    def settle(self) -> None:
        """Wait for diagnostics that were made after all frames were in."""
        seen = self._reports
        self._session.spin_until(lambda: False, time.monotonic() + _SETTLE_S)
        self._session.spin_until(lambda: self._reports >= seen + 2, time.monotonic() + 15.0)

    def received(self) -> dict[str, int]:
        """Frames that the node has counted so far, by camera."""
        return dict(self._received)

    def ask(self, until_s: float, period_s: float) -> list[Ask]:
        """Query the cameras in turn until then."""
        from librobot_vlm_ros.srv import Query

        asks: list[Ask] = []
        due_s = time.monotonic() + period_s
        while due_s < until_s:
            self._session.spin_until(lambda: False, due_s)
            camera = self._names[len(asks) % len(self._names)]
            asked_s = time.monotonic()
            answer = self._session.call(
                self._query, Query.Request(task="detect", camera=camera), 30
            )
            asks.append(Ask(time.monotonic() - asked_s, int(answer.error_code)))
            due_s += period_s
        self._session.spin_until(lambda: False, until_s)
        return asks

    def _on_diagnostics(self, message: Any) -> None:
        for status in message.status:
            name = status.name.rpartition("camera ")[2]
            values = {item.key: item.value for item in status.values}
            if name in self._names and "received" in values:
                self._received[name] = int(values["received"])
        self._reports += 1


def _answer(message: Any) -> Answer:
    now_ns = time.monotonic_ns()
    stamp = message.header.stamp
    stamp_ns = int(stamp.sec) * 10**9 + int(stamp.nanosec)
    return Answer(
        camera=message.info.camera,
        stamp_ns=stamp_ns,
        age_s=float(message.info.age_s),
        end_to_end_s=(now_ns - stamp_ns) * 1e-9,
        error_code=int(message.error_code),
    )


@contextmanager
def _camera(topic: str, rate_hz: float, reliable: bool) -> Iterator[subprocess.Popen[str]]:
    words = [topic, str(rate_hz), "reliable" if reliable else "best_effort"]
    # Its complaints are shown only when something is wrong: a pipe that nobody reads could fill up.
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", "librobot_vlm_ros.cli.node_check_camera", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def _say(camera: subprocess.Popen[str], seconds: float) -> None:
    assert camera.stdin is not None
    camera.stdin.write(f"{seconds}\n")
    camera.stdin.flush()


def _said(camera: subprocess.Popen[str]) -> int:
    assert camera.stdout is not None
    line = camera.stdout.readline()
    if not line:
        raise EngineError(ErrorCode.INTERNAL, "a camera of the check has ended before its time")
    return int(line)


def _cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
