"""The launch file: read as text everywhere, launched for real where launch_ros is installed."""

from __future__ import annotations

import ast
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from librobot_vlm_ros.ros.parameters.arguments import EXTRA_ARGUMENTS, LAUNCH_PARAMETERS
from librobot_vlm_ros.ros.parameters.settings import PARAMETERS

LAUNCH_FILE = Path(__file__).parents[3] / "launch" / "vlm.launch.py"

needs_launch = pytest.mark.skipif(
    importlib.util.find_spec("launch_ros") is None,
    reason="needs launch_ros, which is not on PyPI: run on a machine with a ROS 2 installation",
)

OUTER_LAUNCHER = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import GroupAction, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_ros.actions import PushRosNamespace, SetParameter

service = LaunchService()
service.include_launch_description(LaunchDescription([GroupAction([
    PushRosNamespace("outer"), SetParameter("use_sim_time", True),
    IncludeLaunchDescription(PythonLaunchDescriptionSource(sys.argv[1]), launch_arguments={
        "model": "fake", "namespace": "inner", "log_level": "error"}.items())])]))
sys.exit(service.run())
"""

LAUNCHER = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource

given = dict(word.split(":=", 1) for word in sys.argv[2:])
service = LaunchService(argv=sys.argv[2:])  # as ros2 launch does
service.include_launch_description(LaunchDescription([
    IncludeLaunchDescription(PythonLaunchDescriptionSource(sys.argv[1]),
                             launch_arguments=given.items())]))
sys.exit(service.run())
"""


def test_the_launch_file_has_the_arguments_that_the_documentation_promises() -> None:
    promised = {
        "model", "weights", "image_topic", "cameras", "image_transport", "tasks", "instruction",
        "device", "dtype", "quantization", "namespace", "params_file", "autostart", "use_sim_time",
        "log_level", "annotated", "enclave",
    }  # fmt: skip
    assert promised <= {*LAUNCH_PARAMETERS, *(item.name for item in EXTRA_ARGUMENTS)}
    assert set(LAUNCH_PARAMETERS) <= set(PARAMETERS)


