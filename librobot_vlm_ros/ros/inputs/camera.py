"""One camera topic: subscribed, each message read and checked, its frame offered to the engine.

rclpy turns a message into Python objects field by field: for an image that is several times the
cost of taking its bytes. Here rosbags reads the CDR bytes (the encoding that all ROS middlewares
share) and the pixels stay where they are, as a view, where their encoding allows it.

    serialized bytes -> `read_image`: the message's fields
                     -> `frame_from_message`: checked and decoded, an RGB `Frame`
                     -> `Engine.offer`: the newest-frame mailbox
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from builtin_interfaces.msg import Time
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from librobot_vlm_ros.core import (
    ErrorCode,
    Frame,
    RequestError,
    VlmError,
    as_vlm_error,
    bad_image,
    decode_message,
    read_compressed_header,
)
from librobot_vlm_ros.ros.inputs.qos import Link, MatchedSubscription
from librobot_vlm_ros.ros.latest_worker import LatestWorker
from librobot_vlm_ros.ros.monitoring.log_throttle import ThrottledLog
from librobot_vlm_ros.ros.parameters.parameter_syntax import CameraSetting
from librobot_vlm_ros.ros.parameters.settings import Settings
from librobot_vlm_ros.runtime import DropReason, Engine

# These are views or one quick pass; everything else leaves the executor's thread.
_QUICK_ENCODINGS = frozenset({"rgb8", "rgba8", "8UC3"})
_LIVE_DEPTH = 1
_LOCK_STEP_DEPTH = 256
FIRST_COMPLAINT_S = 2.0
_COMPLAINT_PERIOD_S = 30.0
_MAX_TEXT = 4096
_TYPES = get_typestore(Stores.ROS2_JAZZY)


@dataclasses.dataclass
class CameraFaults:
    """What went wrong with the images of one camera since activation."""

    bad_images: int = 0
    last_error: VlmError | None = None
    last_was_bad: bool = False


class Camera:
    """Subscribes to one camera while the node is active and offers its frames to the engine.

    Args:
        settings: the node's settings now.
        jpeg_margin: that parameter, or 0 while whole images are wanted.
    """

    def __init__(
        self,
        node: Any,
        setting: CameraSetting,
        engine: Engine,
        decoder: LatestWorker,
        *,
        settings: Callable[[], Settings],
        jpeg_margin: Callable[[], int],
        throttled_log: ThrottledLog,
    ) -> None:
        self.setting = setting
        self.faults = CameraFaults()
        self._node = node
        self._engine = engine
        self._decoder = decoder
        self._settings = settings
        self._jpeg_margin = jpeg_margin
        self._log = throttled_log
        self._sequence = 0
        self._closed = False
        self._opened_ns = engine.now_ns()
        self._complained_ns: int | None = None
        self._subscription = self._subscribe()

    def _subscribe(self) -> MatchedSubscription:
        setting, settings = self.setting, self._settings()
        image, other, transport = (
            (CompressedImage, Image, "raw")
            if setting.compressed
            else (Image, CompressedImage, "compressed")
        )
        raw = setting.topic.removesuffix("/compressed")
        fix = f"set image_transport:={transport}, or '{setting.name}={raw}:{transport}' in cameras."
        return MatchedSubscription(
            self._node,
            image,
            setting.topic,
            self._on_image,
            raw=True,
            depth=_LOCK_STEP_DEPTH if settings.lock_step else _LIVE_DEPTH,
            reliability=settings.qos_reliability,
            when_alone="reliable" if settings.lock_step else "best_effort",
            other_types={
                f"sensor_msgs/msg/{other.__name__}": f"Set image_transport:={transport}, or "
                f"'{setting.name}={setting.topic}:{transport}' in cameras."
            },
            twin=(raw if setting.compressed else f"{raw}/compressed", fix),
        )

    @property
    def link(self) -> Link:
        """How the subscription stands to its publishers."""
        return self._subscription.link

    def close(self) -> None:
        """Stop listening; what is being decoded is forgotten."""
        self._closed = True
        self._subscription.close()

    def check(self) -> None:
        """Follow the publishers; say what keeps images away, and when they can come again."""
        before = self.link
        changed = self._subscription.check()
        now_ns = self._engine.now_ns()
        if not self.link.problem:
            if changed and before.problem and self._complained_ns is not None:
                self._node.get_logger().info(
                    f"camera '{self.setting.name}': {self.link.topic} is there"
                )
            self._complained_ns = None
            return
        if (now_ns - self._opened_ns) * 1e-9 < FIRST_COMPLAINT_S:
            return  # discovery takes a moment
        since = self._complained_ns
        if since is None or changed or (now_ns - since) * 1e-9 >= _COMPLAINT_PERIOD_S:
            self._complained_ns = now_ns
            self._node.get_logger().warning(f"camera '{self.setting.name}': {self.missing()}")

    def missing(self, *, now: bool = False) -> RequestError | None:
        """The link's problem as an error, as last checked or as it is `now`; None for none."""
        link = self._subscription.look() if now else self.link
        if not link.problem:
            return None
        return RequestError(ErrorCode.TOPIC_MISSING, link.problem, link.fix)

    def _on_image(self, serialized: bytes) -> None:
        received_ns = self._engine.now_ns()
        self._sequence += 1
        sequence = self._sequence
        try:
            message = read_image(serialized, compressed=self.setting.compressed)
        except Exception as error:
            self._refuse(as_vlm_error(error))
            return
        quick = not self.setting.compressed and message.encoding in _QUICK_ENCODINGS
        # In lock-step frames stay in order, and the publisher waits for us.
        if quick or self._settings().lock_step:
            self._take(message, sequence, received_ns)
        elif not self._decoder.put(
            self.setting.name, lambda: self._take(message, sequence, received_ns)
        ):
            self._engine.count_drop(self.setting.name, DropReason.REPLACED)

    def _take(self, message: Any, sequence: int, received_ns: int) -> None:
        if self._closed:
            return
        try:
            frame = frame_from_message(
                message,
                self.setting.name,
                sequence=sequence,
                received_ns=received_ns,
                allow_depth=self._settings().allow_depth,
                enough=self._enough if self._jpeg_margin() else None,
            )
        except Exception as error:
            self._refuse(as_vlm_error(error))
            return
        self.faults.last_was_bad = False
        if not self._closed:  # the engine may be at work again when this is done, for others
            self._engine.offer(frame)

    def _enough(self, width: int, height: int) -> tuple[int, int] | None:
        """How much of a JPEG the model can make use of; None where it wants all of it."""
        size, margin = self._engine.input_size(width, height), self._jpeg_margin()
        return None if size is None or not margin else (margin * size[0], margin * size[1])

    def _refuse(self, error: VlmError) -> None:
        self.faults.bad_images += 1
        self.faults.last_error = error
        self.faults.last_was_bad = True
        self._engine.count_drop(self.setting.name, DropReason.BAD_IMAGE)
        self._log.error(
            f"{self.setting.name}/{error.code}", f"camera '{self.setting.name}': {error}"
        )


