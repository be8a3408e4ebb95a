"""What rcl refuses and an operator can mend: said as such, and nothing goes on half-way.

The texts are those of Jazzy's rcl and rmw_fastrtps, seen with a Fast DDS that has security.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from librobot_vlm_ros.core import ErrorCode
from librobot_vlm_ros.ros.rcl_errors import coded_rcl_error

NO_SUBSCRIPTION = "Failed to create subscription: invalid allocator, at subscription.c:261"
NO_CLIENT = "failed to create client: create_client() failed to create response DataReader"
NO_SERVICE = "failed to create service: create_service() failed to create request DataReader"
NO_PUBLISHER = "Failed to create publisher: create_publisher() could not create data writer"
NO_FOLDER = "failed to initialize rcl: SECURITY ERROR: directory '/keys/enclaves/x' does not exist."
NO_ENCLAVE = "error creating node: couldn't find all security files!, at participant.cpp:360"
NO_SECURITY = (
    "error creating node: This Fast DDS version doesn't have the security libraries\n"
    "Please compile Fast DDS using the -DSECURITY=ON CMake option"
)
NO_NAMESPACE = "error creating node: invalid node namespace: must not end with a '/', at rmw_node"
NO_TYPE = "Trying to set parameter 'use_sim_time' to '5' of type 'INTEGER', expecting type 'BOOL'"
NO_LOG = "Failed to configure logging: Failed to create log directory: /root/.ros/log"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (NO_NAMESPACE, ErrorCode.BAD_PARAMETER, "invalid node namespace"),
        (NO_TYPE, ErrorCode.BAD_PARAMETER, "expecting type 'BOOL'"),
        (NO_LOG, ErrorCode.PERMISSION_DENIED, "ROS_LOG_DIR"),
        (NO_FOLDER, ErrorCode.FILE_NOT_FOUND, "ROS_SECURITY_KEYSTORE"),
        (NO_ENCLAVE, ErrorCode.FILE_NOT_FOUND, "ROS_SECURITY_ENCLAVE_OVERRIDE"),
        (NO_SECURITY, ErrorCode.MISSING_DEPENDENCY, "built without security"),
    ],
)
def test_what_keeps_a_node_from_starting_is_said_with_what_to_do(
    text: str, code: ErrorCode, said: str
) -> None:
    known = coded_rcl_error(RuntimeError(text))
    assert known is not None
    assert known.code == code
    assert said in str(known)
    assert "\n" not in str(known)


@pytest.mark.parametrize("text", [NO_SUBSCRIPTION, NO_CLIENT, NO_SERVICE, NO_PUBLISHER])
def test_what_the_policy_forbids_is_a_permission(text: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("ROS_SECURITY_ENABLE", "true")
    known = coded_rcl_error(RuntimeError(text), "/side/image")
    assert known is not None
    assert known.code == ErrorCode.PERMISSION_DENIED
    assert "/side/image" in known.message
    assert "policy" in known.hint
    monkeypatch.delenv("ROS_SECURITY_ENABLE")
    assert coded_rcl_error(RuntimeError(text)) is None


REFUSING = f"""
import os, sys
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from librobot_vlm_ros.ros import main

subscribe = Node.create_subscription

def create_subscription(self, kind, topic, *words, **options):
    if topic.endswith({{forbidden!r}}):
        os.environ["ROS_SECURITY_ENABLE"] = "true"
        raise rclpy_implementation.RCLError({NO_SUBSCRIPTION!r})
    return subscribe(self, kind, topic, *words, **options)

Node.create_subscription = create_subscription
sys.exit(main.main())
"""
CAMERAS = ["front=/refused/front", "side=/refused/side"]


@pytest.mark.ros
def test_a_camera_that_the_policy_forbids_leaves_the_node_inactive_and_on_no_topic(
    start_vlm: Callable[..., Any],
) -> None:
    vlm = start_vlm(code=REFUSING.format(forbidden="/side"), cameras=CAMERAS, tasks=["caption"])
    for _ in range(2):
        assert vlm.change_state("configure")
        assert not vlm.change_state("activate")
        assert vlm.state == "inactive"
        vlm.wait_for(lambda: not vlm.robot.node.count_subscribers("/refused/front"), 10.0)
        assert vlm.change_state("cleanup")
    refused = "activate failed: PERMISSION_DENIED(606): by the SROS2 policy this enclave may not "
    assert f"{refused}subscribe to /refused/side" in vlm.log()
    assert "Traceback" not in vlm.log()


@pytest.mark.ros
def test_an_instruction_topic_that_the_policy_forbids_leaves_nothing_loaded(
    start_vlm: Callable[..., Any],
) -> None:
    from diagnostic_msgs.msg import DiagnosticArray

    vlm = start_vlm(code=REFUSING.format(forbidden="/instruction"))
    heard = vlm.robot.listen(DiagnosticArray, "/diagnostics")
    assert not vlm.change_state("configure")
    assert vlm.state == "unconfigured"
    assert "configure failed: PERMISSION_DENIED(606)" in vlm.log()

    def told() -> bool:
        status = vlm.diagnostics(heard, "model")
        return status is not None and "PERMISSION_DENIED(606)" in status.message

    vlm.wait_for(told, 10.0, "the refusal in the diagnostics")
    assert vlm.diagnostics(heard, "model").level == b"\2"
