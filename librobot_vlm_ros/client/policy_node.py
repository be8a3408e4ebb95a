"""A policy node to copy: the node's caption, grounding and embedding in, a pointing target out.

    ~/target   geometry_msgs/PointStamped   where to point: x and y in pixels of the source image
                                            (origin top left), z = 0, under the image's own header

It acts on answers to the present instruction only, smooths the target while the scene stays the
same, and starts afresh when the picture changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from geometry_msgs.msg import PointStamped
from rclpy.node import Node
from std_msgs.msg import String

from librobot_vlm_ros.core import VlmError, clean_prompt
from librobot_vlm_ros.msg import Caption, Embedding, GroundingArray
from librobot_vlm_ros.tensors import EmbeddingSpace, to_array


class PresentInstruction:
    """Tells answers to the present instruction from those to an older one.

    `instruction_id` of a result only counts up; what was said on the topic but is not answered yet
    is known by its text.
    """

    def __init__(self) -> None:
        self.text = ""
        self._number = 0
        self._unanswered = False

    def said(self, text: str) -> None:
        """An instruction was given on the topic. Raises `VlmError` for one that the node refuses
        too; the one before it stays.
        """
        text = clean_prompt(text, required=False)  # the form in which results carry it
        self._unanswered = self._unanswered or text != self.text
        self.text = text

    def is_answered_by(self, info: Any) -> bool:
        """Whether a result (its `info`) answers the present instruction."""
        if info.instruction_id == 0 or info.instruction_id < self._number:
            return False  # it asks something of its own, or is of an older instruction
        changed = info.instruction_id > self._number
        self._number = info.instruction_id
        if info.prompt == self.text:
            self._unanswered = False
            return True
        if self._unanswered or not changed:
            return False
        self.text = info.prompt  # set by parameter, not on the topic
        return True

    def node_restarted(self) -> None:
        """The node counts from 1 again."""
        self._number = 0


class PointingPolicy(Node):
    """Points at the best region that the instruction names. `vlm` is the name of the node."""

    def __init__(
        self, vlm: str = "/vlm", *, smoothing: float = 0.5, same_scene: float = 0.9, **options: Any
    ) -> None:
        super().__init__("pointing_policy", **options)
        self._smoothing, self._same_scene = smoothing, same_scene
        self._instruction = PresentInstruction()
        self._caption = ""
        self._space: EmbeddingSpace | None = None
        self._scene: np.ndarray | None = None
        self._point: np.ndarray | None = None
        self._refused_number = -1
        self._target = self.create_publisher(PointStamped, "~/target", 10)
        self.create_subscription(String, f"{vlm}/instruction", self._on_instruction, 10)
        self.create_subscription(Caption, f"{vlm}/caption", self._on_caption, 10)
        self.create_subscription(GroundingArray, f"{vlm}/grounding", self._on_grounding, 10)
        self.create_subscription(Embedding, f"{vlm}/embedding", self._on_embedding, 10)
        self.create_timer(0.5, lambda: self._look_for(f"{vlm}/grounding"))

    def _on_instruction(self, message: String) -> None:
        try:
            self._instruction.said(message.data)
        except VlmError as error:
            self.get_logger().error(f"instruction not taken: {error}")
            return
        self._point = None

    def _on_caption(self, message: Caption) -> None:
        if not message.error_code:
            self._caption = message.text

    def _on_embedding(self, message: Embedding) -> None:
        try:
            if self._space is None:
                self._space = EmbeddingSpace.of(message)
            scene = to_array(message, self._space)  # refuses another model's
        except VlmError as error:
            self.get_logger().warning(f"embedding not used: {error}", throttle_duration_sec=5.0)
            if not message.error_code:  # the model was switched: start with the new one's
                self._space = self._scene = None
            return
        scene = scene.reshape(-1, scene.shape[-1]).mean(axis=0, dtype=np.float32)
        if self._scene is not None and _cosine(scene, self._scene) < self._same_scene:
            self.get_logger().info(f"another scene: {self._caption}")
            self._point = None
        self._scene = scene

    def _on_grounding(self, message: GroundingArray) -> None:
        if message.error_code or message.info.task != "ground":
            return
        if not self._instruction.is_answered_by(message.info):
            number = message.info.instruction_id
            if number and number != self._refused_number:
                self._refused_number = number
                self.get_logger().info(f"results of instruction {number} are refused: it is old")
            return
        if not message.regions:
            self._point = None  # nothing to point at: say nothing
            return
        best = max(message.regions, key=lambda region: np.nan_to_num(region.score, nan=-1.0))
        seen = np.array([best.x_min + best.x_max, best.y_min + best.y_max]) / 2
        if self._point is not None:
            seen = self._smoothing * self._point + (1 - self._smoothing) * seen
        self._point = seen
        target = PointStamped(header=message.header)
        target.point.x, target.point.y = (float(value) for value in seen)
        self._target.publish(target)

    def _look_for(self, topic: str) -> None:
        if self.count_publishers(topic) == 0:
            self._instruction.node_restarted()


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if one.shape == other.shape and length > 0 else 0.0
