"""The figures of `node_check` from what was heard, and the limits they are held to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from librobot_vlm_ros.runtime.stats import percentile

_SHARE = 1.1
_MARGIN_S = 0.02
_OVERHEAD_S = 0.002
#: Periods of the camera that the slow model takes.
SLOWER = 5


@dataclass(frozen=True)
class Answer:
    """One result of a standing task."""

    camera: str
    stamp_ns: int
    age_s: float
    """From the frame's arrival to publication, as the node says it."""
    end_to_end_s: float
    """From the camera's publishing to the result's arrival, as seen from outside."""
    error_code: int = 0
    model_s: float = 0.0
    """What the model took of it."""


@dataclass(frozen=True)
class Ask:
    """One query: seconds until its answer, and the answer's error code."""

    seconds: float
    error_code: int = 0


def stale(answers: Iterable[Answer]) -> int:
    """Results of a frame that is not newer than the one answered before for the same camera."""
    newest: dict[str, int] = {}
    count = 0
    for answer in answers:
        if answer.stamp_ns <= newest.get(answer.camera, -1):
            count += 1
        newest[answer.camera] = max(answer.stamp_ns, newest.get(answer.camera, -1))
    return count


def summary(
    answers: Sequence[Answer],
    asks: Sequence[Ask],
    *,
    names: Sequence[str],
    sent: int,
    received: Mapping[str, int],
    cpu_share: float,
) -> dict[str, Any]:
    """All figures; times in seconds, `cpu_share` in parts of one core. NaN becomes None."""
    counts = Counter(dict.fromkeys(names, 0))
    counts.update(answer.camera for answer in answers)
    fewest = min(counts.values())
    figures: dict[str, Any] = {
        "frames_sent": sent,
        "frames_in": sum(received.values()),
        "lost_frames": sent - sum(received.values()),
        "results": len(answers),
        "result_errors": sum(1 for answer in answers if answer.error_code),
        "stale_results": stale(answers),
        "age_p50_s": percentile((answer.age_s for answer in answers), 50),
        "age_p99_s": percentile((answer.age_s for answer in answers), 99),
        "end_to_end_p99_s": percentile((answer.end_to_end_s for answer in answers), 99),
        "per_camera": dict(counts),
        "per_camera_share": max(counts.values()) / fewest if fewest else math.inf,
        "queries": len(asks),
        "query_errors": sum(1 for ask in asks if ask.error_code),
        "query_p99_s": percentile((ask.seconds for ask in asks), 99),
        "cpu_share": cpu_share,
    }
    return {key: _plain(value) for key, value in figures.items()}


def _plain(value: Any) -> Any:
    """As JSON takes it: NaN and infinity become None."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None


def single_summary(
    idle: Sequence[Answer],
    slow: Sequence[Answer],
    slow_s: float,
) -> dict[str, Any]:
    """Figures of the runs with one camera: `idle`, of a model that takes no time, and `slow`, of
    one that takes `slow_s` seconds.

    The node's overhead is a result's age at publication less the model's own time: the callback,
    the checks, the way to the model's thread and back, the message.
    """
    overheads = [answer.age_s - answer.model_s for answer in idle]
    ages = [answer.age_s for answer in slow]
    figures = {
        "overhead_results": len(idle),
        "overhead_p50_s": percentile(overheads, 50),
        "overhead_p99_s": percentile(overheads, 99),
        "slow_model_s": slow_s,
        "slow_results": len(slow),
        "slow_age_p50_s": percentile(ages, 50),
        "slow_age_p99_s": percentile(ages, 99),
    }
    return {key: _plain(value) for key, value in figures.items()}


def single_limits(slow_s: float, rate_hz: float) -> dict[str, float]:
    """The most that a figure of `single_summary` may be."""
    return {"overhead_p50_s": _OVERHEAD_S, "slow_age_p99_s": 2 * slow_s + 1 / rate_hz}


def limits(latency_s: float, rate_hz: float) -> dict[str, float]:
    """The most that a figure may be.

    The age of a result: the model is busy with another camera's frame, then with this one; a newer
    frame may have come just after this one was taken.
    """
    return {
        "lost_frames": 0,
        "stale_results": 0,
        "result_errors": 0,
        "query_errors": 0,
        "age_p99_s": 2 * latency_s + 1 / rate_hz + _MARGIN_S,
        "per_camera_share": _SHARE,
    }


def misses(figures: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """Each figure that is outside its limit, in words."""
    return [
        f"{name} is {figures[name]}, expected at most {limit:g}"
        for name, limit in limits.items()
        if figures[name] is None or figures[name] > limit
    ]
