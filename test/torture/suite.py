"""What every row of the torture suite is made of: its findings, the node it does its worst to, and
the figures of a process.

A row is a function that fills `Findings`. It is known by its function's name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
TEST = HERE.parent
sys.path.append(str(TEST / "support"))  # as pytest has it, for the tests that are borrowed
_TEXTS_KEPT = 10


class Findings:
    """What a row did and found.

    Args:
        scale: share of the full run's cases.
        timed: whether limits of time count as failures. They don't on a machine that is busy with
            other things; the figures are taken all the same.
    """

    def __init__(self, scale: float = 1.0, timed: bool = True, seconds: float = 0.0) -> None:
        self.scale, self.timed, self.seconds = scale, timed, seconds
        self.cases = 0
        self.failures = 0
        self.texts: list[str] = []
        self.measured: dict[str, Any] = {}

    def number(self, full: int, least: int = 1) -> int:
        """How many of the full run's cases are to be done."""
        return max(least, round(full * self.scale))

    def check(self, holds: bool, text: object, count: int = 1) -> bool:
        """One thing that must hold; `text` says what was seen where it does not."""
        if not holds:
            self.failures += count
            if len(self.texts) < _TEXTS_KEPT:
                self.texts.append(str(text))
        return holds

    def within(self, name: str, value: float, limit: float, *, time: bool = True) -> None:
        """Note a figure beside its limit; beyond it is a failure."""
        self.note(**{name: value, f"{name}_limit": limit})
        if self.timed or not time:
            self.check(value <= limit, f"{name} is {value:.4g}, allowed are {limit:g}")

    def note(self, **figures: Any) -> None:
        """Figures for the summary."""
        for name, value in figures.items():
            self.measured[name] = round(value, 3) if isinstance(value, float) else value

    def summary(self) -> dict[str, Any]:
        """As `build/torture/summary.json` holds it, without name."""
        found = {"cases": self.cases, "failures": self.failures, **self.measured}
        return {**found, "failed": self.texts} if self.texts else found


Row = Callable[[Findings], None]
ROWS: dict[str, Row] = {}


def row(function: Row) -> Row:
    """Make a row known."""
    ROWS[function.__name__] = function
    return function


def borrowed(path: str) -> ModuleType:
    """A module of the tests, by its file under `test/`."""
    name = "torture_" + path.replace("/", "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TEST / path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def wait_for(predicate: Callable[[], Any], timeout_s: float = 30.0, what: str = "") -> Any:
    """The predicate's value once it is true; TimeoutError after that time."""
    end = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() >= end:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {what or predicate}")
        time.sleep(0.02)
    return value


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares: growth of the second per unit of the first."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


class Watched:
    """What a process holds, from /proc."""

    def __init__(self, pid: int | str = "self") -> None:
        self._folder = Path(f"/proc/{pid}")

    def resident_mib(self) -> float:
        pages = int((self._folder / "statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    def own_mib(self) -> float:
        """Resident memory of its own, shared segments among it. Pages of files, which libraries
        are, come and go with what else the machine does.
        """
        lines = (self._folder / "status").read_text().splitlines()
        held = dict(line.split(":", 1) for line in lines)
        return sum(int(held[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024

    def threads(self) -> int:
        return len(list((self._folder / "task").iterdir()))


@contextlib.contextmanager
def robot_and_node(
    fake: dict[str, Any] | None = None,
    *,
    before: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    **parameters: Any,
) -> Iterator[Any]:
    """(robot, vlm) in a ROS domain of their own, as the node's own tests have them.

    `before`: a command that becomes the node (see hardship.py). `environment`: added to the node's.
    """
    from librobot_vlm_ros.client.ros_domain import isolated_ros

    ros, common = borrowed("ros/conftest.py"), borrowed("conftest.py")
    parameters = {"model": "fake", "annotated": False, **parameters}
    if fake:
        parameters["model_config"] = json.dumps(fake)
    words = [*before, sys.executable, "-m", "librobot_vlm_ros.ros.main", "--ros-args"]
    words += ["-r", "__ns:=/torture"]
    for name, value in parameters.items():
        words += ["-p", f"{name}:={json.dumps(value)}"]
    with isolated_ros(), tempfile.TemporaryDirectory() as folder:
        around = {**os.environ, **(environment or {})}
        process = common.RunningProcess(words, Path(folder) / "log", around, None)
        robot = ros.Robot()
        vlm = ros.Vlm(process, robot, "/torture/vlm", wait_for)
        try:
            if parameters.get("autostart"):
                vlm.wait_for_state("active", 60.0)
            yield robot, vlm
        finally:
            process.terminate()
            robot.close()


def camera_of(robot: Any, topic: str = "/torture/image", qos: Any = 10) -> Any:
    """A camera of the node's own tests."""
    return borrowed("ros/conftest.py").CameraSim(robot, topic, qos)


def accepted_goal(client: Any, goal: Any) -> Any:
    """The goal's handle. rclpy's client forgets an answer that comes before it has noted what it
    asked, when another thread spins: then it is asked again.
    """
    for timeout_s in (5.0, 5.0, 20.0):
        sent = client.send_goal_async(goal)
        with contextlib.suppress(TimeoutError):
            wait_for(sent.done, timeout_s, "the goal's acceptance")
            return sent.result()
    raise TimeoutError("the goal was not accepted")


def started(script: str, *words: object) -> subprocess.Popen[str]:
    """A script of this folder as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def figures_of(process: subprocess.Popen[str], timeout_s: float) -> dict[str, Any]:
    """The JSON that such a process wrote at its end."""
    out, errors = process.communicate(timeout=timeout_s)
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}: {errors[-500:]}")
    return dict(json.loads(out.strip().splitlines()[-1]))
