"""One camera: its subscription, its checks, its frames on the way to the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sensor_msgs.msg import CompressedImage, Image

from librobot_vlm_ros.core import ErrorCode, RequestError, VlmError, as_vlm_error
from librobot_vlm_ros.ros.inputs.cdr import RawImage, read_compressed_image, read_image
from librobot_vlm_ros.ros.inputs.image_decoder import Decoder
from librobot_vlm_ros.ros.inputs.qos import Link, MatchedSubscription
from librobot_vlm_ros.ros.monitoring.log_throttle import Throttled
from librobot_vlm_ros.ros.outputs.messages import frame_from_compressed, frame_from_image
from librobot_vlm_ros.ros.parameters.parameter_syntax import CameraSetting
from librobot_vlm_ros.runtime import DropReason, Engine

__all__ = ["Camera", "FIRST_COMPLAINT_S"]

# These are views or one quick pass; everything else leaves the executor's thread.
_QUICK_ENCODINGS = frozenset({"rgb8", "rgba8", "8UC3"})
_LIVE_DEPTH = 1
_LOCK_STEP_DEPTH = 256
FIRST_COMPLAINT_S = 2.0
_COMPLAINT_PERIOD_S = 30.0


@dataclass
class CameraFaults:
    """What went wrong with the images of one camera since activation."""

    bad_images: int = 0
    last_error: VlmError | None = None
    last_was_bad: bool = False


class Camera:
    """Subscribes to one camera while the node is active and offers its frames to the engine."""

    def __init__(
        self,
        node: Any,
        setting: CameraSetting,
        engine: Engine,
        decoder: Decoder,
        *,
        lock_step: bool,
        reliability: str,
        allow_depth: Callable[[], bool],
        jpeg_margin: Callable[[], int],
        complaints: Throttled,
    ) -> None:
        self.setting = setting
        self.faults = CameraFaults()
        self._node = node
        self._engine = engine
        self._decoder = decoder
        self._lock_step = lock_step
        self._allow_depth = allow_depth
        self._jpeg_margin = jpeg_margin
        self._complaints = complaints
        self._read = read_compressed_image if setting.compressed else read_image
        self._sequence = 0
        self._closed = False
        self._opened_ns = engine.now_ns()
        self._complained_ns: int | None = None
        image, other, transport = (
            (CompressedImage, Image, "raw")
            if setting.compressed
            else (Image, CompressedImage, "compressed")
        )
        self._subscription = MatchedSubscription(
            node,
            image,
            setting.topic,
            self._on_image,
            raw=True,
            depth=_LOCK_STEP_DEPTH if lock_step else _LIVE_DEPTH,
            reliability=reliability,
            when_alone="reliable" if lock_step else "best_effort",
            other_types={
                f"sensor_msgs/msg/{other.__name__}": f"Set image_transport:={transport}, or "
                f"'{setting.name}={setting.topic}:{transport}' in cameras."
            },
            twin=_twin(setting, transport),
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
        """The link's problem, as last checked or as it is `now`, as an error; None when there is
        none.
        """
        link = self._subscription.look() if now else self.link
        if not link.problem:
            return None
        return RequestError(ErrorCode.TOPIC_MISSING, link.problem, link.fix)

    def _on_image(self, serialized: bytes) -> None:
        received_ns = self._engine.now_ns()
        self._sequence += 1
        sequence = self._sequence
        try:
            message = self._read(serialized)
        except Exception as error:
            self._refuse(as_vlm_error(error))
            return
        quick = isinstance(message, RawImage) and message.encoding in _QUICK_ENCODINGS
        if quick or self._lock_step:  # lock-step: in order, and the publisher waits for us
            self._take(message, sequence, received_ns)
        elif not self._decoder.put(
            self.setting.name, lambda: self._take(message, sequence, received_ns)
        ):
            self._engine.count_drop(self.setting.name, DropReason.REPLACED)

    def _take(self, message: Any, sequence: int, received_ns: int) -> None:
        if self._closed:
            return
        convert, options = frame_from_image, {}
        if self.setting.compressed:
            margin = self._jpeg_margin()
            convert, options = frame_from_compressed, {"enough": self._enough} if margin else {}
        try:
            frame = convert(
                message,
                self.setting.name,
                sequence=sequence,
                received_ns=received_ns,
                allow_depth=self._allow_depth(),
                **options,
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
        self._complaints.error(
            f"{self.setting.name}/{error.code}", f"camera '{self.setting.name}': {error}"
        )


def _twin(setting: CameraSetting, transport: str) -> tuple[str, str]:
    """(topic, what to set) of the same camera's images in the other `transport`."""
    raw = setting.topic.removesuffix("/compressed")
    topic = raw if setting.compressed else f"{raw}/compressed"
    return topic, (
        f"set image_transport:={transport}, or '{setting.name}={raw}:{transport}' in cameras."
    )
