"""The model's side of `annotate`: frames of a segment in, serialized result messages out.

The messages are made by the node's own `ResultPublisher`; only its publishers are replaced by ones
that keep what they are given. There is no node and no middleware.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from librobot_vlm_ros.annotate.job import Job, check_tasks, tasks_of
from librobot_vlm_ros.annotate.journal import BadFrame, ResultRow, SegmentDone
from librobot_vlm_ros.annotate.plan import FramePlan, Numbering
from librobot_vlm_ros.bags import BagMessage, BagReader, package_typestore
from librobot_vlm_ros.core import (
    BagError,
    ErrorCode,
    Frame,
    InferenceRequest,
    Result,
    as_vlm_error,
)

__all__ = ["ResultRecorder", "SegmentWorker"]

_COMPRESSED = "sensor_msgs/msg/CompressedImage"


class _Sink:
    """Stands for a publisher."""

    def __init__(self, topic: str, kind: Any, taken: list[tuple[str, bytes]]) -> None:
        self.topic = topic
        self.type = f"{kind.__module__.partition('.')[0]}/msg/{kind.__name__}"
        self._taken = taken

    def publish(self, message: Any) -> None:
        from rclpy.serialization import serialize_message

        self._taken.append((self.topic, bytes(serialize_message(message))))

    def get_subscription_count(self) -> int:
        """Somebody listens where the bag can hold such messages."""
        return int(self.type in package_typestore().fielddefs)


class ResultRecorder:
    """Stands for the node towards `ResultPublisher`: keeps the serialized messages."""

    def __init__(self, node: str, min_score: float = 0.0) -> None:
        from librobot_vlm_ros.ros.outputs.results import ResultPublisher

        self._node = node
        self._taken: list[tuple[str, bytes]] = []
        self.sinks: list[_Sink] = []
        self._publisher = ResultPublisher(self, lambda: min_score)

    def create_publisher(self, kind: Any, name: str, _profile: Any, **_options: Any) -> _Sink:
        """As rclpy's node has it."""
        sink = _Sink(name.replace("~", self._node, 1), kind, self._taken)
        self.sinks.append(sink)
        return sink

    def get_logger(self) -> logging.Logger:
        """As rclpy's node has it."""
        return logging.getLogger(__name__)

    def topics(self) -> dict[str, str]:
        """Result topic -> type, of those that a bag can hold."""
        return {sink.topic: sink.type for sink in self.sinks if sink.get_subscription_count()}

    def messages(self, result: Result, frame: Frame) -> list[tuple[str, bytes]]:
        """(topic, serialized message) of what the node would publish for this result."""
        self._taken.clear()
        self._publisher.publish(result, frame, time.monotonic_ns())
        return list(self._taken)


class SegmentWorker:
    """Holds a model and works off segments. Raises `VlmError` when the model cannot be loaded."""

    def __init__(
        self,
        job: Job,
        readers: Sequence[BagReader],
        instructions: Sequence[tuple[str, int]],
        should_cancel: Callable[[], bool] = lambda: False,
    ) -> None:
        from librobot_vlm_ros.ros.model_loading import create_backend, load_options
        from librobot_vlm_ros.runtime.loader import Loader, LoadJob

        settings = job.settings()
        self._settings = settings
        self._job = job
        self._readers = readers
        self._tasks = [tasks_of(settings, *instruction) for instruction in instructions]
        self._recorder = ResultRecorder(job.node, settings.min_score)
        self._should_cancel = should_cancel
        loader = Loader(create_backend, warm_up=settings.warm_up)
        self.report = loader.perform(LoadJob(settings.model, load_options(settings)), lambda: True)
        check_tasks(settings, sorted(self.report.tasks))
        self._backend = loader.backend

    def run(
        self, number: int, plan: Sequence[FramePlan], on_frames: Callable[[int], None]
    ) -> SegmentDone:
        """Work off one segment; `on_frames` is told how many of its frames are done."""
        results: list[ResultRow] = []
        bad: list[BadFrame] = []
        waiting: list[tuple[FramePlan, Frame]] = []
        done = 0
        for item, message in self._messages(plan):
            done += 1
            try:
                waiting.append((item, self._frame(item, message)))
            except Exception as error:
                coded = as_vlm_error(error)
                bad.append(BadFrame(item.number, int(coded.code), str(coded)))
            if len(waiting) >= self._settings.max_batch:
                self._answer_all(waiting, results)
                waiting = []
                on_frames(done)
        self._answer_all(waiting, results)
        on_frames(done)
        return SegmentDone(number, len(plan), results, bad)

    def _messages(self, plan: Sequence[FramePlan]) -> Iterator[tuple[FramePlan, BagMessage]]:
        for bag in sorted({item.bag for item in plan}):
            wanted = {(i.bag, i.topic, i.stamp_ns, i.nth): i for i in plan if i.bag == bag}
            first = min(item.stamp_ns for item in wanted.values())
            last = max(item.stamp_ns for item in wanted.values())
            numbering = Numbering()
            topics = {item.topic for item in wanted.values()}
            for message in self._readers[bag].messages(topics, first, last + 1):
                item = wanted.pop(numbering.key(bag, message), None)
                if item is not None:
                    yield item, message
            if wanted:
                raise BagError(
                    ErrorCode.BAG_UNREADABLE,
                    f"{self._readers[bag].path} does not hold the frame of {min(wanted)[2]} on "
                    f"{min(wanted)[1]} any more",
                    "It changed while it was read: begin anew with --overwrite.",
                )

    def _frame(self, item: FramePlan, message: BagMessage) -> Frame:
        from librobot_vlm_ros.ros.inputs.camera import (
            frame_from_message,
            read_compressed_image,
            read_image,
        )

        read = read_compressed_image if message.type == _COMPRESSED else read_image
        return frame_from_message(
            read(message.data),
            item.camera,
            sequence=item.sequence,
            received_ns=time.monotonic_ns(),
            allow_depth=self._settings.allow_depth,
        )

    def _answer_all(
        self, frames: Sequence[tuple[FramePlan, Frame]], results: list[ResultRow]
    ) -> None:
        """One batch a task: requests of one kind are answered together best, and the model keeps
        the features of these frames from task to task.
        """
        for index in sorted({index for item, _ in frames for index in item.tasks}):
            asked = [
                (item.number, self._request(item, index, frame))
                for item, frame in frames
                if index in item.tasks
            ]
            self._answer(asked, results)

    def _request(self, item: FramePlan, index: int, frame: Frame) -> InferenceRequest:
        task = self._tasks[item.instruction][index]
        return InferenceRequest(
            request_id=f"{task.name}@{item.camera}#{item.sequence}",
            frame=frame,
            task=task.task,
            prompt=task.prompt,
            params=task.params,
            instruction_id=task.instruction_id,
        )

    def _answer(
        self, batch: Sequence[tuple[int, InferenceRequest]], results: list[ResultRow]
    ) -> None:
        from librobot_vlm_ros.runtime.batch_executor import run_batch
        from librobot_vlm_ros.runtime.pending_request import PendingRequest, make_result

        if self._should_cancel():
            raise KeyboardInterrupt
        run = run_batch(self._backend, [PendingRequest(request) for _, request in batch])
        for (number, request), outcome in zip(batch, run.outcomes, strict=True):
            result = make_result(
                request,
                outcome,
                model=self.report,
                now_ns=time.monotonic_ns(),
                batch_size=len(batch),
            )
            for topic, data in self._recorder.messages(result, request.frame):
                results.append(ResultRow(number, len(results), topic, result.error_code, data))
