"""`librobot_vlm_ros.models.paligemma`: see `aliases`."""

from librobot_vlm_ros.models.families.paligemma.model import PaliGemmaConfig, PaliGemmaVLM

__all__ = ["PaliGemmaConfig", "PaliGemmaVLM"]
