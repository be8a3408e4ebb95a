"""Transitions: each is answered, bounded in time, and none takes the node down."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.ros


@pytest.fixture(scope="module")
def vlm(start_vlm: Callable[..., Any]) -> Any:
    return start_vlm()


def test_a_full_round_and_a_second_one(vlm: Any) -> None:
    for _ in range(2):
        for label, state in (
            ("configure", "inactive"),
            ("activate", "active"),
            ("deactivate", "inactive"),
            ("cleanup", "unconfigured"),
        ):
            assert vlm.change_state(label), vlm.log()
            assert vlm.state == state


@pytest.mark.parametrize("label", ["activate", "deactivate", "cleanup", "no_such_thing", "create"])
def test_an_invalid_transition_is_answered_and_logged_and_the_node_lives(
    vlm: Any, label: str
) -> None:
    vlm.wait_for_state("unconfigured")
    assert not vlm.change_state(label)
    assert "INVALID_TRANSITION(700)" in vlm.log()
    assert vlm.state == "unconfigured"


def test_an_invalid_transition_by_number_is_answered(vlm: Any) -> None:
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    for number in (Transition.TRANSITION_ACTIVATE, Transition.TRANSITION_ON_CONFIGURE_SUCCESS, 250):
        response = vlm.call(ChangeState, "change_state", transition=Transition(id=number))
        assert not response.success
    assert vlm.state == "unconfigured"


def test_a_model_that_is_not_there_is_said_and_another_can_be_loaded(vlm: Any) -> None:
    assert vlm.set_parameters(model="fakee") == []
    assert not vlm.change_state("configure")
    assert vlm.state == "unconfigured"
    assert "UNKNOWN_MODEL(300)" in vlm.log()
    assert vlm.set_parameters(model="fake") == []
    assert vlm.change_state("configure")
    assert vlm.change_state("cleanup")


def test_the_node_answers_while_a_model_loads_and_loading_can_be_cancelled(vlm: Any) -> None:
    assert vlm.set_parameters(model_config='{"load_s": 60.0}') == []
    configuring = vlm.change_state_later("configure")
    vlm.wait_for_state("configuring")
    started = time.monotonic()
    assert vlm.state == "configuring"
    assert not vlm.change_state("activate")  # one at a time, and said at once
    assert vlm.change_state("cleanup")
    assert not configuring(10.0).success
    assert time.monotonic() - started < 25.0  # long before the model would be there
    assert vlm.state == "unconfigured"
    assert "LOAD_CANCELLED(314)" in vlm.log()


def test_loading_that_takes_too_long_fails_in_time(vlm: Any) -> None:
    assert vlm.set_parameters(model_config='{"load_s": 30.0}', load_timeout_s=0.5) == []
    started = time.monotonic()
    assert not vlm.change_state("configure")
    assert time.monotonic() - started < 15.0
    assert vlm.state == "unconfigured"
    assert "Raise load_timeout_s" in vlm.log()
    assert vlm.set_parameters(model_config="", load_timeout_s=600.0) == []


def test_a_wrong_start_value_is_said_and_can_be_put_right(start_vlm: Callable[..., Any]) -> None:
    vlm = start_vlm(tasks=["capton@2"], camera_timeout_s=-1.0, autostart=True)
    vlm.process.wait_for_output("autostart stopped")
    assert "UNKNOWN_TASK(202)" in vlm.log()
    assert "Did you mean caption" in vlm.log()
    assert vlm.state == "unconfigured"
    assert vlm.set_parameters(tasks=["caption@2"], camera_timeout_s=1.0) == []
    assert vlm.change_state("configure"), vlm.log()


def test_a_model_that_breaks_again_and_again_sends_the_node_to_unconfigured_and_it_can_come_back(
    start_vlm: Callable[..., Any], make_camera: Callable[..., Any]
) -> None:
    vlm = start_vlm(
        fake={"raise_every": 1}, image_topic="/broken/image", tasks=["caption"], autostart=True
    )
    camera = make_camera("/broken/image")
    camera.wait_for_listener(vlm.wait_for)

    def send_and_see() -> bool:
        camera.send()
        return bool(vlm.state == "unconfigured")

    vlm.wait_for(send_and_see, 15.0, "error processing")
    assert "INFERENCE_FAILED" in vlm.log() or "INTERNAL" in vlm.log()
    assert vlm.set_parameters(model_config="") == []
    assert vlm.change_state("configure"), vlm.log()
    assert vlm.change_state("activate"), vlm.log()


def test_shutdown_finalizes_from_every_state(start_vlm: Callable[..., Any]) -> None:
    from librobot_vlm_ros.srv import Query

    vlm = start_vlm(autostart=True)
    vlm.wait_for_state("active")
    assert vlm.change_state("shutdown")
    assert vlm.state == "finalized"
    assert not vlm.change_state("configure")
    assert vlm.process.alive
    answer = vlm.call(Query, "query", task="caption")
    assert "the node is finalized. It was shut down for good" in answer.error_msg
