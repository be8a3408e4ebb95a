"""Which frames of the bags are asked what: decided before the first is asked, and then kept.

The plan is what makes a run resumable: a frame belongs to one segment, a segment is done or not.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
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


Key = tuple[int, str, int, int]
"""(bag, topic, time, nth message of these) is the same on each reading of the bag."""


def in_time_order(
    readers: Sequence[BagReader], topics: Collection[str] = ()
) -> Iterator[tuple[Key, BagMessage]]:
    """Messages of several bags merged by time, with their keys; of all topics, unless some are
    named.
    """
    streams = [keyed_messages(bag, reader, topics) for bag, reader in enumerate(readers)]
    return heapq.merge(*streams, key=lambda row: (row[1].stamp_ns, row[0][0]))


def keyed_messages(
    bag: int,
    reader: BagReader,
    topics: Collection[str],
    start_ns: int | None = None,
    stop_ns: int | None = None,
) -> Iterator[tuple[Key, BagMessage]]:
    """Messages of the bag of number `bag` with their keys, of those named topics that it has."""
    names = [topic.name for topic in reader.topics if not topics or topic.name in topics]
    seen: Counter[tuple[str, int]] = Counter()
    for message in reader.messages(names, start_ns, stop_ns) if names else ():
        place = (message.topic, message.stamp_ns)
        yield (bag, *place, seen[place]), message
        seen[place] += 1


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
        sequences: Counter[str] = Counter()
        number = 0
        topics = {*self._job.cameras, self._job.instruction_topic}
        for key, message in in_time_order(self._readers, topics):
            reader = self._readers[key[0]]
            if message.topic == self._job.instruction_topic:
                self._read_instruction(reader, message)
                continue
            if message.type not in IMAGE_TYPES:
                raise BagError(
                    ErrorCode.WRONG_TYPE,
                    f"topic {message.topic} of {reader.path} holds {message.type} among its images",
                )
            camera = self._job.cameras[message.topic]
            self.images += 1
            sequences[camera] += 1
            tasks = self._due(camera, sequences[camera], _stamp_of(message))
            if tasks:
                place = (number, number // SEGMENT_FRAMES, *key)
                instruction = len(self.instructions) - 1
                yield FramePlan(*place, camera, sequences[camera], instruction, tasks)
                number += 1

    def _due(self, camera: str, sequence: int, stamp_ns: int) -> tuple[int, ...]:
        options = self._job.options
        if (sequence - 1) % options.every or not self._passes(options.rate_hz, stamp_ns, camera):
            return ()
        return tuple(
            index
            for index, task in enumerate(self._tasks)
            if task.runs_on(camera)
            and not task.idle_reason(None)
            # With its prompt: another instruction is asked at once.
            and self._passes(task.rate_hz, stamp_ns, camera, task.name, task.prompt)
        )

    def _passes(self, rate_hz: float, stamp_ns: int, *what: str) -> bool:
        if not rate_hz:
            return True
        return self._gates.setdefault(what, RateGate(round(1e9 / rate_hz))).passes(stamp_ns)

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
