"""The model's side of `annotate`: segments of frames in, serialized result messages out.

Segments are answered in this process, or in several that each hold the model. The messages are
built by the node's own `ResultPublisher`; its publishers are replaced by ones that only keep what
is published. There is no node and no middleware.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.annotate.job import Job, check_tasks, open_bags, standing_tasks_under
from librobot_vlm_ros.annotate.journal import BadFrame, ResultRow, SegmentDone
from librobot_vlm_ros.annotate.plan import FramePlan, keyed_messages
from librobot_vlm_ros.bags import BagMessage, BagReader, package_typestore
from librobot_vlm_ros.core import (
    BagError,
    ErrorCode,
    Frame,
    InferenceError,
    InferenceRequest,
    Result,
    VlmError,
    as_vlm_error,
)
from librobot_vlm_ros.replay.message_types import IMAGE_TYPES

if TYPE_CHECKING:
    from librobot_vlm_ros.runtime.loader import LoadReport

#: (number of the segment, its frames)
Segments = Iterator[tuple[int, list[FramePlan]]]
#: (text, how many-th instruction it is)
Instructions = Sequence[tuple[str, int]]
#: Told what the model is once it is loaded.
OnModel = Callable[["LoadReport"], None]
#: Told of frames that were done since it was told last.
OnFrames = Callable[[int], None]

_END_S = 5.0


# -- result messages without a node


@dataclasses.dataclass
class _RecordedTopic:
    """Stands for a publisher: appends what is published to `published`."""

    topic: str
    type: str
    published: list[tuple[str, bytes]]

    def publish(self, message: Any) -> None:
        from rclpy.serialization import serialize_message

        self.published.append((self.topic, bytes(serialize_message(message))))

    def get_subscription_count(self) -> int:
        """1 where a bag can hold such messages: detections are built for subscribers only."""
        return int(self.type in package_typestore().fielddefs)


class ResultRecorder:
    """Stands for the node towards `ResultPublisher`: keeps the serialized messages."""

    def __init__(self, node: str, min_score: float = 0.0) -> None:
        from librobot_vlm_ros.ros.outputs.results import ResultPublisher

        self._node = node
        self._published: list[tuple[str, bytes]] = []
        self._topics: list[_RecordedTopic] = []
        self._publisher = ResultPublisher(self, lambda: min_score)

    def create_publisher(self, kind: Any, name: str, *_: Any, **_options: Any) -> _RecordedTopic:
        """As rclpy's node has it."""
        type_name = f"{kind.__module__.partition('.')[0]}/msg/{kind.__name__}"
        topic = _RecordedTopic(name.replace("~", self._node, 1), type_name, self._published)
        self._topics.append(topic)
        return topic

    def get_logger(self) -> logging.Logger:
        """As rclpy's node has it."""
        return logging.getLogger(__name__)

    def topics(self) -> dict[str, str]:
        """Result topic -> type, of those that a bag can hold."""
        return {one.topic: one.type for one in self._topics if one.get_subscription_count()}

    def messages(self, result: Result, frame: Frame) -> list[tuple[str, bytes]]:
        """(topic, serialized message) of what the node would publish for this result."""
        self._published.clear()
        self._publisher.publish(result, frame, time.monotonic_ns())
        return list(self._published)


# -- one model


