"""The live part of the demo: the node in a process of its own, the bag, questions on the way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from librobot_vlm_ros.bags import TRUTH_TOPIC, BagMessage, BagReader, read_truth
from librobot_vlm_ros.client.node_process import NodeProcess
from librobot_vlm_ros.client.session import Session
from librobot_vlm_ros.console import Console
from librobot_vlm_ros.core import EngineError, decode_message
from librobot_vlm_ros.demo.data import Answer, DemoRun, FrameRecord, answer_of, spread
from librobot_vlm_ros.replay.lock_step import NodeLink, ResultMessage
from librobot_vlm_ros.replay.message_types import IMAGE_TYPES, header_stamp_ns
from librobot_vlm_ros.replay.player import Player, PlayOptions

NODE = "/vlm"
INSTRUCTION_TOPIC = "/instruction"
_QUESTIONS = 8
_START_S = 180.0
_ANSWER_S = 60.0


def read_frames(reader: BagReader, image_topic: str) -> list[FrameRecord]:
    """The frames of the bag with their ground truth, if it has one.

    Raises `BagError` TOPIC_NOT_IN_BAG, and what decoding an image raises.
    """
    topic = reader.require_topic(image_topic)
    if topic.type not in IMAGE_TYPES:
        reader.require_topic(image_topic, IMAGE_TYPES[0])
    truth = read_truth(reader) if reader.topic(TRUTH_TOPIC) is not None else {}
    instructions: list[tuple[int, str]] = []
    if reader.topic(INSTRUCTION_TOPIC) is not None:
        for message in reader.messages([INSTRUCTION_TOPIC]):
            instructions.append((message.stamp_ns, reader.deserialize(message).data))
    frames = []
    for number, message in enumerate(reader.messages([image_topic])):
        image, stamp_ns = reader.deserialize(message), header_stamp_ns(message.data)
        before = [text for told_ns, text in instructions if told_ns <= message.stamp_ns]
        frames.append(
            FrameRecord(
                number=number,
                stamp_ns=stamp_ns,
                bag_ns=message.stamp_ns,
                frame_id=image.header.frame_id,
                pixels=decode_message(image),
                truth=truth.get(stamp_ns),
                instruction=before[-1] if before else "",
            )
        )
    return frames


def run_live(
    run: DemoRun, reader: BagReader, tasks: list[str], rate: float, log: Path, console: Console
) -> None:
    """Start the node, play the bag in lock-step at no more than its own speed, ask, collect into
    `run`. The node has ended when this returns or raises.
    """
    transport = "compressed" if run.image_topic.endswith("/compressed") else "raw"
    arguments = [
        f"model:={run.model}",
        f"image_topic:={run.image_topic}",
        f"image_transport:={transport}",
        f"tasks:=[{','.join(tasks)}]",
        "lock_step:=true",
        "autostart:=true",
    ]
    console.stage(f"starting the node: librobot-vlm run {' '.join(arguments)}")
    began_s = time.monotonic()
    with NodeProcess(arguments, log) as process, Session("librobot_vlm_demo") as session:
        process.wait_until_active(session, NODE, _START_S)
        run.load_s = time.monotonic() - began_s
        console.line(f"  process {process.pid}, active after {run.load_s:.1f} s, log in {log}")
        link = NodeLink(session, NODE)
        link.connect()
        live = _Live(run, session, process, link)
        link.on_result = live.on_result
        link.check = process.check
        try:
            _play(live, reader, rate, console)
        except EngineError as error:  # what we waited for in vain has its reason in the node
            process.check()
            why = process.last_error()
            if why is None:
                raise
            raise EngineError(
                error.code, error.message, f"The node's last error: {why.code.name}: {why.message}"
            ) from error
        console.stage("ending the node")
    process_code = process.end()
    if process_code != 0:
        run.failures.append(f"the node ended with exit code {process_code}, expected 0: see {log}")


def _play(live: _Live, reader: BagReader, rate: float, console: Console) -> None:
    run, session, link = live.run, live.session, live.link
    topics = [run.image_topic]
    remap = {}
    if reader.topic(INSTRUCTION_TOPIC) is not None:
        topics.append(INSTRUCTION_TOPIC)
        remap[INSTRUCTION_TOPIC] = f"{NODE}/instruction"
    options = PlayOptions(
        rate=rate, topics=tuple(topics), remap=remap, discovery_s=10.0, answer_timeout_s=_ANSWER_S
    )
    player = Player(session, reader, options, link=link)
    player.open()
    console.stage(f"playing {run.bag.name}: {len(run.frames)} frames, {reader.duration_s:.1f} s")
    with console.progress(len(run.frames), "frames") as progress:

        def on_publish(message: BagMessage, sent_s: float) -> None:
            live.process.check()
            if message.topic == run.image_topic:
                live.frame_sent(header_stamp_ns(message.data), sent_s)
                progress.step(live.last_words)
            else:
                text = reader.deserialize(message).data
                run.instructions.append((message.stamp_ns, text))

        player.on_publish = on_publish
        report = player.play()
        session.spin_until(lambda: not live.waiting, time.monotonic() + _ANSWER_S)
    run.play_s = report.wall_s
    if report.unanswered:
        run.failures.append(
            f"{len(report.unanswered)} of {report.frames} frames had no complete results in time"
        )
    if live.waiting:
        run.failures.append(f"{live.waiting} questions were not answered in {_ANSWER_S:g} s")
    failed = [answer for answer in run.questions if answer.error]
    run.failures += [f"a question was refused: {answer.error}" for answer in failed]


class _Live:
    """Takes results and asks questions while the bag plays."""

    def __init__(
        self, run: DemoRun, session: Session, process: NodeProcess, link: NodeLink
    ) -> None:
        from librobot_vlm_ros.srv import Query

        self.run = run
        self.session = session
        self.process = process
        self.link = link
        self.waiting = 0
        self.last_words = ""
        self._client = session.node.create_client(Query, f"{NODE}/query")
        self._by_stamp = {frame.stamp_ns: frame for frame in run.frames}
        can = {item.task for item in link.tasks}
        self._questions = _plan(run.frames, can)
        session.spin_until(self._client.service_is_ready, time.monotonic() + 5.0)

    def frame_sent(self, stamp_ns: int, sent_s: float) -> None:
        """Note the time, and ask what is to be asked at this frame."""
        frame = self._by_stamp[stamp_ns]
        frame.sent_s = sent_s
        question = self._questions.get(frame.number)
        if question is not None:
            self._ask(*question)

    def on_result(self, result: ResultMessage) -> None:
        """A standing task's result."""
        self.run.results.append(result)
        frame = self._by_stamp.get(result.stamp_ns)
        sent_s = frame.sent_s if frame is not None else result.arrived_s
        answer = answer_of(result.message, took_s=result.arrived_s - sent_s)
        if frame is None or not _belongs(answer, frame):
            self.run.unmatched += 1
            return
        frame.answers[answer.task] = answer
        if answer.error:
            self.run.failures.append(f"frame {frame.number}, {answer.task}: {answer.error}")
        elif answer.task == "caption":
            self.last_words = answer.text

    def _ask(self, task: str, prompt: str) -> None:
        from librobot_vlm_ros.srv import Query

        request = Query.Request(task=task, prompt=prompt, timeout_s=_ANSWER_S)
        asked_s = time.monotonic()
        self.waiting += 1

        def answered(future: Any) -> None:
            self.waiting -= 1
            answer = answer_of(future.result(), took_s=time.monotonic() - asked_s)
            self.run.questions.append(answer)

        self._client.call_async(request).add_done_callback(answered)


def _belongs(answer: Answer, frame: FrameRecord) -> bool:
    """Whether frame_id and, where the answer says it, size are those of the image that was sent."""
    height, width = frame.pixels.shape[:2]
    return answer.frame_id == frame.frame_id and answer.size in ((0, 0), (width, height))


def _plan(frames: list[FrameRecord], can: set[str]) -> dict[int, tuple[str, str]]:
    """Which question (task, prompt) is asked at which frame: mostly where something is that can be
    seen, now and then what is there.
    """
    plan: dict[int, tuple[str, str]] = {}
    asked: set[str] = set()
    for turn, frame in enumerate(spread(frames, _QUESTIONS)):
        labels = list(frame.truth.labels) if frame.truth is not None else []
        fresh = [label for label in labels if label not in asked] or labels
        if turn % 4 == 1 and "caption" in can:
            plan[frame.number] = ("caption", "")
        elif turn % 4 == 3 and "detect" in can:
            plan[frame.number] = ("detect", "")
        elif fresh and "ground" in can:
            label = fresh[turn % len(fresh)]
            asked.add(label)
            plan[frame.number] = ("ground", label)
    return plan
