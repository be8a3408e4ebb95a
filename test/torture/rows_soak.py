"""Hours of mixed load: cameras, queries, goals, parameters, bad images."""

from __future__ import annotations

import itertools
import time
from typing import Any

from suite import Findings, Watched, accepted_goal, camera_of, robot_and_node, row, slope, wait_for

_WARM_UP_SHARE = 0.1
_WARM_UP_CALLS = 1500
_SLOPE_MIB_PER_H = 1.0


@row
def soak(found: Findings) -> None:
    """Resident memory and threads stay level: memory that the process has taken, for pages of files
    (libraries) come and go. A short soak's slope is what the noise allows: the limit counts from
    half an hour on.
    """
    from librobot_vlm_ros.msg import Caption

    seconds, points, whole, threads = found.seconds, [], [], []
    with robot_and_node(
        {"latency_s": 0.02},
        image_topic="/torture/image",
        tasks=["caption", "detect@5.0"],
        autostart=True,
    ) as (robot, vlm):
        heard = vlm.listen(Caption, "caption")
        load = _Load(robot, vlm)
        load.camera.warm_up(heard, wait_for)
        load.warm_up(found, int(min(_WARM_UP_CALLS, 5 * seconds)))
        heard.clear()
        held, begun = Watched(vlm.process.pid), time.monotonic()
        seen = 0
        for number in itertools.count():
            now = time.monotonic() - begun
            if now >= seconds:
                break
            load.step(found, number)
            seen, _ = seen + len(heard), heard.clear()
            if number % 20 == 0:
                points.append((now / 3600.0, held.own_mib()))
                whole.append(held.resident_mib())
                threads.append(held.threads())
            time.sleep(0.03)
        found.cases = number
        found.check(vlm.process.alive, "the node has ended")
        found.check("Traceback" not in vlm.log(), "a traceback in the log")
        found.check(seen > seconds, f"{seen} results in {seconds:.0f} s")
    level = [point for point in points if point[0] >= _WARM_UP_SHARE * seconds / 3600.0]
    settled = threads[len(threads) // 4 :]
    found.note(minutes=seconds / 60.0, results=seen, threads=[min(settled), max(settled)])
    found.check(max(settled) - min(settled) <= 2, f"threads {min(settled)} to {max(settled)}")
    found.note(growth_after_warm_up_mib=level[-1][1] - level[0][1])
    found.note(growth_with_files_mib=whole[-1] - whole[len(points) - len(level)])
    quarters = [level[len(level) * n // 4][1] for n in range(4)] + [level[-1][1]]
    found.note(mib_by_quarter=[round(mib, 2) for mib in quarters])
    if seconds >= 1800:
        found.within("slope_mib_per_h", slope(level), _SLOPE_MIB_PER_H, time=False)
    else:  # a few pages more or less would be many MiB an hour
        found.note(slope_mib_per_h=slope(level))
        found.within("growth_mib", max(p[1] for p in level) - level[0][1], 8.0, time=False)


class _Load:
    """What a robot does all day, and what it should not do."""

    def __init__(self, robot: Any, vlm: Any) -> None:
        self._robot, self._vlm = robot, vlm
        self.camera = camera_of(robot)
        self._words = ("red cube", "blue ball", "the mug on the left")

    def warm_up(self, found: Findings, calls: int) -> None:
        """Everything many times over: what each kind of work needs most at once stays allocated,
        and at the rates of a soak it would take hours until that has been.
        """
        for kind in (self._query, self._nonsense, self._parameter, self._list, self._bad):
            for number in range(calls):
                self.camera.send()
                kind(found, number)
        for number in range(calls // 10):
            self.camera.send()
            self._goal(found, number)

    def step(self, found: Findings, number: int) -> None:
        """About 30 a second."""
        self.camera.send()
        for kind, period, phase in (
            (self._query, 10, 1),
            (self._nonsense, 10, 3),
            (self._parameter, 50, 5),
            (self._list, 50, 7),
            (self._bad, 50, 9),
            (self._goal, 100, 11),
        ):
            if number % period == phase:
                kind(found, number)

    def _query(self, found: Findings, _number: int) -> None:
        from librobot_vlm_ros.srv import Query

        answer = self._vlm.call(Query, "query", 30.0, task="caption")
        found.check(answer.success, answer.error_msg)

    def _nonsense(self, found: Findings, _number: int) -> None:
        from librobot_vlm_ros.srv import Query

        answer = self._vlm.call(Query, "query", 30.0, task="nonsense")
        found.check(not answer.success, "a task that is none was answered")

    def _parameter(self, found: Findings, number: int) -> None:
        words = self._words[number // 50 % len(self._words)]
        wrong = self._vlm.set_parameters(instruction=words)
        found.check(not wrong, wrong)

    def _list(self, found: Findings, _number: int) -> None:
        from librobot_vlm_ros.srv import ListModels

        models = self._vlm.call(ListModels, "list_models", 30.0).models
        found.check(len(models) > 0, "no models")

    def _bad(self, _found: Findings, _number: int) -> None:
        image = self.camera.message()
        image.step = 7
        self.camera.publisher.publish(image)

    def _goal(self, found: Findings, _number: int) -> None:
        from librobot_vlm_ros.action import Generate
        from rclpy.action import ActionClient

        if not hasattr(self, "_client"):
            self._client = ActionClient(self._robot.node, Generate, f"{self._vlm.name}/generate")
            wait_for(self._client.server_is_ready, 20.0, "the action")
        ended = accepted_goal(self._client, Generate.Goal(task="caption")).get_result_async()
        wait_for(ended.done, 20.0, "the goal's result")
        found.check(ended.result().result.success, ended.result().result.error_msg)
