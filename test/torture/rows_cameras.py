"""Cameras that fall silent, burst and send stamps out of order, while the robot's clock stands
still or jumps.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import Any

from suite import Findings, camera_of, percentile, robot_and_node, row, wait_for

_TIMEOUT_S = 0.5
_LATENCY_S = 0.02
_MAX_AGE_S = 0.3
_BURST = 20
_CLOCKS = ("runs", "stands still", "jumps back 10 s", "jumps ahead 1 h")
_SILENT = re.compile(r"TOPIC_TIMEOUT\(701\): camera 'camera' has sent nothing for ([\d.]+) s")


class _Log:
    """Lines of the watchdog in the node's log, and when they were seen."""

    def __init__(self, path: Any) -> None:
        self._file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
        self.count = 0

    def fired(self) -> bool:
        """Whether another line has come."""
        new = len(_SILENT.findall(self._file.read()))
        self.count += new
        return new > 0

    def close(self) -> None:
        self._file.close()


class _Clock:
    """The robot's clock, as a simulator publishes it."""

    def __init__(self, robot: Any) -> None:
        from rosgraph_msgs.msg import Clock

        self._kind = Clock
        self._publisher = robot.node.create_publisher(Clock, "/clock", 1)
        self.now_ns = 10_000 * 10**9

    def go(self, change: str) -> None:
        """Tell the time after what is to happen."""
        self.now_ns += {"jumps back 10 s": -10 * 10**9, "jumps ahead 1 h": 3600 * 10**9}.get(
            change, 10**9
        )
        if change == "stands still":
            return
        message = self._kind()
        message.clock.sec, message.clock.nanosec = divmod(self.now_ns, 10**9)
        self._publisher.publish(message)


@row
def cameras_and_clocks(found: Findings) -> None:
    """Each cycle: the clock changes, a burst at 200 Hz, silence until the watchdog, one frame."""
    from librobot_vlm_ros.msg import Caption

    rng = random.Random(2)
    with robot_and_node(
        {"latency_s": _LATENCY_S},
        image_topic="/torture/image",
        tasks=["caption"],
        use_sim_time=True,
        camera_timeout_s=_TIMEOUT_S,
        max_frame_age_s=_MAX_AGE_S,
        autostart=True,
    ) as (robot, vlm):
        heard, camera, clock = vlm.listen(Caption, "caption"), camera_of(robot), _Clock(robot)
        camera.warm_up(heard, wait_for)
        log, fired_s, back_s = _Log(vlm.process.log), [], []
        for number in range(found.number(100, 4)):
            clock.go(_CLOCKS[number % len(_CLOCKS)])
            sent, last = _burst(camera, clock, rng)
            log.fired()  # what came before the burst
            fired_s.append(_until(log.fired, last, 5 * _TIMEOUT_S))
            found.check(fired_s[-1] < 5 * _TIMEOUT_S, "the watchdog did not fire")
            for result in heard:
                stamp = (result.header.stamp.sec, result.header.stamp.nanosec)
                found.check(stamp in sent, f"a result of a frame that was not sent: {stamp}")
            found.check(bool(heard), "no result of a burst")
            _check_ages(found, heard)
            heard.clear()
            start, frame = time.monotonic(), camera.send()
            back_s.append(_until(lambda: bool(heard), start, 5.0))
            found.check(bool(heard) and heard[0].header == frame.header, "no recovery at once")
            _check_ages(found, heard)
            heard.clear()
            found.cases += 1
        log.close()
        found.check(vlm.process.alive, "the node has ended")
        found.check("Traceback" not in vlm.log(), "a traceback in the log")
    found.note(watchdog_p50_s=percentile(fired_s, 0.5), recovery_p50_s=percentile(back_s, 0.5))
    found.within("watchdog_max_s", max(fired_s), 1.2 * _TIMEOUT_S)
    found.within("recovery_max_s", max(back_s), _LATENCY_S + 0.1)


def _burst(camera: Any, clock: _Clock, rng: random.Random) -> tuple[set[Any], float]:
    """Frames at 200 Hz with stamps out of order: (stamps, when the last one was sent)."""
    stamps = [divmod(clock.now_ns + k * 5_000_000, 10**9) for k in range(_BURST)]
    rng.shuffle(stamps)
    start, last = time.monotonic(), 0.0
    for number, (sec, nanosec) in enumerate(stamps):
        time.sleep(max(0.0, start + number * 0.005 - time.monotonic()))
        message = camera.message()
        message.header.stamp.sec, message.header.stamp.nanosec = sec, nanosec
        camera.publisher.publish(message)
        last = time.monotonic()
    return set(stamps), last


def _until(condition: Callable[[], bool], since: float, limit_s: float) -> float:
    """Seconds since then until the condition holds, at most `limit_s`."""
    while not condition():
        if time.monotonic() - since > limit_s:
            return limit_s
        time.sleep(0.002)
    return time.monotonic() - since


def _check_ages(found: Findings, results: list[Any]) -> None:
    """Older than the limit when the model took it up means: older than limit and inference now."""
    for result in list(results):
        age_s, spent_s = result.info.age_s, result.info.inference_s
        found.check(age_s >= 0.0, f"an age of {age_s} s")
        if found.timed:
            found.check(age_s - spent_s <= _MAX_AGE_S + 0.1, f"a frame {age_s:.2f} s old answered")
