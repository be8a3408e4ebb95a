"""The robot around the node of `node_check`: its cameras, and who hears the results and asks."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from librobot_vlm_ros.bench.node_check.report import Answer, Ask
from librobot_vlm_ros.client.session import Session
from librobot_vlm_ros.core import EngineError, ErrorCode

NODE = "/vlm"
_WARM_UP_S = 2.0
_SETTLE_S = 2.5  # diagnostics come once a second


class Robot:
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
            Caption, f"{NODE}/caption", lambda message: self.answers.append(_answer(message)), 100
        )
        self._diagnostics = node.create_subscription(
            DiagnosticArray, "/diagnostics", self._on_diagnostics, 10
        )
        self._query = node.create_client(Query, f"{NODE}/query")

    def find(self, timeout_s: float, cameras: Sequence[subprocess.Popen[str]]) -> None:
        """Let the cameras send until the node answers each: only then has all found each other."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            self.answers.clear()
            for camera in cameras:
                start_sending(camera, _WARM_UP_S)
            self._session.spin_until(lambda: False, time.monotonic() + _WARM_UP_S)
            for camera in cameras:
                images_sent(camera)
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
        """Query the cameras in turn until then; `period_s` 0 asks nothing."""
        from librobot_vlm_ros.srv import Query

        asks: list[Ask] = []
        due_s = time.monotonic() + period_s
        while period_s and due_s < until_s:
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
        model_s=float(message.info.preprocess_s) + float(message.info.inference_s),
    )


@contextmanager
def camera_process(topic: str, rate_hz: float, reliable: bool) -> Iterator[subprocess.Popen[str]]:
    """One camera as a process of its own."""
    words = [topic, str(rate_hz), "reliable" if reliable else "best_effort"]
    # Its complaints are shown only when something is wrong: a pipe that nobody reads could fill up.
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", "librobot_vlm_ros.bench.node_check.camera", *words],
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


def start_sending(camera: subprocess.Popen[str], seconds: float) -> None:
    """Let a camera send for so long."""
    assert camera.stdin is not None
    camera.stdin.write(f"{seconds}\n")
    camera.stdin.flush()


def images_sent(camera: subprocess.Popen[str]) -> int:
    """How many images it sent, once it is done."""
    assert camera.stdout is not None
    line = camera.stdout.readline()
    if not line:
        raise EngineError(ErrorCode.INTERNAL, "a camera of the check has ended before its time")
    return int(line)
