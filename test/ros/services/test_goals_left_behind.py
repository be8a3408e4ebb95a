"""A goal whose client went before it heard that it was accepted: rclpy would keep it for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.ros


class Handle:
    """A goal's handle as far as this goes."""

    def __init__(self, status: int) -> None:
        self.status, self.ended, self.result = status, "", None

    def execute(self, callback: Any) -> None:
        self.result = callback(self)

    def abort(self) -> None:
        self.ended = "aborted"


def request_a_goal(monkeypatch: pytest.MonkeyPatch, status: int) -> Handle:
    """rclpy takes a goal request and leaves the goal in this state."""
    from rclpy.action import ActionServer

    from librobot_vlm_ros.ros.services.generate import _ThreadedActionServer

    async def taken(_server: Any, _request: Any) -> None:
        """The client has gone: rclpy returns before it hands the goal on."""

    monkeypatch.setattr(ActionServer, "_execute_goal_request", taken)
    uuid, handle = bytes(range(16)), Handle(status)
    server = object.__new__(_ThreadedActionServer)
    server._goal_handles = {uuid: handle}
    goal = SimpleNamespace(goal_id=SimpleNamespace(uuid=uuid))
    with pytest.raises(StopIteration):
        server._execute_goal_request((None, goal)).send(None)
    return handle


def test_it_is_ended_with_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from action_msgs.msg import GoalStatus

    handle = request_a_goal(monkeypatch, GoalStatus.STATUS_ACCEPTED)
    assert handle.ended == "aborted"
    assert handle.result.error_code == 501


def test_a_goal_that_runs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from action_msgs.msg import GoalStatus

    assert request_a_goal(monkeypatch, GoalStatus.STATUS_EXECUTING).ended == ""
