"""What one run of `annotate` is to do: the user's options, and the cameras and topics they mean.

A `Job` is plain data: it goes to worker processes, and its `fingerprint` tells a run that can go on
where another stopped from one that was asked something else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.bags import BagReader
from librobot_vlm_ros.bags.writer import Storage
from librobot_vlm_ros.core import BagError, ErrorCode, RequestError, get_task
from librobot_vlm_ros.replay.message_types import IMAGE_TYPES

if TYPE_CHECKING:
    from librobot_vlm_ros.ros.parameters.settings import Settings
    from librobot_vlm_ros.runtime import StandingTask

TEXT_TYPE = "std_msgs/msg/String"
_ENDINGS = ("compressed", "image_raw", "image_rect", "image_rect_color", "image_color", "image")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks for."""

    bags: tuple[Path, ...]
    out: Path
    parameters: Mapping[str, Any]
    """Of the node (`Settings`): model, tasks, limits."""
    topics: tuple[str, ...] = ()
    """Image topics, as /topic or camera=/topic; none means all."""
    instruction_topic: str | None = None
    """"" for none, None for the usual one where a bag has it."""
    node: str = "/vlm"
    """Result topics are named as the node of this name would name them."""
    every: int = 1
    """Take each `every`-th frame of a camera."""
    rate_hz: float = 0.0
    """At most so many frames of each camera per second of its stamps; 0 = all."""
    salvage: bool = False
    storage: Storage | None = None
    """Of the new bag; None is that of the first one read."""
    workers: int = 1
    """Processes, at most."""
    overwrite: bool = False
    resume: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. Topic names are absolute."""

    options: Options
    cameras: Mapping[str, str]
    """Image topic -> name of its camera."""
    twins: Mapping[str, str]
    """Compressed topic that is left out -> the raw topic with the same frames."""
    instruction_topic: str
    """"" where there is none."""

    def settings(self) -> Settings:
        """The node's settings. Raises `RequestError` for a bad value."""
        from librobot_vlm_ros.ros.parameters.settings import Settings

        cameras = tuple(f"{name}=/{name}" for name in self.cameras.values())
        return Settings(**self.options.parameters, cameras=cameras)

    def fingerprint(self) -> dict[str, Any]:
        """All that the results depend on, in JSON's own types."""
        options = self.options
        return {
            "bags": [[str(path.absolute()), files_of(path)] for path in options.bags],
            "salvage": options.salvage,
            "parameters": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in sorted(options.parameters.items())
            },
            "cameras": dict(sorted(self.cameras.items())),
            "instruction_topic": self.instruction_topic,
            "node": options.node,
            "every": options.every,
            "rate": options.rate_hz,
        }


def files_of(path: Path) -> list[list[Any]]:
    """[name, bytes, time of the last change] of each file of a bag."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = {file.name: file.stat() for file in files if file.is_file()}
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]


@contextlib.contextmanager
def open_bags(paths: Sequence[Path], *, salvage: bool) -> Iterator[list[BagReader]]:
    """The bags, open. Raises `BagError` as `BagReader` does."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(BagReader(path, salvage=salvage)) for path in paths]


def topic_types(readers: Sequence[BagReader]) -> dict[str, str]:
    """Type of each topic of the bags; raises `BagError` (WRONG_TYPE) where two bags disagree."""
    types: dict[str, str] = {}
    for reader in readers:
        for topic in reader.topics:
            known = types.setdefault(topic.name, topic.type)
            if known != topic.type:
                raise BagError(
                    ErrorCode.WRONG_TYPE,
                    f"topic {topic.name} holds {topic.type} in {reader.path} and {known} in "
                    "another of the bags",
                    "Annotate them one by one.",
                )
    return types


