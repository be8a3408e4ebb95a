"""The node's life: transitions without end, models out of memory or without end, signals."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

from suite import (
    Findings,
    Watched,
    accepted_goal,
    camera_of,
    figures_of,
    percentile,
    robot_and_node,
    row,
    started,
    wait_for,
)

from librobot_vlm_ros.core import ErrorCode


def _query(robot: Any, vlm: Any, **fields: Any) -> Any:
    """A function that sends one query with an image; what it gives waits for the answer."""
    from librobot_vlm_ros.srv import Query

    image = camera_of(robot, "/torture/unused").message()
    fields = {"task": "caption", "use_image": True, "image": image, **fields}
    return lambda: vlm.call_later(Query, "query", **fields)


def _publishers(robot: Any, vlm: Any) -> int:
    names = robot.node.get_publisher_names_and_types_by_node("vlm", "/torture")
    return len(names)


@row
def lifecycle_storm(found: Findings) -> None:
    """Random transitions, half of them invalid: each is answered, the node stays as it was."""
    rng = random.Random(1)
    labels = ["configure", "activate", "deactivate", "cleanup"]
    found.cases = found.number(1000, 20)
    with robot_and_node(image_topic="/torture/image", tasks=["caption"]) as (robot, vlm):
        held, accepted = Watched(vlm.process.pid), 0
        for label in labels * 5:  # warm-up
            vlm.change_state(label, 60.0)
        before = held.threads(), _publishers(robot, vlm), held.resident_mib()
        watcher = started("calling.py", f"{vlm.name}/get_state", "--rate", 10, "--seconds", 5)
        for _ in range(found.cases):
            accepted += vlm.change_state(rng.choice(labels), 60.0)
        watched = figures_of(watcher, 90.0)
        for label in ("deactivate", "cleanup"):
            vlm.change_state(label, 60.0)
        found.check(vlm.process.alive, "the node has ended")
        after = held.threads(), _publishers(robot, vlm), held.resident_mib()
    found.check(after[0] <= before[0], f"threads before {before[0]}, after {after[0]}")
    found.check(after[1] == before[1], f"publishers before {before[1]}, after {after[1]}")
    found.check(watched["lost"] == 0, f"{watched['lost']} get_state calls got no answer")
    found.note(accepted=accepted, threads=after[0], publishers=after[1])
    found.within("memory_growth_mib", after[2] - before[2], 32.0, time=False)


@row
def out_of_memory(found: Findings) -> None:
    """The request fails coded, the next succeeds; three in a row: error processing and back."""
    with robot_and_node({"oom_every": 2}, tasks=[""], autostart=True) as (robot, vlm):
        ask, slowest = _query(robot, vlm), 0.0
        for number in range(found.number(100, 4)):
            start = time.monotonic()
            answer = ask()(30.0)
            expected = ErrorCode.OUT_OF_MEMORY if number % 2 else ErrorCode.OK
            found.cases += 1
            found.check(answer.error_code == expected, f"request {number}: {answer.error_msg}")
            if not number % 2 and number:  # the one after a failure
                slowest = max(slowest, time.monotonic() - start)
        found.check(vlm.process.alive, "the node has ended")
    found.within("next_after_failure_max_s", slowest, 1.0)
    with robot_and_node({"oom_every": 1}, tasks=[""], autostart=True) as (robot, vlm):
        watcher = started("calling.py", f"{vlm.name}/get_state", "--rate", 20, "--seconds", 6)
        for _ in range(found.number(5, 1)):
            ask = _query(robot, vlm)
            codes = [ask()(30.0).error_code for _ in range(3)]
            found.cases += 1
            found.check(codes == [ErrorCode.OUT_OF_MEMORY] * 3, f"codes {codes}")
            vlm.wait_for_state("unconfigured", 20.0)
            found.check(vlm.change_state("configure", 30.0), "configuring after recovery failed")
            found.check(vlm.change_state("activate", 30.0), "activating after recovery failed")
        watched = figures_of(watcher, 90.0)
        found.check(watched["lost"] == 0, f"{watched['lost']} get_state calls got no answer")
        found.check(vlm.process.alive, "the node has ended")


@row
def slow_model(found: Findings) -> None:
    """An answer of 30 s: services and diagnostics answer throughout, cancelling takes a token."""
    from diagnostic_msgs.msg import DiagnosticArray

    latency_s = max(6.0, 30.0 * min(1.0, found.scale))
    with robot_and_node({"latency_s": latency_s}, tasks=[""], autostart=True) as (robot, vlm):
        heard = robot.listen(DiagnosticArray, "/diagnostics")
        answer = _query(robot, vlm, timeout_s=600.0)()
        watcher = started(
            "calling.py", f"{vlm.name}/get_state", "--rate", 10, "--seconds", latency_s - 4
        )
        found.check(answer(latency_s + 30.0).success, "the slow answer failed")
        state = figures_of(watcher, 60.0)
        spoken = len(heard)
        found.cases += state["calls"]
        found.check(state["lost"] == 0, f"{state['lost']} get_state calls got no answer")
        found.check(spoken >= latency_s - 3, f"{spoken} diagnostics in {latency_s:g} s")
        found.within("get_state_p99_ms", state["codes"]["0"]["p99_ms"], 250.0)
        # A caption of the fake model has 7 words: a token takes a seventh of the time.
        token_s, waits = latency_s / 7, []
        for _ in range(found.number(3, 1)):
            waits.append(_cancelled_after(robot, vlm))
            found.cases += 1
        found.within("cancel_settled_max_s", max(waits), token_s + 1.0, time=False)
        start = time.monotonic()
        _query(robot, vlm, timeout_s=600.0)()
        time.sleep(0.5)
        found.check(vlm.change_state("deactivate", 30.0), "deactivating failed")
        found.within("deactivate_s", time.monotonic() - start, 2 * token_s + 2.0, time=False)


def _cancelled_after(robot: Any, vlm: Any) -> float:
    """Seconds from cancelling a running goal until its result is there."""
    from librobot_vlm_ros.action import Generate
    from rclpy.action import ActionClient

    client = ActionClient(robot.node, Generate, f"{vlm.name}/generate")
    try:
        wait_for(client.server_is_ready, 20.0, "the action")
        image = camera_of(robot, "/torture/unused").message()
        goal = Generate.Goal(task="caption", use_image=True, image=image, timeout_s=600.0)
        handle = accepted_goal(client, goal)
        ended = handle.get_result_async()
        time.sleep(0.5)  # the model's thread shows in no interface: time for it to begin
        start = time.monotonic()
        handle.cancel_goal_async()
        wait_for(ended.done, 60.0, "the cancelled goal's result")
        assert ended.result().result.error_code == ErrorCode.CANCELLED
        return time.monotonic() - start
    finally:
        client.destroy()


@row
def signals(found: Findings) -> None:
    """SIGINT and SIGTERM in the middle of an inference: exit code 0 within 5 s, nothing left."""
    times = []
    for number in range(found.number(10, 2)):
        with robot_and_node({"latency_s": 6000}, tasks=[""], autostart=True) as (robot, vlm):
            _query(robot, vlm)()
            time.sleep(0.5)  # the model's thread shows in no interface: time for it to begin
            start = time.monotonic()
            vlm.process.send([signal.SIGINT, signal.SIGTERM][number % 2])
            code = vlm.process.wait(20.0)
            times.append(time.monotonic() - start)
            found.cases += 1
            found.check(code == 0, f"exit code {code}")
            found.check("Traceback" not in vlm.log(), "a traceback in the log")
            found.check(not _group(vlm.process.pid), "a process of the node is left")
    found.note(end_p50_s=percentile(times, 0.5))
    found.within("end_max_s", max(times), 5.0)


def _group(number: int) -> list[int]:
    """Processes of a process group that are alive."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == number and fields[0] not in "ZX":
            alive.append(int(path.parent.name))
    return alive
