"""The SROS2 policy that ships allows exactly what the node does."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

POLICY = Path(__file__).resolve().parents[2] / "config" / "sros2" / "policy.xml"
#: There with vision_msgs, with `image_transport:=compressed`, and with `use_sim_time:=true`.
SOMETIMES = {"~/detections", "/camera/image_raw/compressed", "/clock"}
ACTION = "~/generate/_action/"


def allowed(enclave: str) -> dict[tuple[str, str], set[str]]:
    """(tag, right) -> names, by an enclave's path."""
    (profile,) = ElementTree.parse(POLICY).findall(
        f".//enclave[@path='{enclave}']/profiles/profile"
    )
    found: dict[tuple[str, str], set[str]] = {}
    for group in profile:
        for right, verdict in group.attrib.items():
            assert verdict == "ALLOW"
            names = [str(item.text) for item in group]
            assert len(names) == len(set(names))
            found[group.tag, right] = set(names)
    return found


@pytest.mark.ros
def test_the_nodes_enclave_names_exactly_its_topics_services_and_action(
    start_vlm: Callable[..., Any],
) -> None:
    vlm = start_vlm(autostart=True)
    vlm.wait_for_state("active")
    node, (namespace, _) = vlm.robot.node, vlm.name.rsplit("/", 1)

    def names(kind: str) -> set[str]:
        found = getattr(node, f"get_{kind}_names_and_types_by_node")("vlm", namespace)
        return {name.replace(f"{vlm.name}/", "~/") for name, _ in found}

    def there() -> bool:
        return "/camera/image_raw" in names("subscriber") and "~/query" in names("service")

    vlm.wait_for(there, 10.0)
    policy = allowed("/vlm")
    published, served = names("publisher"), names("service")
    of_action = {name for name in published | served if name.startswith(ACTION)}
    assert len(of_action) == 5
    assert policy["topics", "publish"] - SOMETIMES == published - of_action - SOMETIMES
    assert policy["topics", "subscribe"] - SOMETIMES == names("subscriber") - SOMETIMES
    assert policy["services", "reply"] == served - of_action
    assert policy["actions", "execute"] == {"~/generate"}
    assert names("client") == set()
    assert policy["topics", "publish"] | policy["topics", "subscribe"] >= SOMETIMES


def test_the_clients_enclave_is_the_other_side_of_the_nodes() -> None:
    node, client = allowed("/vlm"), allowed("/vlm_client")

    def outside(names: set[str]) -> set[str]:
        return {name.replace("~/", "/vlm/") for name in names}

    everybodys = {"/parameter_events", "/rosout"}
    sometimes = {"/clock"}
    assert client["services", "request"] == outside(node["services", "reply"])
    assert client["actions", "call"] == outside(node["actions", "execute"])
    heard = outside(node["topics", "publish"]) - everybodys
    assert client["topics", "subscribe"] == heard | sometimes
    assert client["topics", "publish"] == {"/vlm/instruction"} | everybodys


def test_launch_may_what_its_own_node_needs_and_change_this_nodes_state() -> None:
    launch, client = allowed("/vlm_launch"), allowed("/vlm_client")
    assert launch["services", "reply"] == client["services", "reply"]
    assert launch["services", "request"] == {"/vlm/change_state", "/vlm/get_state"}
    assert launch["topics", "subscribe"] == {"/clock", "/vlm/transition_event"}
    assert launch["topics", "publish"] == {"/parameter_events", "/rosout"}


def names_of(node: Any, name: str) -> dict[tuple[str, str], set[str]]:
    """(tag, right) -> names that the node of that name has in the graph, as `allowed` gives them.

    Names of a service or topic below an action belong to the action.
    """

    def names(kind: str) -> set[str]:
        found = getattr(node, f"get_{kind}_names_and_types_by_node")(name, "/")
        inner = "/generate/_action/"
        return {n.replace(f"/{name}/", "~/") for n, _ in found if inner not in n}

    return {
        ("topics", "publish"): names("publisher"),
        ("topics", "subscribe"): names("subscriber"),
        ("services", "reply"): names("service"),
        ("services", "request"): names("client"),
    }


@pytest.mark.ros
def test_a_client_has_every_right_that_a_node_of_rclpy_needs(robot: Any) -> None:
    import rclpy
    from librobot_vlm_ros.action import Generate
    from librobot_vlm_ros.msg import Caption
    from librobot_vlm_ros.srv import Query
    from rclpy.action import ActionClient
    from std_msgs.msg import String

    node = rclpy.create_node("vlm_client", context=robot.context)
    try:
        node.create_client(Query, "/vlm/query")
        node.create_subscription(Caption, "/vlm/caption", print, 10)
        node.create_publisher(String, "/vlm/instruction", 10)
        ActionClient(node, Generate, "/vlm/generate")
        policy = allowed("/vlm_client")
        found = names_of(node, "vlm_client")
        for right, names in found.items():
            assert names <= policy[right], right
        # And no more than that: what such a node offers by itself is all that it may offer.
        assert found["services", "reply"] == policy["services", "reply"]
    finally:
        node.destroy_node()


@pytest.mark.ros
def test_the_query_command_needs_no_more_than_a_clients_rights(
    ros_env: dict[str, str],
) -> None:
    from librobot_vlm_ros.srv import Query

    from librobot_vlm_ros.client.session import Session

    policy = allowed("/vlm_client")
    with Session("librobot_vlm_query") as session:
        session.node.create_client(Query, "/vlm/query")
        found = names_of(session.node, "librobot_vlm_query")
    assert found["services", "request"] == {"/vlm/query"}
    for right, names in found.items():
        assert names <= policy[right], right


@pytest.mark.ros
def test_security_that_cannot_be_had_ends_the_node_with_what_to_do(
    start_process: Callable[..., Any], ros_env: dict[str, str], tmp_path: Path
) -> None:
    secure = {
        **ros_env,
        "ROS_SECURITY_KEYSTORE": str(tmp_path),
        "ROS_SECURITY_ENABLE": "true",
        "ROS_SECURITY_STRATEGY": "Enforce",
    }
    words = ["python", "-m", "librobot_vlm_ros.ros.main"]
    words += ["--ros-args", "-p", "model:=fake", "--enclave", "/vlm"]
    process = start_process(words, "without_keys", env=secure)
    assert process.wait(30.0) == 1
    assert "FILE_NOT_FOUND(604): ROS_SECURITY_ENABLE is set" in process.output()
    assert "--enclave" in process.output()
    # An enclave of the command line wins over that of the surroundings.
    run = ["python", "-m", "librobot_vlm_ros.cli", "run", "model:=fake", "enclave:=/eyes"]
    around = {**secure, "ROS_SECURITY_ENCLAVE_OVERRIDE": "/vlm_launch"}
    process = start_process(run, "of_its_own", env=around)
    assert process.wait(30.0) == 1
    assert "enclaves/eyes' does not exist" in process.output()
    enclave = tmp_path / "enclaves" / "vlm"
    enclave.mkdir(parents=True)
    for name in ("identity_ca.cert.pem", "cert.pem", "key.pem", "permissions_ca.cert.pem",
                 "governance.p7s", "permissions.p7s"):  # fmt: skip
        (enclave / name).write_text("no key")
    process = start_process(words, "with_keys_of_no_use", env=secure)
    # Keys of no use, or a middleware without security: either way nothing comes up unprotected.
    assert process.wait(30.0) == 1
    assert "configure" not in process.output()
    if "security libraries" in process.output():
        assert "MISSING_DEPENDENCY(312)" in process.output()