# -- from the message to the frame


def stamp_ns(stamp: Any) -> int:
    """`builtin_interfaces/Time` in nanoseconds."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def frame_from_message(
    message: Any,
    camera: str,
    *,
    sequence: int = 0,
    received_ns: int = 0,
    allow_depth: bool = False,
    enough: Callable[[int, int], tuple[int, int] | None] | None = None,
) -> Frame:
    """A checked and decoded frame. Raises `ImageError`.

    Args:
        message: a `sensor_msgs/Image` or `CompressedImage`, or their fields as `read_image` gives
            them. The frame's pixels are a view of an `Image` where its encoding allows it.
        enough: says of a compressed image's width and height how much of it is enough; a JPEG may
            be decoded smaller then (see `decode_compressed`). The frame keeps the size of the whole
            image.
    """
    width = height = 0
    at_least = None
    if enough is not None and hasattr(message, "format"):
        size = read_compressed_header(message.data, format=message.format)
        width, height = size.width, size.height
        at_least = enough(width, height)
    pixels = decode_message(message, allow_depth=allow_depth, at_least=at_least)
    return Frame(
        pixels=pixels,
        camera=camera,
        stamp_ns=stamp_ns(message.header.stamp),
        frame_id=message.header.frame_id,
        sequence=sequence,
        received_ns=received_ns,
        header=message.header,
        source_width=width,
        source_height=height,
    )


def read_image(serialized: bytes, *, compressed: bool) -> Any:
    """The fields of a serialized `sensor_msgs/Image` or `CompressedImage`, `data` a view of the
    bytes. Raises `ImageError` (BAD_IMAGE) for bytes that are none.
    """
    kind = "sensor_msgs/msg/CompressedImage" if compressed else "sensor_msgs/msg/Image"
    try:
        message: Any = _TYPES.deserialize_cdr(memoryview(serialized), kind)
        stamp, frame_id = message.header.stamp, message.header.frame_id
        if len(frame_id) > _MAX_TEXT:
            raise ValueError(f"its frame_id has {len(frame_id)} characters, at most {_MAX_TEXT}")
        header = Header(stamp=Time(sec=stamp.sec, nanosec=stamp.nanosec), frame_id=frame_id)
    except Exception as error:  # whatever rosbags stumbles over
        raise bad_image(
            f"the serialized image cannot be read: {error}",
            "Publisher and subscriber must use the same middleware and message definition.",
        ) from error
    return dataclasses.replace(message, header=header)
