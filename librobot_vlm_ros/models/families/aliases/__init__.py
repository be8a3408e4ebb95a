"""Short names of the families' modules: `librobot_vlm_ros.models.qwen_vl` and the like.

The specification's examples import configurations by them. This folder is on the path of
`librobot_vlm_ros.models`; nothing in the package imports from here.
"""
