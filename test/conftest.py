"""Fixtures for every room: a ROS domain of one's own, processes that never outlive their test."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

# Started in the background of a script, a process ignores Ctrl-C, and so would every child: tests
# of what Ctrl-C does would then test nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _ros_is_here() -> bool:
    """Whether rclpy and this package's built messages can be imported."""
    if importlib.util.find_spec("rclpy") is None:
        return False
    try:
        return importlib.util.find_spec("librobot_vlm_ros.msg") is not None
    except ModuleNotFoundError:
        return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip ROS tests where there is no ROS; `make test` sets the variable that forbids it."""
    if _ros_is_here() or os.environ.get("LIBROBOT_VLM_REQUIRE_ROS") == "1":
        return
    skip = pytest.mark.skip(
        reason="needs rclpy and the built messages: run `make test`, or source a ROS 2 "
        "installation and this package's workspace"
    )
    for item in items:
        if item.get_closest_marker("ros") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def ros_domain() -> Iterator[int]:
    """A ROS_DOMAIN_ID that no other test process on this machine uses while this one lives."""
    from librobot_vlm_ros.client.ros_domain import claimed_domain

    with claimed_domain() as domain:
        yield domain


@pytest.fixture(scope="session")
def ros_env(ros_domain: int) -> Iterator[dict[str, str]]:
    """Environment of child processes; the same values hold in this process while tests run."""
    ours = {
        "ROS_DOMAIN_ID": str(ros_domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "PYTHONUNBUFFERED": "1",
    }
    from librobot_vlm_ros.ros.dds import clear_dead_segments

    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    clear_dead_segments()
    yield dict(os.environ)
    clear_dead_segments()  # of the processes that tests have killed: 64 MB of memory each
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def session(ros_env: dict[str, str]) -> Iterator[object]:
    """An rclpy node of this process on the tests' domain."""
    from librobot_vlm_ros.client.session import Session

    with Session("tests") as session:
        yield session


def wait_for(predicate: Callable[[], T], timeout_s: float = 10.0, what: str = "") -> T:
    """Call `predicate` until its value is true and return that value; fail the test after that."""
    end = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= end:
            pytest.fail(f"waited {timeout_s:g} s in vain for {what or predicate}")
        time.sleep(0.02)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., object]:
    """`wait_until(predicate, timeout_s=10, what="...")`, see `wait_for`."""
    return wait_for


class RunningProcess:
    """A child process in a group of its own, with its output in a file."""

    def __init__(self, args: Sequence[str], log: Path, env: dict[str, str], cwd: Path | None):
        self.args = list(args)
        self.log = log
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                self.args,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for_output(self, text: str, timeout_s: float = 20.0) -> str:
        """The output once it holds `text`; fails with all of it when it never does."""
        end = time.monotonic() + timeout_s
        while text not in (output := self.output()):
            if not self.alive and text not in self.output():
                pytest.fail(
                    f"{self.args} ended with {self._process.returncode} before writing {text!r}; "
                    f"it wrote:\n{output}"
                )
            if time.monotonic() >= end:
                pytest.fail(f"{self.args} did not write {text!r} in {timeout_s:g} s:\n{output}")
            time.sleep(0.02)
        return output

    def wait(self, timeout_s: float = 20.0) -> int:
        """Return code once it ended; fails with its output when it does not."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.args} still ran after {timeout_s:g} s; it wrote:\n{self.output()}")

    def send(self, signal_number: int) -> None:
        """Send a signal to the process itself (not to its group)."""
        self._process.send_signal(signal_number)

    def terminate(self, timeout_s: float = 5.0) -> int:
        """Ask it to end as Ctrl-C does; after the time, end the whole group."""
        if self.alive:
            self.send(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.kill_group()
        return self._process.wait()

    def kill_group(self) -> None:
        """End it and everything it started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def _processes(folder: Path) -> Iterator[Callable[..., RunningProcess]]:
    started: list[RunningProcess] = []

    def start(
        args: Sequence[str | os.PathLike[str]],
        name: str = "process",
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> RunningProcess:
        words = [os.fspath(word) for word in args]
        if words[0] == "python":
            words[0] = sys.executable
        log = folder / f"{name}-{len(started)}.log"
        process = RunningProcess(words, log, dict(env if env is not None else os.environ), cwd)
        started.append(process)
        return process

    yield start
    for process in reversed(started):
        process.kill_group()


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Callable[..., RunningProcess]]:
    """`start_process(args, name="process", env=None, cwd=None)`: a `RunningProcess`.

    `python` as the first argument means this interpreter. Without `env` it gets this process's
    environment. At the end every group is killed, so that no test leaves a process behind.
    """
    with _processes(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def start_module_process(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., RunningProcess]]:
    """As `start_process`, for a process that all tests of a module share."""
    with _processes(tmp_path_factory.mktemp("processes")) as start:
        yield start
