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
    assert client["services", "request"] == outside(node["services", "reply"])
    assert client["actions", "call"] == outside(node["actions", "execute"])
    assert client["topics", "subscribe"] == outside(node["topics", "publish"]) - everybodys
    assert client["topics", "publish"] == {"/vlm/instruction"} | everybodys
