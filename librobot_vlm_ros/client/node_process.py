"""The node as a process of its own, which never outlives the command that started it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from librobot_vlm_ros.client.session import Session
from librobot_vlm_ros.core import EngineError, ErrorCode, VlmError, make_error

_ACTIVE = 3  # lifecycle_msgs/State.PRIMARY_STATE_ACTIVE
_ORDERLY_END_S = 8.0
_ERROR_LINE = re.compile(r"^\[ERROR\]|^\[FATAL\]|^(vlm_node|librobot-vlm)\b")
_CODED = re.compile(r"\b[A-Z_]{4,}\((\d{3})\): (.*)")


class NodeProcess:
    """`librobot-vlm run` with `arguments` (name:=value), its output in the file `log`.

    A context manager: on leaving, by whatever way, the process and all it started are ended. Start
    it before rclpy is initialised in this process.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        self._arguments = list(arguments)
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> NodeProcess:
        command = [sys.executable, "-m", "librobot_vlm_ros.cli", "run", *self._arguments]
        with self.log.open("wb") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C in the terminal reaches us alone
                preexec_fn=_end_with_parent,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Process id; also that of its process group."""
        return self._process.pid

    def check(self) -> None:
        """Raises the error that the node ended with, if it has ended."""
        code = self._process.poll()
        if code is None:
            return
        why = self.last_error() if code > 0 else None  # a signal is reason enough
        raise why or self._not_active(f"the node ended with exit code {code}")

    def wait_until_active(self, session: Session, name: str, timeout_s: float) -> None:
        """Wait until the node has loaded its model and works.

        Raises the node's own error when it gave up, `EngineError` DEADLINE_EXCEEDED otherwise.
        """
        from lifecycle_msgs.srv import GetState

        client = session.node.create_client(GetState, f"{name}/get_state")
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            self.check()
            if "autostart stopped" in self.output():
                raise self.last_error() or self._not_active("the node could not start")
            session.spin_until(client.service_is_ready, time.monotonic() + 0.2)
            if not client.service_is_ready():
                continue
            with contextlib.suppress(EngineError):  # it is busy starting
                if session.call(client, GetState.Request(), 2.0).current_state.id == _ACTIVE:
                    return
            session.spin_for(0.05)
        raise EngineError(
            ErrorCode.DEADLINE_EXCEEDED,
            f"the node was not active after {timeout_s:g} s",
            f"See {self.log}.",
        )

    def _not_active(self, message: str) -> EngineError:
        return EngineError(ErrorCode.NOT_ACTIVE, message, f"See {self.log}.")

    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_error(self) -> VlmError | None:
        """The last coded error that it wrote; warnings are none."""
        for line in reversed(self.output().splitlines()):
            found = _CODED.search(line)
            if found and _ERROR_LINE.search(line):
                return make_error(
                    int(found[1]), found[2], f"That is from the node's log, {self.log}."
                )
        return None

    def end(self) -> int:
        """End it as Ctrl-C does; after a few seconds, and in any case its children, by force."""
        process = self._process
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ORDERLY_END_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _end_with_parent() -> None:
    """Ask Linux to end this (child) process when its parent is killed outright."""
    with contextlib.suppress(Exception):
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
