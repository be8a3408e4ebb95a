"""What the standing tasks look for: the parameter `instruction`, which `~/instruction` sets too."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.core import ErrorCode, RequestError, clean_prompt, escape_for_log, get_task
from librobot_vlm_ros.runtime import StandingTask

if TYPE_CHECKING:
    from librobot_vlm_ros.ros.monitoring.log_throttle import ThrottledLog
    from librobot_vlm_ros.ros.parameters.live_parameters import LiveParameters
    from librobot_vlm_ros.ros.parameters.settings import Settings


class Instruction:
    """The current instruction, numbered so that a policy can tell old results from new. The number
    counts up from 1 with each different text; 0 is none so far. Needs no rclpy.
    """

    def __init__(self, text: str = "") -> None:
        self._lock = threading.Lock()
        self.text = ""
        self.number = 0
        self.set(text)

    def set(self, text: str) -> int:
        """Make `text` the instruction; its number. The same text again keeps its number."""
        cleaned = clean_prompt(text, required=False)
        with self._lock:
            if cleaned != self.text:
                self.text = cleaned
                self.number += 1
            return self.number

    @property
    def shown(self) -> str:
        """The text as a log may show it."""
        return escape_for_log(self.text)


def standing_tasks(settings: Settings, instruction: Instruction) -> list[StandingTask]:
    """The standing tasks; those that need text and have none are given the instruction."""
    text, number = instruction.text, instruction.number
    return [
        dataclasses.replace(task, prompt=text, instruction_id=number)
        if get_task(task.task).needs_text and not task.prompt
        else task
        for task in settings.task_list()
    ]


def waiting_tasks(settings: Settings, instruction: Instruction) -> list[str]:
    """Names of the standing tasks that run once there is an instruction."""
    return [
        task.name
        for task in standing_tasks(settings, instruction)
        if get_task(task.task).needs_text and not task.prompt
    ]


class InstructionTopic:
    """`~/instruction` on a node: each message sets the parameter. Refused ones are logged."""

    def __init__(self, node: Any, parameters: LiveParameters, throttled_log: ThrottledLog) -> None:
        from std_msgs.msg import String

        from librobot_vlm_ros.ros.inputs.qos import MatchedSubscription

        self._node = node
        self._parameters = parameters
        self._log = throttled_log
        self._subscription = MatchedSubscription(
            node, String, "~/instruction", self._on_message, depth=10, when_alone="reliable"
        )

    def close(self) -> None:
        """Stop listening."""
        self._subscription.close()

    def check(self) -> None:
        """Follow the publishers; say what keeps their messages away. None at all is no problem."""
        topic = self._subscription
        topic.check()
        if topic.link.problem and self._node.count_publishers(topic.link.topic):
            wrong = RequestError(ErrorCode.TOPIC_MISSING, topic.link.problem, topic.link.fix)
            self._log.error("instruction topic", f"~/instruction: {wrong}")

    def _on_message(self, message: Any) -> None:
        error = self._parameters.set("instruction", message.data)
        if error is not None:
            self._log.error("instruction", f"~/instruction refused: {error}")
