"""Wild clients: more calls than can be answered, and clients that end in the middle."""

from __future__ import annotations

import signal
import time
from typing import Any

from suite import (
    Findings,
    Watched,
    accepted_goal,
    camera_of,
    figures_of,
    robot_and_node,
    row,
    started,
    wait_for,
)

from librobot_vlm_ros.core import ErrorCode

_RATE = 1000.0
_RESULT_KEPT_S = 10.0
_GOAL_S = 3.0  # as dying_client.py asks


@row
def service_flood(found: Findings) -> None:
    """1,000 queries with an image a second at a slow model, the state asked all the while."""
    seconds = max(3.0, 60.0 * found.scale)
    rate = _RATE if found.timed else 200.0  # a busy machine has no time for more
    with robot_and_node({"latency_s": 0.2}, tasks=[""], autostart=True) as (_, vlm):
        held = Watched(vlm.process.pid)
        start = held.resident_mib(), held.threads()
        flood = started("calling.py", f"{vlm.name}/query", "--rate", rate, "--seconds", seconds)
        state = started("calling.py", f"{vlm.name}/get_state", "--rate", 10, "--seconds", seconds)
        asked, watched = figures_of(flood, seconds + 90.0), figures_of(state, seconds + 90.0)
        found.check(vlm.process.alive, "the node has ended")
        end = held.resident_mib(), held.threads()
        other = vlm.log().count("Traceback")
    codes = asked["codes"]
    busy, fine = codes.get(str(int(ErrorCode.BUSY))), codes.get("0")
    found.cases = asked["calls"]
    found.note(calls_per_s=asked["calls"] / seconds, get_state_calls=watched["calls"])
    found.check(asked["lost"] == 0, f"{asked['lost']} calls got no answer", asked["lost"])
    found.check(watched["lost"] == 0, f"{watched['lost']} get_state calls got no answer")
    known = {"0", str(int(ErrorCode.BUSY))}
    found.check(set(codes) <= known, f"codes {sorted(codes)}")
    found.check(fine is not None and busy is not None, "neither answers nor refusals")
    found.check(other == 0, "a traceback in the log")
    found.note(answered=fine["count"] if fine else 0, lost=asked["lost"])
    found.check(end[1] <= start[1] + 1, f"threads before {start[1]}, after {end[1]}")
    if busy is not None:
        found.within("busy_p99_ms", busy["p99_ms"], 10.0)
    found.within("get_state_p99_ms", watched["codes"]["0"]["p99_ms"], 250.0)
    found.within("memory_growth_mib", end[0] - start[0], 64.0, time=False)


@row
def clients_killed(found: Findings) -> None:
    """A client killed at five points of an action: no goal is left after its deadline."""
    times = found.number(20, 1)
    with robot_and_node({"latency_s": 0.3}, tasks=[""], autostart=True, queue_size=64) as (
        robot,
        vlm,
    ):
        statuses = _statuses(robot, vlm)
        for _ in range(times):
            clients = [started("dying_client.py", vlm.name, point) for point in range(1, 6)]
            for point, client in enumerate(clients, 1):
                _, errors = client.communicate(timeout=120.0)
                found.cases += 1
                killed = client.returncode == -signal.SIGKILL
                found.check(killed, f"point {point} was not reached: {errors[-300:]}")
        time.sleep(_GOAL_S + 1.0)
        active = [s for s in statuses[-1].status_list if s.status in (1, 2, 3)] if statuses else []
        found.check(not active, f"{len(active)} goals are active after their deadline", len(active))
        if found.timed:  # the quick part has no time for it
            time.sleep(_RESULT_KEPT_S + 10.0)
            left = _left(robot, vlm, statuses)
            found.check(left == 0, f"{left} goal handles are left", left)
            found.note(goal_handles_left=left)
        found.check(vlm.process.alive, "the node has ended")
        found.check("Traceback" not in vlm.log(), "a traceback in the log")
    found.note(points=5, times_each=times, goals_seen=len(_ids(statuses)))


def _statuses(robot: Any, vlm: Any) -> list[Any]:
    from action_msgs.msg import GoalStatusArray
    from rclpy.qos import qos_profile_action_status_default

    topic = f"{vlm.name}/generate/_action/status"
    return robot.listen(GoalStatusArray, topic, qos_profile_action_status_default)


def _ids(statuses: list[Any]) -> set[bytes]:
    return {
        bytes(status.goal_info.goal_id.uuid) for array in statuses for status in array.status_list
    }


def _left(robot: Any, vlm: Any, statuses: list[Any]) -> int:
    """Goals that the server still holds besides one of ours: its list comes with the next goal."""
    from librobot_vlm_ros.action import Generate
    from rclpy.action import ActionClient

    client = ActionClient(robot.node, Generate, f"{vlm.name}/generate")
    try:
        wait_for(client.server_is_ready, 20.0, "the action")
        heard = len(statuses)
        image = camera_of(robot, "/torture/unused").message()
        goal = Generate.Goal(task="caption", use_image=True, image=image)
        ended = accepted_goal(client, goal).get_result_async()
        wait_for(ended.done, 30.0, "the goal's result")
        wait_for(lambda: len(statuses) > heard, 10.0, "the list of goals")
        return len(statuses[-1].status_list) - 1
    finally:
        client.destroy()