def test_it_starts_one_true_lifecycle_node_of_this_package() -> None:
    tree = ast.parse(LAUNCH_FILE.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    nodes = [call for call in calls if getattr(call.func, "id", "").endswith("Node")]
    assert [call.func.id for call in nodes] == ["LifecycleNode"]  # type: ignore[attr-defined]
    words = {
        keyword.arg: keyword.value.value
        for keyword in nodes[0].keywords
        if isinstance(keyword.value, ast.Constant)
    }
    assert words["package"] == "librobot_vlm_ros"
    assert words["executable"] == "vlm_node"
    assert words["name"] == "vlm"
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "launch_ros.actions" in imported


def test_there_is_one_launch_file_and_no_copies() -> None:
    assert [path.name for path in LAUNCH_FILE.parent.glob("*.launch.*")] == ["vlm.launch.py"]


@needs_launch
def test_every_argument_is_described() -> None:
    script = (
        "import sys\n"
        "from launch.launch_description_sources import PythonLaunchDescriptionSource as Source\n"
        "from launch import LaunchContext\n"
        "for item in Source(sys.argv[1]).get_launch_description(LaunchContext())"
        ".get_launch_arguments():\n"
        "    print(item.name, len(item.description or ''))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(LAUNCH_FILE)], capture_output=True, text=True, check=True
    )
    lengths = dict(line.split() for line in done.stdout.splitlines())
    assert set(lengths) == {*LAUNCH_PARAMETERS, *(item.name for item in EXTRA_ARGUMENTS)}
    assert all(int(length) > 10 for length in lengths.values())


@needs_launch
@pytest.mark.ros
def test_a_launched_node_runs_with_its_arguments_and_ends_with_ctrl_c(
    start_process: Callable[..., Any], robot: Any, wait_until: Callable[..., Any], tmp_path: Path
) -> None:
    from lifecycle_msgs.srv import GetState
    from rcl_interfaces.srv import GetParameters

    file = tmp_path / "vlm.yaml"
    file.write_text("/**:\n  ros__parameters:\n    queue_size: 3\n    tasks: ['caption@9']\n")
    words = ["model:=fake", "namespace:=launched", f"params_file:={file}", "tasks:=detect@2, embed"]
    process = start_process(["python", "-c", LAUNCHER, LAUNCH_FILE, *words], "launch")
    process.wait_for_output("activate done", 60.0)
    name = "/launched/vlm"
    assert robot.read(GetState, f"{name}/get_state").current_state.label == "active"
    names = ["tasks", "queue_size", "model"]
    tasks, queue_size, model = robot.call(
        GetParameters, f"{name}/get_parameters", names=names
    ).values
    assert list(tasks.string_array_value) == ["detect@2", "embed"]
    assert queue_size.integer_value == 3
    assert model.string_value == "fake"
    process.send(signal.SIGINT)
    assert process.wait(15.0) == 0, process.output()
    assert "process has finished cleanly" in process.output()


@needs_launch
@pytest.mark.ros
def test_every_argument_reaches_the_node_and_a_misspelt_one_is_said(
    start_process: Callable[..., Any], robot: Any
) -> None:
    from lifecycle_msgs.srv import GetState
    from rcl_interfaces.srv import GetParameters
    from rclpy.parameter import parameter_value_to_python

    given = {
        "model": ("fake", "fake"),
        "model_config": ('{"latency_s": 0.01}', '{"latency_s": 0.01}'),
        "weights": ("/no/such/folder", "/no/such/folder"),
        "cameras": (
            "front=/front/image_raw, wrist=/wrist/image_raw:compressed",
            ["front=/front/image_raw", "wrist=/wrist/image_raw:compressed"],
        ),
        "image_topic": ("/other/image", "/other/image"),
        "image_transport": ("compressed", "compressed"),
        "tasks": ("[]", [""]),  # how rclpy holds an empty list of strings
        "instruction": ("the red cup", "the red cup"),
        "device": ("cpu", "cpu"),
        "dtype": ("float32", "float32"),
        "quantization": ("int8", "int8"),
        "annotated": ("false", False),
        "lock_step": ("true", True),
        "autostart": ("false", False),
        "use_sim_time": ("true", True),
    }
    assert set(given) == {*LAUNCH_PARAMETERS, "use_sim_time"}
    words = [f"{name}:={text}" for name, (text, _) in given.items()]
    words += [
        "namespace:=whole",
        "log_level:=warn",
        "transport:=default",
        "image_topc:=/x",
        "robot:=7",
    ]
    process = start_process(["python", "-c", LAUNCHER, LAUNCH_FILE, *words], "launch")
    name = "/whole/vlm"
    values = robot.read(GetParameters, f"{name}/get_parameters", names=list(given)).values
    held = dict(zip(given, map(parameter_value_to_python, values), strict=True))
    assert held == {key: value for key, (_, value) in given.items()}
    assert robot.read(GetState, f"{name}/get_state").current_state.label == "unconfigured"
    output = process.output()
    assert "there is no argument 'image_topc'. Did you mean image_topic" in output
    assert "'robot'" not in output  # may be of an including launch file
    assert "shared memory for images" not in output  # log_level:=warn
    process.send(signal.SIGINT)
    assert process.wait(15.0) == 0, process.output()


@needs_launch
@pytest.mark.ros
def test_included_by_a_robots_launch_file_it_takes_its_namespace_and_clock(
    start_process: Callable[..., Any], robot: Any, wait_until: Callable[..., Any]
) -> None:
    from lifecycle_msgs.srv import GetState
    from rcl_interfaces.srv import GetParameters

    process = start_process(["python", "-c", OUTER_LAUNCHER, LAUNCH_FILE], "launch")
    name = "/outer/inner/vlm"
    wait_until(
        lambda: robot.read(GetState, f"{name}/get_state").current_state.label == "active", 30.0
    )
    (clock,) = robot.call(GetParameters, f"{name}/get_parameters", names=["use_sim_time"]).values
    assert clock.bool_value
    process.send(signal.SIGINT)
    assert process.wait(15.0) == 0, process.output()
    assert "activate done" not in process.output()  # log_level:=error


WRONG_ARGUMENTS = {
    "tasks:=capton": "UNKNOWN_TASK(202)",
    "cameras:=front": "BAD_PARAMETER(204): cameras entry 'front'",
    "device:=gpu": "expected auto, cpu, cuda or cuda:N",
    "dtype:=float8": "Valid options are",
    "params_file:=/no/such/file.yaml": "FILE_NOT_FOUND(604)",
    "namespace:=/a b": "Invalid namespace",
}


@needs_launch
@pytest.mark.ros
@pytest.mark.parametrize("word", WRONG_ARGUMENTS)
def test_a_wrong_argument_ends_the_launch_with_the_reason(
    start_process: Callable[..., Any], ros_env: dict[str, str], word: str
) -> None:
    process = start_process(["python", "-c", LAUNCHER, LAUNCH_FILE, word], "launch")
    assert process.wait(60.0) != 0
    assert WRONG_ARGUMENTS[word] in process.output()
    assert "process started" not in process.output()
