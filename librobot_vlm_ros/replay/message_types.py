"""Message classes and QoS profiles of rclpy from what a bag says of a topic."""

from __future__ import annotations

import importlib
import struct
from typing import Any

from librobot_vlm_ros.bags import BagQos
from librobot_vlm_ros.core import BagError, ErrorCode

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")


def import_message(type_name: str) -> Any:
    """The class of `package/msg/Name`. Raises `BagError` (WRONG_TYPE) where it is not installed."""
    package, _, rest = type_name.partition("/")
    kind, _, name = rest.rpartition("/")
    try:
        return getattr(importlib.import_module(f"{package}.{kind or 'msg'}"), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BagError(
            ErrorCode.WRONG_TYPE,
            f"the message type {type_name} is not installed here",
            f"Install or source the package {package}.",
        ) from error


def qos_profile(qos: BagQos, *, reliable: bool = False, shallowest: int = 10) -> Any:
    """The rclpy profile of a publisher that offers `qos`; `reliable` offers that in any case, which
    suits every subscriber.
    """
    from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

    keeps_all = qos.depth == 0
    is_reliable = reliable or qos.reliability == "reliable"
    latched = qos.durability == "transient_local"
    return QoSProfile(
        history=HistoryPolicy.KEEP_ALL if keeps_all else HistoryPolicy.KEEP_LAST,
        # Deeper than recorded: a replay may be faster than the recording was.
        depth=0 if keeps_all else qos.depth if latched else max(qos.depth, shallowest),
        reliability=ReliabilityPolicy.RELIABLE if is_reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def header_stamp_ns(data: bytes) -> int:
    """Stamp of a serialized message that begins with a `std_msgs/Header`, read in place.

    Images are large: nothing else of them is looked at. Raises `BagError` (WRONG_TYPE) for fewer
    bytes than a stamp has.
    """
    if len(data) < 12:
        raise BagError(ErrorCode.WRONG_TYPE, f"{len(data)} bytes are no message with a header")
    order = "<" if data[1] & 1 else ">"  # the encapsulation says how the rest is written
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", data, 4)
    return int(seconds) * 10**9 + int(nanoseconds)
