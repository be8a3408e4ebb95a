"""`librobot_vlm_ros.models.qwen_vl`: see `aliases`."""

from librobot_vlm_ros.models.families.qwen_vl.configuration import QwenVLConfig
from librobot_vlm_ros.models.families.qwen_vl.model import QwenVLM

__all__ = ["QwenVLConfig", "QwenVLM"]
