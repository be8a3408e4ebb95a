"""The two small notations of the parameters `tasks` and `cameras`.

tasks
    [camera:]task[@rate in Hz][=prompt], as caption@2.0, front:detect@5, ground@5=red cube
cameras
    name=/topic[:raw|:compressed], as front=/front/image_raw, wrist=/wrist/image_raw:compressed
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from librobot_vlm_ros.core import (
    ErrorCode,
    RequestError,
    bad_parameter,
    clean_prompt,
    get_task,
    shortened,
)
from librobot_vlm_ros.runtime import StandingTask

MAX_RATE_HZ = 1000.0
MAX_ENTRIES = 64
MAX_HEAD_CHARS = 200
"""Camera, task and rate of an entry together."""
DEFAULT_CAMERA = "camera"
MAX_CAMERA_CHARS = 1000
_TASK = re.compile(
    r"(?:(?P<camera>[A-Za-z0-9_]+)\s*:\s*)?(?P<task>[<>A-Za-z0-9_ -]+)"
    r"(?:@(?P<rate>.*))?",
    re.DOTALL,
)
_CAMERA = re.compile(
    r"(?P<name>[A-Za-z][A-Za-z0-9_]*)\s*=\s*"
    r"(?P<topic>(?:~/|/)?[A-Za-z_][A-Za-z0-9_]*(?:/[A-Za-z_][A-Za-z0-9_]*)*)"
    r"(?::(?P<transport>raw|compressed))?"
)


@dataclass(frozen=True)
class CameraSetting:
    """One camera."""

    name: str
    topic: str
    """What to subscribe to; for compressed images it ends in `/compressed`."""
    compressed: bool


def parse_tasks(entries: Sequence[str], cameras: Sequence[str]) -> tuple[StandingTask, ...]:
    """The standing tasks that `entries` name, called as they are written there without the rate.

    Raises `RequestError`: UNKNOWN_TASK, UNKNOWN_CAMERA, or BAD_PARAMETER for a rate or form that is
    no good and for a task given twice for one camera and prompt.
    """
    _check_count("tasks", entries)
    tasks: list[StandingTask] = []
    for entry in entries:
        item = _parse_task(entry, cameras)
        if any(
            (t.task, t.camera, t.prompt) == (item.task, item.camera, item.prompt) for t in tasks
        ):
            raise _bad("tasks", entry, "that task stands there twice", "Keep one of the two.")
        tasks.append(item)
    return tuple(tasks)


def _parse_task(entry: str, cameras: Sequence[str]) -> StandingTask:
    bad = partial(_bad, "tasks", entry)
    # What may be long is cut off first: the pattern sees nothing of a prompt that a client sent.
    head, equals, prompt = entry.strip().partition("=")
    found = _TASK.fullmatch(head) if len(head) <= MAX_HEAD_CHARS else None
    if found is None:
        raise bad("it is not of the form [camera:]task[@rate][=prompt]", _TASK_HINT)
    spec = get_task(found["task"].strip())
    rate_text = found["rate"]
    try:
        rate_hz = 0.0 if rate_text is None else float(rate_text)
    except ValueError:
        rate_hz = math.nan
    if not 0.0 <= rate_hz <= MAX_RATE_HZ or (rate_text is not None and rate_hz == 0.0):
        raise bad(f"the rate is no number above 0 and up to {MAX_RATE_HZ:g}", _TASK_HINT)
    camera = found["camera"] or ""
    if camera and camera not in cameras:
        raise RequestError(
            ErrorCode.UNKNOWN_CAMERA,
            f"tasks entry '{shortened(entry)}' names the camera '{camera}'",
            f"Cameras are: {', '.join(cameras)}.",
        )
    if spec.needs_region:
        raise bad("that task needs a region", "Ask for it with ~/query, giving the region.")
    prompt = clean_prompt(prompt.lstrip() if equals else "", required=False)
    name = f"{camera}:{spec.name}" if camera else spec.name
    name += f"={prompt}" if prompt else ""
    return StandingTask(spec.name, prompt, rate_hz, camera, name=name)


def parse_cameras(
    entries: Sequence[str], image_topic: str, image_transport: str
) -> tuple[CameraSetting, ...]:
    """The cameras that `entries` name, or the one at `image_topic` when there are none.

    Raises `RequestError` (BAD_PARAMETER) for another form, a name given twice or a topic given
    twice.
    """
    if not entries:
        return (_camera(DEFAULT_CAMERA, image_topic, image_transport),)
    _check_count("cameras", entries)
    cameras: list[CameraSetting] = []
    for entry in entries:
        found = _CAMERA.fullmatch(entry.strip()) if len(entry) <= MAX_CAMERA_CHARS else None
        if found is None:
            why = "it is not of the form name=/topic[:raw|:compressed]"
            raise _bad("cameras", entry, why, _CAMERA_HINT)
        item = _camera(found["name"], found["topic"], found["transport"] or image_transport)
        for other in cameras:
            if item.name == other.name or item.topic == other.topic:
                raise _bad("cameras", entry, "that name or topic stands there twice", _CAMERA_HINT)
        cameras.append(item)
    return tuple(cameras)


def _camera(name: str, topic: str, transport: str) -> CameraSetting:
    compressed = transport == "compressed"
    if compressed and not topic.endswith("/compressed"):
        topic = f"{topic}/compressed"  # image_transport's naming
    return CameraSetting(name, topic, compressed)


_TASK_HINT = "Examples: caption@2.0, front:detect@5, ground@5=red cube."
_CAMERA_HINT = "Examples: front=/front/image_raw, wrist=/wrist/image_raw:compressed."


def _check_count(name: str, entries: Sequence[str]) -> None:
    if len(entries) > MAX_ENTRIES:
        raise bad_parameter(
            f"parameter {name} has {len(entries)} entries, expected at most {MAX_ENTRIES}"
        )


def _bad(name: str, entry: str, why: str, hint: str) -> RequestError:
    return bad_parameter(f"{name} entry '{shortened(entry)}': {why}", hint)
