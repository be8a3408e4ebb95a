"""`librobot_vlm_ros.models.internvl`: see `aliases`."""

from librobot_vlm_ros.models.families.internvl2.model import InternVLConfig, InternVLVLM

__all__ = ["InternVLConfig", "InternVLVLM"]
