"""`librobot_vlm_ros.models.llava`: see `aliases`."""

from librobot_vlm_ros.models.families.llava.configuration import LlavaConfig
from librobot_vlm_ros.models.families.llava.model import LlavaVLM

__all__ = ["LlavaConfig", "LlavaVLM"]
