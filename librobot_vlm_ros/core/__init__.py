"""The core: frames, requests, results, errors, images, prompts, box geometry.

Needs the standard library, numpy and the image libraries; neither ROS nor torch.
"""

from __future__ import annotations

from librobot_vlm_ros.core.encodings import ENCODINGS, Encoding, get_encoding
from librobot_vlm_ros.core.errors import (
    BagError,
    EngineError,
    ErrorCode,
    ImageError,
    InferenceError,
    ModelError,
    RequestError,
    VlmError,
    as_vlm_error,
    make_error,
)
from librobot_vlm_ros.core.frames import Frame
from librobot_vlm_ros.core.geometry import (
    box_area,
    clip_box,
    iou,
    iou_matrix,
    polygon_area,
    polygon_box,
    scale_box,
)
from librobot_vlm_ros.core.images import (
    CompressedHeader,
    converter_name,
    decode_compressed,
    decode_image,
    read_compressed_header,
)
from librobot_vlm_ros.core.limits import DEFAULT_LIMITS, Limits
from librobot_vlm_ros.core.logtext import escape_for_log, shortened
from librobot_vlm_ros.core.metrics import (
    DetectionScores,
    Match,
    caption_exact,
    detection_scores,
    grounding_hit,
    match_boxes,
    named_objects,
)
from librobot_vlm_ros.core.prompts import clean_prompt
from librobot_vlm_ros.core.requests import Box, GenerationParams, InferenceRequest, make_request
from librobot_vlm_ros.core.results import EmbeddingData, InferenceInfo, ModelAnswer, Region, Result
from librobot_vlm_ros.core.tasks import TASKS, TaskSpec, get_task, task_names
from librobot_vlm_ros.core.transforms import ImageTransform

__all__ = [
    "DEFAULT_LIMITS",
    "ENCODINGS",
    "TASKS",
    "BagError",
    "Box",
    "CompressedHeader",
    "DetectionScores",
    "EmbeddingData",
    "Encoding",
    "EngineError",
    "ErrorCode",
    "Frame",
    "GenerationParams",
    "ImageError",
    "ImageTransform",
    "InferenceError",
    "InferenceInfo",
    "InferenceRequest",
    "Limits",
    "Match",
    "ModelAnswer",
    "ModelError",
    "Region",
    "RequestError",
    "Result",
    "TaskSpec",
    "VlmError",
    "as_vlm_error",
    "box_area",
    "caption_exact",
    "clean_prompt",
    "clip_box",
    "converter_name",
    "decode_compressed",
    "decode_image",
    "detection_scores",
    "escape_for_log",
    "get_encoding",
    "get_task",
    "grounding_hit",
    "iou",
    "iou_matrix",
    "make_error",
    "make_request",
    "match_boxes",
    "named_objects",
    "polygon_area",
    "polygon_box",
    "read_compressed_header",
    "scale_box",
    "shortened",
    "task_names",
]
