"""Qwen2-VL (Wang et al., 2024, arXiv:2409.12191) on transformers' own Qwen2-VL class."""

from __future__ import annotations

from typing import Any

from librobot_vlm_ros.models.llava import CLIP_MEAN, CLIP_STD
from librobot_vlm_ros.models.notation import TokenBoxes
from librobot_vlm_ros.models.qwen_images import QwenImages
from librobot_vlm_ros.models.qwen_prompts import QWEN2_TASKS, parse_token_boxes
from librobot_vlm_ros.models.qwen_vl import QwenVLM
from librobot_vlm_ros.models.registry import register_vlm

__all__ = ["Qwen2VLM"]


@register_vlm("qwen2-vl-2b", "qwen2-vl-7b")
class Qwen2VLM(QwenVLM):
    """Qwen2-VL of any size. `Qwen2VLM(config)` has random weights; see `create_vlm`."""

    family = "qwen2-vl"
    default_name = "qwen2-vl-2b"
    model_type = "qwen2_vl"
    system = "You are a helpful assistant."
    questions = QWEN2_TASKS
    notation = TokenBoxes()
    parse = staticmethod(parse_token_boxes)

    @staticmethod
    def _default_images(config: Any) -> QwenImages:
        bounds = {"min_pixels": 3136, "max_pixels": 12845056}
        return QwenVLM._grid(config, **bounds, mean=CLIP_MEAN, std=CLIP_STD)
