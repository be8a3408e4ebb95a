"""`librobot_vlm_ros.models.florence`: see `aliases`."""

from librobot_vlm_ros.models.families.florence2.model import FlorenceConfig, FlorenceVLM

__all__ = ["FlorenceConfig", "FlorenceVLM"]
