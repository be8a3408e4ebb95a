"""The node as a child process: its own error reaches whoever started it, and it never stays."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from librobot_vlm_ros.client.node_process import NodeProcess
from librobot_vlm_ros.core import EngineError, ErrorCode, ModelError, VlmError

pytestmark = pytest.mark.ros


def test_the_error_of_a_model_that_cannot_be_loaded_is_raised(tmp_path: Path, session: Any) -> None:
    """The model's own code, not that of the warnings before it."""
    failing = f'model_config:={{"load_error": {int(ErrorCode.NAN_WEIGHTS)}}}'
    with NodeProcess(["model:=fake", "autostart:=true", failing], tmp_path / "log") as process:
        with pytest.raises(ModelError, match="told to fail") as caught:
            process.wait_until_active(session, "/vlm", 60)
        assert caught.value.code == ErrorCode.NAN_WEIGHTS


def test_wrong_arguments_end_it_with_their_error(tmp_path: Path, session: Any) -> None:
    with (
        NodeProcess(["model:=fake", "no_such_argument:=1"], tmp_path / "log") as process,
        pytest.raises(VlmError, match="no_such_argument"),
    ):
        process.wait_until_active(session, "/vlm", 60)


def test_a_load_that_takes_too_long_is_said(tmp_path: Path, session: Any) -> None:
    slow = 'model_config:={"load_s": 30.0}'
    with (
        NodeProcess(["model:=fake", "autostart:=true", slow], tmp_path / "log") as process,
        pytest.raises(EngineError, match="not active after 4 s") as caught,
    ):
        process.wait_until_active(session, "/vlm", 4.0)
    assert caught.value.code == ErrorCode.DEADLINE_EXCEEDED


def test_it_is_ended_also_when_an_exception_passes(tmp_path: Path, session: Any) -> None:
    def fail(process: NodeProcess) -> None:
        process.wait_until_active(session, "/vlm", 60)
        raise KeyboardInterrupt

    started = NodeProcess(["model:=fake", "autostart:=true"], tmp_path / "log")
    with pytest.raises(KeyboardInterrupt), started as process:
        fail(process)
    assert started.end() == 0  # it took its leave in order
    with pytest.raises(ProcessLookupError):
        os.kill(started.pid, 0)


def test_a_process_that_does_not_end_is_killed(
    tmp_path: Path, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("librobot_vlm_ros.client.node_process._ORDERLY_END_S", 0.5)
    started = NodeProcess(["model:=fake", "autostart:=true"], tmp_path / "log")
    with started as process:
        process.wait_until_active(session, "/vlm", 60)
        os.kill(process.pid, signal.SIGSTOP)  # it cannot take any notice
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 20
    assert started.end() == -9
