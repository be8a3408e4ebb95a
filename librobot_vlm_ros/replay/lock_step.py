"""Follow the running node, so that a replay can keep in step with it.

In lock-step a frame is sent only when the node has answered the one before. Which answers are due
for a frame follows from the node's own parameters: every standing task without a rate that the
loaded model can do, on that camera. Tasks with a rate are not waited for.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
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


class NodeLink:
    """The node called `name`: its settings, its results and whether a frame is answered."""

    def __init__(self, session: Session, name: str = "/vlm") -> None:
        self.name = name
        """Absolute."""
        self.cameras: dict[str, str] = {}
        """Names of the cameras by topic."""
        self.tasks: tuple[Any, ...] = ()
        """Those of the node's standing tasks that are waited for."""
        self.instruction = ""
        self.lock_step = False
        self._session = session
        self.on_result: Callable[[ResultMessage], None] = lambda result: None
        self.check: Callable[[], None] = lambda: None
        """Called while waiting for answers; may raise to end a wait that is in vain."""
        self._answers: defaultdict[tuple[str, int], Counter[str]] = defaultdict(Counter)
        """Of each frame (camera, stamp) by task."""
        self._parameters: Any = None

    def connect(self, timeout_s: float = 10.0) -> None:
        """Find the node, read its settings, listen to its results.

        Raises `EngineError`: DEADLINE_EXCEEDED when it is not there; `RequestError` BAD_PARAMETER
        when all its tasks have a rate, so that nothing says that a frame is done.
        """
        from rcl_interfaces.srv import GetParameters

        from librobot_vlm_ros.ros.parameters.parameter_syntax import parse_cameras, parse_tasks
        from librobot_vlm_ros.srv import ListModels

        node = self._session.node
        self._parameters = node.create_client(GetParameters, f"{self.name}/get_parameters")
        listing = node.create_client(ListModels, f"{self.name}/list_models")
        for short, type_name in _RESULT_TOPICS.items():
            self._subscribe(f"{self.name}/{short}", type_name)
        values = self._get(
            "tasks", "cameras", "image_topic", "image_transport", "lock_step", "instruction",
            timeout_s=timeout_s,
        )  # fmt: skip
        models = self._session.call(listing, ListModels.Request(), timeout_s)
        can = {task for m in models.models if m.name == models.active for task in m.tasks}
        if not models.active:
            raise EngineError(
                ErrorCode.NOT_ACTIVE,
                f"{self.name} has no model loaded",
                f"Activate it: ros2 lifecycle set {self.name} configure (then activate), or start "
                "it with autostart:=true.",
            )
        self.lock_step = values["lock_step"]
        self.instruction = values["instruction"]
        # ROS has no empty list of strings: the node then holds one blank entry.
        entries = [entry for entry in values["cameras"] if entry.strip()]
        tasks = [entry for entry in values["tasks"] if entry.strip()]
        cameras = parse_cameras(entries, values["image_topic"], values["image_transport"])
        self.cameras = {resolve(item.topic, self.name): item.name for item in cameras}
        standing = parse_tasks(tasks, [item.name for item in cameras])
        self.tasks = tuple(item for item in standing if item.rate_hz == 0 and item.task in can)
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
            and item.runs_on(camera)
            and (self.instruction or item.prompt or not get_task(item.task).needs_text)
        )

    def forget_answers(self, topic: str, stamp_ns: int) -> None:
        """To be called before a frame is sent: earlier answers for its stamp do not count."""
        self._answers.pop((self.cameras.get(topic, ""), stamp_ns), None)

    def wait_for_answers(self, topic: str, stamp_ns: int, timeout_s: float) -> bool:
        """Wait until all results that are due for that frame have come; False when not in time."""
        frame = (self.cameras.get(topic, ""), stamp_ns)
        due = self.expected(topic)

        def answered() -> bool:
            self.check()
            return self._answers[frame] >= due

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
            self._session.spin_for(0.02)
        return False

    def publishes_here(self) -> bool:
        """Whether the node's result topics are seen here."""
        node = self._session.node
        return all(node.count_publishers(f"{self.name}/{short}") for short in _RESULT_TOPICS)

    def _subscribe(self, topic: str, type_name: str) -> None:
        from rclpy.qos import QoSProfile
        from rclpy.serialization import deserialize_message

        kind = import_message(type_name)

        def receive(data: bytes) -> None:
            arrived_s = time.monotonic()
            message = deserialize_message(data, kind)
            result = ResultMessage(topic, type_name, data, message, arrived_s)
            self._answers[message.info.camera, result.stamp_ns][message.info.task] += 1
            self.on_result(result)

        # Raw: a recorder stores the bytes as they came.
        qos = QoSProfile(depth=1000)
        self._session.node.create_subscription(kind, topic, receive, qos, raw=True)

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
