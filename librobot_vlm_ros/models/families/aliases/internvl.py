"""`librobot_vlm_ros.models.internvl`: see `aliases`."""

from librobot_vlm_ros.models.families.internvl2.configuration import InternVLConfig
from librobot_vlm_ros.models.families.internvl2.model import InternVLVLM

__all__ = ["InternVLConfig", "InternVLVLM"]
