"""The process of the node: how it starts, and that it ends in time whatever it is doing."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ros

RUN = ["python", "-m", "librobot_vlm_ros.cli", "run"]


@pytest.fixture
def run(start_process: Callable[..., Any], ros_env: dict[str, str]) -> Callable[..., Any]:
    """`run("name:=value", ...)`: the command, as typed."""
    return lambda *words: start_process([*RUN, *words], "run")


def end(process: Any, number: int) -> float:
    """Send the signal; seconds until the process has ended with exit code 0."""
    started = time.monotonic()
    process.send(number)
    assert process.wait(10.0) == 0, process.output()
    assert "Traceback" not in process.output()
    return time.monotonic() - started


def end_without_words(process: Any) -> int:
    """The exit code, whatever it wrote."""
    process.send(signal.SIGINT)
    return int(process.wait(10.0))


def test_under_nohup_a_closed_terminal_ends_nothing(
    start_process: Callable[..., Any], ros_env: dict[str, str]
) -> None:
    process = start_process(["nohup", sys.executable, *RUN[1:], "model:=fake"], "run", env=ros_env)
    process.wait_for_output("activate done", 40.0)
    process.send(signal.SIGHUP)
    time.sleep(0.5)
    assert process.alive
    end(process, signal.SIGTERM)


@pytest.fixture
def hangups_are_not_ignored() -> Iterator[None]:
    """Also where the tests themselves run under nohup, which processes inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_are_not_ignored")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_idle_node(run: Callable[..., Any], number: int) -> None:
    process = run("model:=fake", "image_topic:=/nobody/here", "log_level:=info")
    process.wait_for_output("activate done", 40.0)
    assert end(process, number) < 5.0


def test_a_signal_ends_the_node_while_a_model_loads(run: Callable[..., Any]) -> None:
    process = run("model:=fake", 'model_config:={"load_s": 600}')
    process.wait_for_output("loading model", 40.0)
    assert end(process, signal.SIGINT) < 5.0


def test_a_second_signal_does_no_harm(run: Callable[..., Any]) -> None:
    process = run("model:=fake", 'model_config:={"load_s": 600}')
    process.wait_for_output("loading model", 40.0)
    process.send(signal.SIGINT)
    assert end(process, signal.SIGTERM) < 5.0


def test_a_signal_ends_the_node_while_the_model_answers(
    run: Callable[..., Any], make_camera: Callable[..., Any], wait_until: Callable[..., Any]
) -> None:
    # One token takes ten minutes: nobody can wait for the model here.
    config = 'model_config:={"latency_s": 6000}'
    process = run("model:=fake", config, "image_topic:=/slow/image", "tasks:=caption")
    process.wait_for_output("activate done", 40.0)
    camera = make_camera("/slow/image")
    camera.wait_for_listener(wait_until)
    camera.send()
    time.sleep(0.5)
    assert end(process, signal.SIGINT) < 5.0


def test_the_enclave_that_was_asked_for_is_the_nodes(
    run: Callable[..., Any], robot: Any, wait_until: Callable[..., Any]
) -> None:
    process = run("model:=fake", "autostart:=false", "enclave:=/perception/eyes")

    def found() -> bool:
        nodes = robot.node.get_node_names_and_namespaces_with_enclaves()
        return ("vlm", "/", "/perception/eyes") in nodes

    wait_until(found, 20.0, "the node with its enclave")
    end(process, signal.SIGINT)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["enclave:=no slash"], "Enclave name"),
        (["modle:=fake"], "Did you mean model"),
        (["model"], "is not of the form name:=value"),
        (["model:=fake", "tasks:=capton"], "UNKNOWN_TASK(202)"),
        (["model:=fake", "queue_size:=0"], "BAD_PARAMETER(204)"),
        (["params_file:=/no/such.yaml"], "FILE_NOT_FOUND(604)"),
        (["log_level:=loud"], "expected one of debug"),
    ],
)
def test_a_wrong_argument_ends_the_command_with_the_reason(
    run: Callable[..., Any], words: list[str], said: str
) -> None:
    process = run(*words)
    assert process.wait(30.0) != 0
    assert said in process.output()
    assert "Traceback" not in process.output()


