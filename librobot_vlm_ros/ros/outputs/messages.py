"""Between ROS messages and the core's dataclasses, both ways. No decision is taken here."""

from __future__ import annotations

import array
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from geometry_msgs.msg import Point32
from std_msgs.msg import Header

from librobot_vlm_ros.core import (
    DEFAULT_LIMITS,
    EmbeddingData,
    Frame,
    InferenceInfo,
    Limits,
    Region,
    Result,
    decode_compressed,
    decode_image,
    read_compressed_header,
)
from librobot_vlm_ros.msg import Caption, Embedding, GroundedRegion, GroundingArray
from librobot_vlm_ros.msg import InferenceInfo as InfoMessage

__all__ = [
    "caption_message",
    "embedding_message",
    "frame_from_compressed",
    "frame_from_image",
    "grounding_message",
    "image_message",
    "info_message",
    "stamp_ns",
]

_NANOSECONDS = 1_000_000_000
_UINT32_MAX = 2**32 - 1


def stamp_ns(stamp: Any) -> int:
    """`builtin_interfaces/Time` in nanoseconds."""
    return int(stamp.sec) * _NANOSECONDS + int(stamp.nanosec)


def frame_from_image(
    message: Any,
    camera: str,
    *,
    sequence: int = 0,
    received_ns: int = 0,
    allow_depth: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> Frame:
    """A checked frame from `sensor_msgs/Image`; its pixels are a view of the message where that is
    possible.

    Raises `ImageError`.
    """
    pixels = decode_image(
        message.data,
        height=message.height,
        width=message.width,
        encoding=message.encoding,
        step=message.step,
        is_bigendian=message.is_bigendian,
        allow_depth=allow_depth,
        limits=limits,
    )
    return _frame(pixels, message.header, camera, sequence, received_ns)


def frame_from_compressed(
    message: Any,
    camera: str,
    *,
    sequence: int = 0,
    received_ns: int = 0,
    allow_depth: bool = False,
    enough: Callable[[int, int], tuple[int, int] | None] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Frame:
    """A checked and decoded frame from `sensor_msgs/CompressedImage`. Raises `ImageError`.

    `enough` says of an image's width and height how much of it is enough; a JPEG may be decoded
    smaller then (see `decode_compressed`). The frame keeps the size of the whole image.
    """
    size, at_least = (0, 0), None
    if enough is not None:
        header = read_compressed_header(message.data, format=message.format, limits=limits)
        size = header.width, header.height
        at_least = enough(*size)
    pixels = decode_compressed(
        message.data,
        format=message.format,
        allow_depth=allow_depth,
        at_least=at_least,
        limits=limits,
    )
    return _frame(pixels, message.header, camera, sequence, received_ns, size)


def _frame(
    pixels: Any,
    header: Any,
    camera: str,
    sequence: int,
    received_ns: int,
    size: tuple[int, int] = (0, 0),
) -> Frame:
    return Frame(
        pixels=pixels,
        camera=camera,
        stamp_ns=stamp_ns(header.stamp),
        frame_id=header.frame_id,
        sequence=sequence,
        received_ns=received_ns,
        header=header,
        source_width=size[0],
        source_height=size[1],
    )


def info_message(info: InferenceInfo) -> InfoMessage:
    """`InferenceInfo`, field for field."""
    return InfoMessage(
        request_id=info.request_id,
        camera=info.camera,
        model=info.model,
        revision=info.revision,
        task=info.task,
        prompt=info.prompt,
        dtype=info.dtype,
        device=info.device,
        instruction_id=info.instruction_id & _UINT32_MAX,
        preprocess_s=info.preprocess_s,
        inference_s=info.inference_s,
        age_s=max(0.0, info.age_s),
        prompt_tokens=info.prompt_tokens,
        generated_tokens=info.generated_tokens,
        batch_size=info.batch_size,
    )


def caption_message(result: Result) -> Caption:
    """A text result, or its error."""
    message = Caption(**_common(result))
    message.score = math.nan
    if result.answer is not None:
        message.text = result.answer.text
        message.score = float(result.answer.score)
    return message


def grounding_message(result: Result, min_score: float = 0.0) -> GroundingArray:
    """A result with regions, or its error; regions scored below `min_score` are left out, unscored
    ones stay.
    """
    message = GroundingArray(**_common(result))
    message.image_width = result.image_width
    message.image_height = result.image_height
    if result.answer is not None:
        message.malformed = result.answer.malformed
        message.regions = [
            _region_message(region)
            for region in result.answer.regions
            if not region.score < min_score  # NaN is below nothing
        ]
    return message


def embedding_message(result: Result) -> Embedding:
    """An embedding result, or its error."""
    message = Embedding(**_common(result))
    if result.answer is not None and result.answer.embedding is not None:
        _fill_tensor(message, result.answer.embedding)
    return message


def _fill_tensor(message: Embedding, embedding: EmbeddingData) -> None:
    little = np.ascontiguousarray(embedding.array, dtype=embedding.array.dtype.newbyteorder("<"))
    message.pooling = embedding.pooling
    message.dtype = embedding.array.dtype.name
    message.shape = [int(length) for length in embedding.array.shape]
    # The one assignment to a uint8[] field that rclpy does not check element by element.
    message.data = array.array("B", little.tobytes())


def _region_message(region: Region) -> GroundedRegion:
    return GroundedRegion(
        label=region.label,
        score=float(region.score),
        x_min=float(region.x_min),
        y_min=float(region.y_min),
        x_max=float(region.x_max),
        y_max=float(region.y_max),
        polygon=[Point32(x=float(x), y=float(y), z=0.0) for x, y in region.polygon],
    )


def _common(result: Result) -> dict[str, Any]:
    header = result.frame_header if isinstance(result.frame_header, Header) else Header()
    return {
        "header": header,
        "info": info_message(result.info),
        "error_code": result.error_code,
        "error_msg": result.error_msg,
    }


def image_message(pixels: Any, header: Any) -> Any:
    """`sensor_msgs/Image` (rgb8) of uint8 RGB [H, W, 3] under the given header."""
    from sensor_msgs.msg import Image

    message = Image(header=header, encoding="rgb8", is_bigendian=0)
    message.height, message.width = int(pixels.shape[0]), int(pixels.shape[1])
    message.step = message.width * 3
    message.data = array.array("B", np.ascontiguousarray(pixels).tobytes())
    return message