def make_job(options: Options, types: Mapping[str, str]) -> Job:
    """The job for bags with topics of these types.

    `options.topics` holds `/topic` or `name=/topic`; empty means every image topic, except for the
    compressed twin of a raw one: those are the same frames. Raises `BagError` TOPIC_NOT_IN_BAG and
    WRONG_TYPE, `RequestError` (BAD_PARAMETER) for a name or topic that stands there twice.
    """
    asked: Sequence[str] = options.topics
    images = {name for name, kind in types.items() if kind in IMAGE_TYPES}
    twins: dict[str, str] = {}
    if not asked:
        pairs = {f"{raw}/compressed": raw for raw in images}
        twins = {name: raw for name, raw in pairs.items() if name in images}
        asked = sorted(images - set(twins))
        if not asked:
            raise BagError(
                ErrorCode.TOPIC_NOT_IN_BAG,
                "there is no topic of images: expected sensor_msgs/msg/Image or CompressedImage",
                f"Topics are: {', '.join(sorted(types)) or 'none at all'}.",
            )
    cameras: dict[str, str] = {}
    for entry in asked:
        name, topic = _pair(entry, types)
        only = "camera" if len(asked) == 1 else ""  # what the node calls its only camera
        chosen = name or only or _name_of(topic, cameras.values())
        if topic in cameras or chosen in cameras.values():
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"the topic {topic} or the camera name {chosen} stands there twice",
                "Examples: --topics /front/image_raw wrist=/wrist/image_raw/compressed.",
            )
        cameras[topic] = chosen
    instruction_topic = _find_instruction_topic(types, options.instruction_topic, options.node)
    return Job(options, cameras, twins, instruction_topic)


def _pair(entry: str, types: Mapping[str, str]) -> tuple[str, str]:
    name, sign, topic = entry.rpartition("=")
    if sign and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise RequestError(
            ErrorCode.BAD_PARAMETER, f"{name!r} is no camera name: expected letters, digits and _"
        )
    return name, _require_topic(topic, types, *IMAGE_TYPES)


def _require_topic(topic: str, types: Mapping[str, str], *kinds: str) -> str:
    """The absolute name of a topic that the bags hold with one of these types."""
    topic = topic if topic.startswith("/") else f"/{topic}"
    if topic not in types:
        raise BagError(
            ErrorCode.TOPIC_NOT_IN_BAG,
            f"no bag has the topic {topic}",
            f"Topics are: {', '.join(sorted(types)) or 'none at all'}.",
        )
    if types[topic] not in kinds:
        raise BagError(
            ErrorCode.WRONG_TYPE,
            f"topic {topic} holds {types[topic]}, expected {' or '.join(kinds)}",
        )
    return topic


def _name_of(topic: str, taken: Collection[str]) -> str:
    words = topic.strip("/").split("/")
    while len(words) > 1 and words[-1] in _ENDINGS:
        words.pop()
    name = "_".join(words)
    name = name if name[:1].isalpha() else f"camera_{name}"
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


def _find_instruction_topic(types: Mapping[str, str], asked: str | None, node: str) -> str:
    """The topic whose texts standing tasks follow; "" for none.

    Left open (None) it is the node's own `<node>/instruction`, else `/instruction`, where a bag has
    one. Raises `BagError` TOPIC_NOT_IN_BAG and WRONG_TYPE for one that was asked for.
    """
    if asked is None:
        likely = (f"{node}/instruction", "/instruction")
        return next((name for name in likely if types.get(name) == TEXT_TYPE), "")
    return _require_topic(asked, types, TEXT_TYPE) if asked else ""


def standing_tasks_under(settings: Settings, text: str, number: int) -> list[StandingTask]:
    """The standing tasks while instruction number `number` is `text`."""
    from librobot_vlm_ros.ros.inputs.instruction import Instruction, standing_tasks

    instruction = Instruction(text)
    instruction.number = number
    return standing_tasks(settings, instruction)


def check_tasks(settings: Settings, supported: Sequence[str]) -> None:
    """Raises `RequestError` for tasks the model cannot do, or when there are none."""
    tasks = settings.task_list()
    if not tasks:
        raise RequestError(
            ErrorCode.BAD_PARAMETER, "there is no task", "Name some: --tasks caption detect."
        )
    for task in tasks:
        if get_task(task.task).name not in supported:
            raise RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"{settings.model} cannot do {task.task!r}",
                f"It can do: {', '.join(sorted(supported))}.",
            )
