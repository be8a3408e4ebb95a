"""Which frames of the bags are asked what: decided before the first is asked, and then kept.

The plan is what makes a run resumable: a frame belongs to one segment, a segment is done or not.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from librobot_vlm_ros.annotate.job import TEXT_TYPE, Job, standing_tasks_under
from librobot_vlm_ros.bags import BagMessage, BagReader
from librobot_vlm_ros.core import BagError, ErrorCode, VlmError
from librobot_vlm_ros.replay.message_types import IMAGE_TYPES, header_stamp_ns
from librobot_vlm_ros.runtime.scheduler import RateGate

#: Frames that are done or not done together: what a kill costs at most, times the workers.
SEGMENT_FRAMES = 16


class FramePlan(NamedTuple):
    """One frame and what is asked of it."""

    number: int
    segment: int
    bag: int
    topic: str
    stamp_ns: int
    """When it was recorded."""
    nth: int
    """Of the messages of this topic and stamp in that bag, from 0."""
    camera: str
    sequence: int
    instruction: int
    """Index into the plan's instructions."""
    tasks: tuple[int, ...]
    """Indices into the standing tasks."""


class Numbering:
    """Tells messages of one topic and time apart, by their order in the bag."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[int, str, int]] = Counter()

    def key(self, bag: int, message: BagMessage) -> tuple[int, str, int, int]:
        """(bag, topic, time, nth): the same on each reading of the bag."""
        place = (bag, message.topic, message.stamp_ns)
        nth = self._seen[place]
        self._seen[place] += 1
        return (*place, nth)


def in_time_order(
    readers: Sequence[BagReader], topics: Iterable[str] = ()
) -> Iterator[tuple[int, BagMessage]]:
    """(bag, message) of several bags merged by time; of all topics, unless some are named."""
    wanted = set(topics)

    def rows(bag: int, reader: BagReader) -> Iterator[tuple[int, int, BagMessage]]:
        names = [topic.name for topic in reader.topics if not wanted or topic.name in wanted]
        if names:
            for message in reader.messages(names):
                yield message.stamp_ns, bag, message

    streams = [rows(bag, reader) for bag, reader in enumerate(readers)]
    for _, bag, message in heapq.merge(*streams, key=lambda row: row[:2]):
        yield bag, message


class Planner:
    """Reads the bags once. `instructions` and `problems` are complete after the last frame."""

    def __init__(self, job: Job, readers: Sequence[BagReader]) -> None:
        from librobot_vlm_ros.ros.inputs.instruction import Instruction

        self._job = job
        self._readers = readers
        self._settings = job.settings()
        self._instruction = Instruction(self._settings.instruction)
        self._gates: dict[tuple[str, ...], RateGate] = {}
        self.instructions: list[tuple[str, int]] = []
        self.problems: list[str] = []
        self.images = 0
        self._add_instruction()

    def frames(self) -> Iterator[FramePlan]:
        """The frames in order of time."""
        topics = [*self._job.cameras, self._job.instruction_topic]
        numbering = Numbering()
        sequences: Counter[str] = Counter()
        number = 0
        for bag, message in in_time_order(self._readers, [name for name in topics if name]):
            if message.topic == self._job.instruction_topic:
                self._read_instruction(self._readers[bag], message)
                continue
            if message.type not in IMAGE_TYPES:
                raise BagError(
                    ErrorCode.WRONG_TYPE,
                    f"topic {message.topic} of {self._readers[bag].path} holds {message.type} "
                    "among its images",
                )
            key = numbering.key(bag, message)
            camera = self._job.cameras[message.topic]
            self.images += 1
            sequences[camera] += 1
            tasks = self._due(camera, sequences[camera], _stamp_of(message))
            if tasks:
                yield FramePlan(
                    number,
                    number // SEGMENT_FRAMES,
                    *key,
                    camera,
                    sequences[camera],
                    len(self.instructions) - 1,
                    tasks,
                )
                number += 1

    def _due(self, camera: str, sequence: int, stamp_ns: int) -> tuple[int, ...]:
        options = self._job.options
        if (sequence - 1) % options.every:
            return ()
        if options.rate_hz and not self._passes(("",), camera, options.rate_hz, stamp_ns):
            return ()
        due = []
        for index, task in enumerate(self._tasks):
            if not task.runs_on(camera) or task.idle_reason(None):
                continue
            asked = (task.name, task.prompt)  # another instruction is asked at once
            if not task.rate_hz or self._passes(asked, camera, task.rate_hz, stamp_ns):
                due.append(index)
        return tuple(due)

    def _passes(self, what: tuple[str, ...], camera: str, rate_hz: float, stamp_ns: int) -> bool:
        gate = self._gates.setdefault((camera, *what), RateGate(round(1e9 / rate_hz)))
        return gate.passes(stamp_ns)

    def _read_instruction(self, reader: BagReader, message: BagMessage) -> None:
        try:
            if message.type != TEXT_TYPE:
                raise BagError(ErrorCode.WRONG_TYPE, f"it is {message.type}, expected {TEXT_TYPE}")
            before = self._instruction.number
            if self._instruction.set(reader.deserialize(message).data) != before:
                self._add_instruction()
        except VlmError as error:  # as live: refused, and the one before stays
            self.problems.append(f"an instruction at {message.stamp_ns} is refused: {error}")

    def _add_instruction(self) -> None:
        now = (self._instruction.text, self._instruction.number)
        self.instructions.append(now)
        self._tasks = standing_tasks_under(self._settings, *now)


def _stamp_of(message: BagMessage) -> int:
    try:
        return header_stamp_ns(message.data)
    except VlmError:  # no header: it will be counted as a bad frame
        return message.stamp_ns
