"""The core: frames, tasks, requests, results, coded errors, prompts, images.

Needs the standard library, numpy and the image libraries; neither ROS nor torch.
"""

from __future__ import annotations

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
    bad_image,
    bad_parameter,
    make_error,
)
from librobot_vlm_ros.core.frames import Frame
from librobot_vlm_ros.core.images.compressed import (
    decode_compressed,
    decode_message,
    read_compressed_header,
)
from librobot_vlm_ros.core.images.raw import decode_image
from librobot_vlm_ros.core.limits import DEFAULT_LIMITS, Limits
from librobot_vlm_ros.core.logtext import escape_for_log, shortened
from librobot_vlm_ros.core.prompts import clean_prompt
from librobot_vlm_ros.core.requests import Box, GenerationParams, InferenceRequest, make_request
from librobot_vlm_ros.core.results import EmbeddingData, InferenceInfo, ModelAnswer, Region, Result
from librobot_vlm_ros.core.tasks import TASKS, get_task

__all__ = [
    "DEFAULT_LIMITS",
    "TASKS",
    "BagError",
    "Box",
    "EmbeddingData",
    "EngineError",
    "ErrorCode",
    "Frame",
    "GenerationParams",
    "ImageError",
    "InferenceError",
    "InferenceInfo",
    "InferenceRequest",
    "Limits",
    "ModelAnswer",
    "ModelError",
    "Region",
    "RequestError",
    "Result",
    "VlmError",
    "as_vlm_error",
    "bad_image",
    "bad_parameter",
    "clean_prompt",
    "decode_compressed",
    "decode_image",
    "decode_message",
    "escape_for_log",
    "get_task",
    "make_error",
    "make_request",
    "read_compressed_header",
    "shortened",
]