class _SegmentWorker:
    """Holds a model and answers segments. Raises `VlmError` when the model cannot be loaded."""

    def __init__(
        self,
        job: Job,
        readers: Sequence[BagReader],
        instructions: Instructions,
        should_cancel: Callable[[], bool] = lambda: False,
    ) -> None:
        from librobot_vlm_ros.ros.model_loading import create_backend, load_options
        from librobot_vlm_ros.runtime.loader import Loader, LoadJob

        self._settings = settings = job.settings()
        self._readers = readers
        self._tasks = [standing_tasks_under(settings, *one) for one in instructions]
        self._recorder = ResultRecorder(job.options.node, settings.min_score)
        self._should_cancel = should_cancel
        loader = Loader(create_backend, warm_up=settings.warm_up)
        self.report = loader.perform(LoadJob(settings.model, load_options(settings)), lambda: True)
        check_tasks(settings, sorted(self.report.tasks))
        assert loader.backend is not None
        self._backend = loader.backend

    def run(self, number: int, plan: Sequence[FramePlan], on_frames: OnFrames) -> SegmentDone:
        """Answer the frames of one segment."""
        done = SegmentDone(number, len(plan), [], [])
        waiting: list[tuple[FramePlan, Frame]] = []
        read = 0
        for item, message in self._messages(plan):
            read += 1
            try:
                waiting.append((item, self._frame(item, message)))
            except Exception as error:
                coded = as_vlm_error(error)
                done.bad.append(BadFrame(item.number, int(coded.code), str(coded)))
            if len(waiting) >= self._settings.max_batch:
                self._answer(waiting, done.results)
                on_frames(read)
                waiting, read = [], 0
        self._answer(waiting, done.results)
        on_frames(read)
        return done

    def _messages(self, plan: Sequence[FramePlan]) -> Iterator[tuple[FramePlan, BagMessage]]:
        for bag in sorted({item.bag for item in plan}):
            wanted = {(i.bag, i.topic, i.stamp_ns, i.nth): i for i in plan if i.bag == bag}
            topics = {item.topic for item in wanted.values()}
            times_ns = [item.stamp_ns for item in wanted.values()]
            span_ns = min(times_ns), max(times_ns) + 1
            for key, message in keyed_messages(bag, self._readers[bag], topics, *span_ns):
                if key in wanted:
                    yield wanted.pop(key), message
            if wanted:
                raise BagError(
                    ErrorCode.BAG_UNREADABLE,
                    f"{self._readers[bag].path} does not hold the frame of {min(wanted)[2]} on "
                    f"{min(wanted)[1]} any more",
                    "It changed while it was read: begin anew with --overwrite.",
                )

    def _frame(self, item: FramePlan, message: BagMessage) -> Frame:
        from librobot_vlm_ros.ros.inputs.camera import frame_from_message, read_image

        return frame_from_message(
            read_image(message.data, compressed=message.type != IMAGE_TYPES[0]),
            item.camera,
            sequence=item.sequence,
            received_ns=time.monotonic_ns(),
            allow_depth=self._settings.allow_depth,
        )

    def _answer(self, frames: Sequence[tuple[FramePlan, Frame]], results: list[ResultRow]) -> None:
        """Ask task by task: requests of one task make the best batches, and the model caches the
        features of these frames for the next task.
        """
        from librobot_vlm_ros.runtime.batch_executor import run_batch
        from librobot_vlm_ros.runtime.pending_request import PendingRequest, make_result

        for index in sorted({index for item, _ in frames for index in item.tasks}):
            if self._should_cancel():
                raise KeyboardInterrupt
            asked = [pair for pair in frames if index in pair[0].tasks]
            batch = [PendingRequest(self._request(index, *pair)) for pair in asked]
            outcomes = run_batch(self._backend, batch).outcomes
            for (item, frame), pending, outcome in zip(asked, batch, outcomes, strict=True):
                result = make_result(
                    pending.request,
                    outcome,
                    model=self.report,
                    now_ns=time.monotonic_ns(),
                    batch_size=len(batch),
                )
                for topic, data in self._recorder.messages(result, frame):
                    row = ResultRow(item.number, len(results), topic, result.error_code, data)
                    results.append(row)

    def _request(self, index: int, item: FramePlan, frame: Frame) -> InferenceRequest:
        task = self._tasks[item.instruction][index]
        return InferenceRequest(
            request_id=f"{task.name}@{item.camera}#{item.sequence}",
            frame=frame,
            task=task.task,
            prompt=task.prompt,
            params=task.params,
            instruction_id=task.instruction_id,
        )


# -- one process, or several


def run_here(
    job: Job,
    readers: Sequence[BagReader],
    instructions: Instructions,
    segments: Segments,
    on_model: OnModel,
    on_frames: OnFrames,
) -> Iterator[SegmentDone]:
    """Answer `segments` one after the other. Raises `VlmError`."""
    worker = _SegmentWorker(job, readers, instructions)
    on_model(worker.report)
    for number, plan in segments:
        yield worker.run(number, plan, on_frames)


def run_in_processes(
    count: int,
    job: Job,
    instructions: Instructions,
    segments: Segments,
    on_model: OnModel,
    on_frames: OnFrames,
) -> Iterator[SegmentDone]:
    """Answer `segments` in `count` processes; they come back in the order they are done.

    Raises the `VlmError` of a process that fails, INFERENCE_FAILED for one that is killed. However
    this ends, the processes end too; they notice by themselves when this one is gone.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch in it hangs
    cores = max(1, (os.cpu_count() or 1) // count)
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(count):
            here, there = context.Pipe()
            words = (there, job, list(instructions), cores)
            process = context.Process(target=_work, args=words, daemon=True)
            process.start()
            there.close()  # so that its end is noticed
            processes[here] = process
        yield from _collect(processes, segments, on_model, on_frames)
    finally:
        for process in processes.values():
            process.terminate()
        for pipe, process in processes.items():
            process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()


def _collect(
    processes: dict[Connection, Any], segments: Segments, on_model: OnModel, on_frames: OnFrames
) -> Iterator[SegmentDone]:
    busy = set(processes)
    while busy:
        for pipe in wait(list(busy)):
            assert isinstance(pipe, Connection)
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError) as error:
                raise _killed(processes[pipe]) from error
            if kind == "error":
                raise value
            if kind == "frames":
                on_frames(value)
                continue
            if kind == "model":
                on_model(value)
            else:
                yield value
            following = next(segments, None)
            with contextlib.suppress(OSError):  # gone: the next receive says so
                pipe.send(following)
            if following is None:
                busy.discard(pipe)


def _killed(process: Any) -> VlmError:
    process.join(_END_S)
    return InferenceError(
        ErrorCode.INFERENCE_FAILED,
        f"a worker process ended by itself (exit code {process.exitcode})",
        "-9 is mostly the system, out of memory: use fewer --workers or a smaller --batch. "
        "What was done is kept: run the same command again.",
    )


def _work(pipe: Connection, job: Job, instructions: Instructions, cores: int) -> None:
    """A worker process: answer the segments that come through the pipe, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends this one
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))  # read when torch is imported
    parent = multiprocessing.parent_process()
    assert parent is not None
    try:
        with open_bags(job.options.bags, salvage=job.options.salvage) as readers:
            worker = _SegmentWorker(job, readers, instructions, lambda: not parent.is_alive())
            pipe.send(("model", worker.report))
            while (segment := pipe.recv()) is not None:
                number, plan = segment
                done = worker.run(number, plan, lambda frames: pipe.send(("frames", frames)))
                pipe.send(("done", done))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # nobody waits for it any more
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(("error", as_vlm_error(error)))
