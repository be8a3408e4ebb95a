"""Qwen3-VL (Qwen Team, 2025, arXiv:2511.21631) on transformers' own Qwen3-VL class.

Features of three layers of its tower are added behind the first layers of the language model.
"""

from __future__ import annotations

from typing import Any

from librobot_vlm_ros.models.notation_json import JsonBoxes
from librobot_vlm_ros.models.qwen_images import QwenImages
from librobot_vlm_ros.models.qwen_prompts import QWEN3_TASKS, parse_json_boxes
from librobot_vlm_ros.models.qwen_vl import QwenVLM
from librobot_vlm_ros.models.registry import register_vlm

__all__ = ["Qwen3VLM"]

_HALF = (0.5, 0.5, 0.5)


@register_vlm("qwen3-vl-4b", "qwen3-vl-8b")
class Qwen3VLM(QwenVLM):
    """Qwen3-VL of any size. `Qwen3VLM(config)` has random weights; see `create_vlm`."""

    family = "qwen3-vl"
    default_name = "qwen3-vl-4b"
    model_type = "qwen3_vl"
    system = ""
    questions = QWEN3_TASKS
    notation = JsonBoxes()
    parse = staticmethod(parse_json_boxes)

    @staticmethod
    def _default_images(config: Any) -> QwenImages:
        bounds = {"min_pixels": 65536, "max_pixels": 16777216}
        return QwenVLM._grid(config, **bounds, mean=_HALF, std=_HALF)