def test_a_parameter_file_that_is_no_yaml_is_said(run: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("vlm: [")
    process = run(f"params_file:={file}")
    assert process.wait(30.0) == 2
    assert "BAD_PARAMETER(204)" in process.output()


def test_a_home_that_cannot_be_written_is_said_with_what_to_set(
    start_process: Callable[..., Any], ros_env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()  # root may write everywhere but below a file
    env = {**ros_env, "HOME": str(tmp_path / "file" / "home")}
    env = {name: value for name, value in env.items() if name not in ("ROS_LOG_DIR", "ROS_HOME")}
    process = start_process([*RUN, "model:=fake"], "run", env=env)
    assert process.wait(30.0) == 1
    assert "PERMISSION_DENIED(606): ROS cannot write its log" in process.output()
    assert "Set ROS_LOG_DIR" in process.output()


def test_text_that_the_locale_cannot_read_is_refused_with_what_to_set(
    start_process: Callable[..., Any], ros_env: dict[str, str]
) -> None:
    env = {**ros_env, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start_process([*RUN, "model:=fake", "instruction:=赤い"], "run", env=env)
    assert process.wait(30.0) == 1
    assert "BAD_PARAMETER(204): argument instruction cannot be read" in process.output()
    assert "C.UTF-8" in process.output()


def test_a_parameter_file_is_read_and_arguments_win_over_it(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "vlm.yaml"
    file.write_text(
        "/**:\n  ros__parameters:\n    model: fakee\n    camera_timeout_s: 3\n"
        "    tasks: ['caption@3']\n    unknown_one: 1\n"
    )
    process = run(f"params_file:={file}", "model:=fake")
    output = process.wait_for_output("activate done", 40.0)
    assert "caption@3 on /camera/image_raw" in output
    assert "there is no parameter 'unknown_one'" in output


def test_at_level_debug_each_result_is_logged(
    run: Callable[..., Any], make_camera: Callable[..., Any], wait_until: Callable[..., Any]
) -> None:
    process = run("model:=fake", "image_topic:=/debug/image", "tasks:=detect", "log_level:=debug")
    camera = make_camera("/debug/image")
    camera.wait_for_listener(wait_until)

    def logged() -> bool:
        camera.send()
        return "detect@camera#" in process.output()

    wait_until(logged, 15.0, "the debug line of a result")
    assert end(process, signal.SIGINT) < 5.0


def test_at_level_debug_the_rooms_below_are_heard(run: Callable[..., Any]) -> None:
    words = ["model:=fake", 'model_config:={"load_error": 302}']
    process = run(*words, "log_level:=debug")
    output = process.wait_for_output("autostart stopped", 40.0)
    assert "loading fake failed:" in output
    assert end_without_words(process) == 0
    quiet = run(*words)
    assert "loading fake failed:" not in quiet.wait_for_output("autostart stopped", 40.0)
    assert end(quiet, signal.SIGINT) < 5.0


def test_warnings_of_libraries_end_nothing_where_python_makes_errors_of_them(
    start_process: Callable[..., Any], ros_env: dict[str, str]
) -> None:
    env = {**ros_env, "PYTHONWARNINGS": "error"}
    process = start_process([*RUN, "model:=florence-2-tabletop"], "run", env=env)
    process.wait_for_output("activate done", 60.0)
    assert end(process, signal.SIGINT) < 5.0


def test_a_name_space_is_taken(run: Callable[..., Any], robot: Any) -> None:
    from lifecycle_msgs.srv import GetState

    process = run("model:=fake", "namespace:=left/arm", "autostart:=false", "log_level:=warn")
    state = robot.read(GetState, "/left/arm/vlm/get_state").current_state.label
    assert state == "unconfigured"
    assert end(process, signal.SIGINT) < 5.0
