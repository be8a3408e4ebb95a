"""Follow the running node, so that a replay can keep in step with it.

In lock-step a frame is sent only when the node has answered the one before. Which answers are due
for a frame follows from the node's own parameters: every standing task without a rate that the
loaded model can do, on that camera. Tasks with a rate are not waited for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from librobot_vlm_ros.client.session import Session, resolve
from librobot_vlm_ros.core import EngineError, ErrorCode, RequestError, clean_prompt, get_task
from librobot_vlm_ros.replay.message_types import import_message

_RESULT_TOPICS = {
    "caption": "librobot_vlm_ros/msg/Caption",
    "grounding": "librobot_vlm_ros/msg/GroundingArray",
    "embedding": "librobot_vlm_ros/msg/Embedding",
}


@dataclass(frozen=True)
class ResultMessage:
    """A result as it came from the node."""

    topic: str
    type: str
    data: bytes
    """Serialized."""
    message: Any
    """The same, deserialized."""
    arrived_s: float
    """`time.monotonic()`"""

    @property
    def stamp_ns(self) -> int:
        """Stamp of the frame that it answers."""
        stamp = self.message.header.stamp
        return int(stamp.sec) * 10**9 + int(stamp.nanosec)


@dataclass(frozen=True)
class AwaitedTask:
    """A standing task that is waited for."""

    task: str
    camera: str
    """"" is every camera."""
    needs_instruction: bool


class NodeLink:
    """The node called `name`: its settings, its results and whether a frame is answered."""

    def __init__(self, session: Session, name: str = "/vlm") -> None:
        self.name = name
        """Absolute."""
        self.cameras: dict[str, str] = {}
        """Names of the cameras by topic."""
        self.tasks: tuple[AwaitedTask, ...] = ()
        self.instruction = ""
        self.lock_step = False
        self._session = session
        self.on_result: Callable[[ResultMessage], None] = lambda result: None
        self.check: Callable[[], None] = lambda: None
        """Called while waiting for answers; may raise to end a wait that is in vain."""
        self._answers: Counter[tuple[str, int, str]] = Counter()
        self._parameters: Any = None

    def connect(self, timeout_s: float = 10.0) -> None:
        """Find the node, read its settings, listen to its results.

        Raises `EngineError`: DEADLINE_EXCEEDED when it is not there; `RequestError` BAD_PARAMETER
        when all its tasks have a rate, so that nothing says that a frame is done.
        """
        from rcl_interfaces.srv import GetParameters

        from librobot_vlm_ros.srv import ListModels

        node = self._session.node
        self._parameters = node.create_client(GetParameters, f"{self.name}/get_parameters")
        listing = node.create_client(ListModels, f"{self.name}/list_models")
        self._subscribe()
        values = self._get(
            "tasks", "cameras", "image_topic", "image_transport", "lock_step", "instruction",
            timeout_s=timeout_s,
        )  # fmt: skip
        models = self._session.call(listing, ListModels.Request(), timeout_s)
        can = next((set(m.tasks) for m in models.models if m.name == models.active), set())
        if not models.active:
            raise EngineError(
                ErrorCode.NOT_ACTIVE,
                f"{self.name} has no model loaded",
                f"Activate it: ros2 lifecycle set {self.name} configure (then activate), or start "
                "it with autostart:=true.",
            )
        self.lock_step = values["lock_step"]
        self.instruction = values["instruction"]
        self._read_settings(values, can)

    def _read_settings(self, values: dict[str, Any], can: set[str]) -> None:
        from librobot_vlm_ros.ros.parameters.parameter_syntax import parse_cameras, parse_tasks

        # ROS has no empty list of strings: the node then holds one blank entry.
        entries = [entry for entry in values["cameras"] if entry.strip()]
        cameras = parse_cameras(entries, values["image_topic"], values["image_transport"])
        self.cameras = {resolve(item.topic, self.name): item.name for item in cameras}
        tasks = [entry for entry in values["tasks"] if entry.strip()]
        standing = parse_tasks(tasks, [item.name for item in cameras])
        self.tasks = tuple(
            AwaitedTask(
                task=item.task,
                camera=item.camera,
                needs_instruction=get_task(item.task).needs_text and not item.prompt,
            )
            for item in standing
            if item.rate_hz == 0 and item.task in can
        )
        if not self.tasks:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"no standing task of {self.name} answers every frame (tasks are "
                f"{tasks}), so lock-step has nothing to wait for",
                "Give one without a rate: "
                f"ros2 param set {self.name} tasks \"['caption','detect']\"",
            )

    def expected(self, topic: str) -> Counter[str]:
        """Results that are due for a frame on `topic`, by task; none for a topic of no camera."""
        camera = self.cameras.get(topic)
        return Counter(
            item.task
            for item in self.tasks
            if camera is not None
            and item.camera in ("", camera)
            and (self.instruction or not item.needs_instruction)
        )

    def forget_answers(self, topic: str, stamp_ns: int) -> None:
        """To be called before a frame is sent: earlier answers for its stamp do not count."""
        camera = self.cameras.get(topic, "")
        for key in [key for key in self._answers if key[:2] == (camera, stamp_ns)]:
            del self._answers[key]

    def wait_for_answers(self, topic: str, stamp_ns: int, timeout_s: float) -> bool:
        """Wait until all results that are due for that frame have come; False when not in time."""
        camera = self.cameras.get(topic, "")
        due = self.expected(topic)

        def answered() -> bool:
            self.check()
            counts = self._answers
            return all(counts[camera, stamp_ns, task] >= count for task, count in due.items())

        return self._session.spin_until(answered, time.monotonic() + timeout_s)

    def wait_for_instruction(self, text: str, timeout_s: float) -> bool:
        """Wait until the node has taken `text` as its instruction; False when not in time.

        Without this the next frame could overtake an instruction: they travel on two topics.
        """
        until_s = time.monotonic() + timeout_s
        wanted = clean_prompt(text, required=False)
        while time.monotonic() < until_s:
            self.instruction = self._get("instruction", timeout_s=timeout_s)["instruction"]
            if clean_prompt(self.instruction, required=False) == wanted:
                return True
            self._session.spin_until(lambda: False, time.monotonic() + 0.02)
        return False

    def publishes_here(self) -> bool:
        """Whether the node's result topics are seen here."""
        node = self._session.node
        return all(node.count_publishers(f"{self.name}/{short}") for short in _RESULT_TOPICS)

    def _subscribe(self) -> None:
        from rclpy.qos import QoSProfile

        for short, type_name in _RESULT_TOPICS.items():
            self._session.node.create_subscription(
                import_message(type_name),
                f"{self.name}/{short}",
                self._receiver(f"{self.name}/{short}", type_name),
                QoSProfile(depth=1000),
                raw=True,  # a recorder stores the bytes as they came
            )

    def _receiver(self, topic: str, type_name: str) -> Callable[[bytes], None]:
        from rclpy.serialization import deserialize_message

        kind = import_message(type_name)

        def receive(data: bytes) -> None:
            arrived_s = time.monotonic()
            message = deserialize_message(data, kind)
            result = ResultMessage(topic, type_name, data, message, arrived_s)
            self._answers[message.info.camera, result.stamp_ns, message.info.task] += 1
            self.on_result(result)

        return receive

    def _get(self, *names: str, timeout_s: float) -> dict[str, Any]:
        from rcl_interfaces.srv import GetParameters
        from rclpy.parameter import parameter_value_to_python

        request = GetParameters.Request(names=list(names))
        answer = self._session.call(self._parameters, request, timeout_s)
        if len(answer.values) != len(names):
            raise EngineError(
                ErrorCode.NOT_ACTIVE,
                f"{self.name} is no librobot_vlm_ros node: it lacks the parameters {names}",
            )
        values = map(parameter_value_to_python, answer.values)
        return dict(zip(names, values, strict=True))
