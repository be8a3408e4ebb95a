"""`librobot_vlm_ros.models.florence`: see `aliases`."""

from librobot_vlm_ros.models.families.florence2.configuration import FlorenceConfig
from librobot_vlm_ros.models.families.florence2.model import FlorenceVLM

__all__ = ["FlorenceConfig", "FlorenceVLM"]
