"""`librobot_vlm_ros.models.llava`: see `aliases`."""

from librobot_vlm_ros.models.families.llava.model import LlavaConfig, LlavaVLM

__all__ = ["LlavaConfig", "LlavaVLM"]
