"""Starts the vision-language node.

How it is used:
    ros2 launch librobot_vlm_ros vlm.launch.py model:=florence-2-base image_topic:=/camera/image_raw
    ros2 launch librobot_vlm_ros vlm.launch.py --show-args
"""

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.logging import get_logger
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.utilities import prefix_namespace

from librobot_vlm_ros.ros.dds import TRANSPORT_VARIABLE
from librobot_vlm_ros.ros.parameters.arguments import (
    ENCLAVE_VARIABLE,
    LAUNCH_PARAMETERS,
    arguments,
    existing_file,
    given_arguments,
    logger_name,
    near_arguments,
    parse_values,
    unknown_argument,
)
from librobot_vlm_ros.ros.parameters.declaration import ros_value

ARGUMENTS = arguments(LAUNCH_PARAMETERS)


def generate_launch_description() -> LaunchDescription:
    declared = [
        DeclareLaunchArgument(
            item.name,
            default_value=item.default,
            description=item.description,
            choices=list(item.choices) or None,
        )
        for item in ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start_node)])


def start_node(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    texts = {item.name: LaunchConfiguration(item.name).perform(context) for item in ARGUMENTS}
    said = [word.partition(":=")[0] for word in context.argv if ":=" in word]
    given = given_arguments(texts, said, ARGUMENTS)
    values = parse_values(given)
    files = [str(existing_file(texts["params_file"]))] if texts["params_file"] else []
    known = [item.name for item in ARGUMENTS]
    for name in said:
        # ros2 launch says nothing. No error, and nothing of words that are like none of ours: they
        # may be for a launch file that includes this one.
        if name not in known and near_arguments(name, known):
            get_logger("vlm.launch.py").warning(f"ignored: {unknown_argument(name, known)}")
    outer = context.launch_configurations.get("ros_namespace")  # of PushRosNamespace
    enclave = texts["enclave"]
    # ros2 launch has a node of its own, and its enclave in that variable: it would win.
    security = {ENCLAVE_VARIABLE: enclave} if enclave else {}
    logger = logger_name(prefix_namespace(outer, texts["namespace"]) or "")
    return [
        LifecycleNode(
            package="librobot_vlm_ros",
            executable="vlm_node",
            name="vlm",
            namespace=texts["namespace"],
            # The file wins over this default for all nodes, and what was asked for here over both.
            ros_arguments=[
                "-p",
                "autostart:=true",
                "--log-level",
                f"{logger}:={texts['log_level']}",
                *(["--enclave", enclave] if enclave else []),
            ],
            parameters=[*files, {name: ros_value(value) for name, value in values.items()}],
            additional_env={TRANSPORT_VARIABLE: texts["transport"], **security},
            output="screen",
            emulate_tty=True,
        ),
    ]
