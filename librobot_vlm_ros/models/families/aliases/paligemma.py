"""`librobot_vlm_ros.models.paligemma`: see `aliases`."""

from librobot_vlm_ros.models.families.paligemma.configuration import PaliGemmaConfig
from librobot_vlm_ros.models.families.paligemma.model import PaliGemmaVLM

__all__ = ["PaliGemmaConfig", "PaliGemmaVLM"]
