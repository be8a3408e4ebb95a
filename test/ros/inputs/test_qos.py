"""Quality of service follows the publishers, and a topic that stays silent is said with the fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.ros


def profile(reliable: bool, latched: bool = False, depth: int = 5) -> Any:
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    return QoSProfile(
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


@pytest.mark.parametrize(
    ("offered", "asked"),
    [
        ([], "best effort, volatile"),
        ([(True, False)], "reliable, volatile"),
        ([(True, True)], "reliable, transient local"),
        ([(True, True), (True, False)], "reliable, volatile"),
        ([(False, True), (True, True)], "best effort, transient local"),
        ([(False, False), (True, True)], "best effort, volatile"),
    ],
)
def test_the_most_that_every_publisher_serves_is_asked(
    offered: list[tuple[bool, bool]], asked: str
) -> None:
    from librobot_vlm_ros.ros.inputs.qos import _words, matching_profile

    assert _words(matching_profile([profile(*item) for item in offered], depth=1)) == asked


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("camera_driver", "camera_driver"),
        ("_NODE_NAME_UNKNOWN_", "a publisher whose name is not known yet"),
    ],
)
def test_a_publisher_whose_node_is_not_discovered_yet_is_said_in_words(
    name: str, said: str
) -> None:
    from librobot_vlm_ros.ros.inputs.qos import _named

    assert _named(SimpleNamespace(node_name=name)) == said


@pytest.fixture(scope="module")
def vlm(start_vlm: Callable[..., Any]) -> Any:
    made = start_vlm(
        cameras=["a=/qos/a", "b=/qos/b", "silent=/qos/silent", "jpeg=/qos/jpeg"],
        camera_timeout_s=0.5,
        tasks=["caption"],
        autostart=True,
    )
    made.wait_for_state("active")
    return made


@pytest.fixture(scope="module")
def diagnostics(vlm: Any) -> list[Any]:
    from diagnostic_msgs.msg import DiagnosticArray

    return vlm.robot.listen(DiagnosticArray, "/diagnostics")


def camera_values(vlm: Any, diagnostics: list[Any], name: str) -> dict[str, str]:
    status = vlm.diagnostics(diagnostics, f"camera {name}")
    return {item.key: item.value for item in status.values} if status else {}


@pytest.mark.parametrize("reliable", [True, False])
@pytest.mark.parametrize("latched", [True, False])
def test_a_camera_is_heard_whatever_it_offers_and_changes_are_followed(
    vlm: Any, diagnostics: list[Any], make_camera: Callable[..., Any], reliable: bool, latched: bool
) -> None:
    camera = make_camera("/qos/a", profile(reliable, latched))
    reliability = "reliable" if reliable else "best effort"
    words = f"{reliability}, {'transient local' if latched else 'volatile'}"
    before = int(camera_values(vlm, diagnostics, "a").get("received", 0))

    def heard() -> bool:
        camera.send()
        values = camera_values(vlm, diagnostics, "a")
        return values.get("qos") == words and int(values["received"]) > before

    vlm.wait_for(heard, 10.0, f"frames as {words}")
    camera.close()


def test_a_topic_that_nobody_publishes_is_said_with_those_that_exist(
    vlm: Any, diagnostics: list[Any], make_camera: Callable[..., Any]
) -> None:
    make_camera("/qos/elsewhere").send()
    vlm.process.wait_for_output("camera 'silent': TOPIC_MISSING(208): nobody publishes /qos/silent")
    vlm.wait_for(
        lambda: "/qos/elsewhere" in camera_values_message(vlm, diagnostics, "silent"), 15.0
    )
    camera = make_camera("/qos/silent")
    camera.wait_for_listener(vlm.wait_for)
    vlm.process.wait_for_output("camera 'silent': /qos/silent is there")


def camera_values_message(vlm: Any, diagnostics: list[Any], name: str) -> str:
    status = vlm.diagnostics(diagnostics, f"camera {name}")
    return str(status.message) if status else ""


def test_a_topic_of_another_type_is_said_with_the_setting_that_helps(
    vlm: Any, diagnostics: list[Any], make_camera: Callable[..., Any]
) -> None:
    make_camera("/qos/jpeg", compressed=True).send()
    vlm.process.wait_for_output("/qos/jpeg carries sensor_msgs/msg/CompressedImage")
    assert "image_transport:=compressed" in vlm.log()


def test_instructions_of_another_type_are_said_and_their_absence_is_not(vlm: Any) -> None:
    from std_msgs.msg import Int32

    assert "~/instruction" not in vlm.log()
    publisher = vlm.robot.node.create_publisher(Int32, f"{vlm.name}/instruction", 10)
    vlm.process.wait_for_output("carries std_msgs/msg/Int32, expected std_msgs/msg/String", 10.0)
    vlm.robot.node.destroy_publisher(publisher)


def test_a_camera_that_sends_the_other_transport_is_said_with_the_setting_that_helps(
    start_vlm: Callable[..., Any], make_camera: Callable[..., Any]
) -> None:
    vlm = start_vlm(
        cameras=["front=/twin/front", "wrist=/twin/wrist:compressed"], tasks=[""], autostart=True
    )
    make_camera("/twin/front/compressed", compressed=True)
    make_camera("/twin/wrist")
    vlm.process.wait_for_output(
        "nobody publishes /twin/front. /twin/front/compressed is there: "
        "set image_transport:=compressed, or 'front=/twin/front:compressed' in cameras."
    )
    vlm.process.wait_for_output(
        "nobody publishes /twin/wrist/compressed. /twin/wrist is there: "
        "set image_transport:=raw, or 'wrist=/twin/wrist:raw' in cameras."
    )


def test_a_camera_that_stops_is_reported_and_recovers(
    vlm: Any, diagnostics: list[Any], make_camera: Callable[..., Any]
) -> None:
    camera = make_camera("/qos/silent")
    camera.wait_for_listener(vlm.wait_for)
    camera.send()
    vlm.process.wait_for_output("TOPIC_TIMEOUT(701): camera 'silent' has sent nothing for 0.5 s")

    def stale() -> bool:
        status = vlm.diagnostics(diagnostics, "camera silent")
        return bool(status) and "no frame for" in status.message

    vlm.wait_for(stale, 15.0)
    camera.send()
    vlm.process.wait_for_output("camera 'silent' sends frames")


def test_a_latched_image_from_before_the_node_is_heard(
    vlm: Any, diagnostics: list[Any], make_camera: Callable[..., Any]
) -> None:
    assert vlm.change_state("deactivate")
    camera = make_camera("/qos/b", profile(True, True))
    camera.send()
    assert vlm.change_state("activate")
    vlm.wait_for(lambda: int(camera_values(vlm, diagnostics, "b").get("received", 0)) > 0, 10.0)


def test_a_reliability_that_does_not_fit_is_said_with_the_fix(
    start_vlm: Callable[..., Any], make_camera: Callable[..., Any]
) -> None:
    vlm = start_vlm(image_topic="/qos/strict", qos_reliability="reliable", autostart=True)
    make_camera("/qos/strict", profile(False)).send()
    output = vlm.process.wait_for_output("quality of service does not match")
    # The topic may be discovered before the node's name is.
    assert re.search(
        r"match: (robot|a publisher whose name is not known yet) publishes /qos/strict as best ef",
        output,
    )
    assert "Set qos_reliability:=auto" in output
