"""What an engine is told before it runs: limits, cameras, modes. Frozen, and validated at once."""

from __future__ import annotations

import dataclasses
import math
from enum import Enum

from librobot_vlm_ros.core import bad_parameter

NANOSECONDS = 1_000_000_000


class EngineState(str, Enum):
    """Where the engine stands: PAUSED and RUNNING have a model, LOADING gets or changes one."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    PAUSED = "paused"
    RUNNING = "running"
    STOPPED = "stopped"


class DropReason(str, Enum):
    """Why a frame was not processed."""

    REPLACED = "replaced"  # a newer frame came while the model was busy
    NOT_DUE = "not_due"  # no standing task wanted it: their rates are below the camera's
    TOO_OLD = "too_old"
    NOT_ACTIVE = "not_active"
    UNKNOWN_CAMERA = "unknown_camera"
    BAD_IMAGE = "bad_image"


@dataclasses.dataclass(frozen=True)
class CameraConfig:
    """One camera. timeout_s [s]: silence after which it is reported stale; 0 = never."""

    name: str
    timeout_s: float = 2.0

    def __post_init__(self) -> None:
        if not self.name:
            raise bad_parameter("a camera without a name", "give each camera a name")
        _at_least("timeout_s", self.timeout_s, 0.0)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Limits and modes of one engine.

    Args:
        queue_size: on-demand requests that may wait beside those in work; beyond: BUSY.
        max_batch: requests the backend is given at once, at most.
        max_frame_age_s: standing tasks refuse frames received longer ago [s]; 0 = no limit.
        history_frames: recent frames kept per camera for queries by stamp.
        lock_step: process every offered frame in order (replay); no age limit, nothing dropped.
        warm_up: run the backend's warm-up as part of loading.
    """

    queue_size: int = 8
    max_batch: int = 8
    max_frame_age_s: float = 1.0
    history_frames: int = 8
    lock_step: bool = False
    warm_up: bool = True

    def __post_init__(self) -> None:
        _at_least("queue_size", self.queue_size, 1)
        _at_least("max_batch", self.max_batch, 1)
        _at_least("max_frame_age_s", self.max_frame_age_s, 0.0)
        _at_least("history_frames", self.history_frames, 0)


def _at_least(name: str, value: float, least: float) -> None:
    if not math.isfinite(value) or value < least:
        raise bad_parameter(
            f"{name} is {value}, expected a finite number of at least {least}",
            f"set {name} to {least} or more",
        )


def to_ns(seconds: float) -> int:
    """Seconds as whole nanoseconds."""
    return round(seconds * NANOSECONDS)


def to_s(nanoseconds: int) -> float:
    """Nanoseconds as seconds."""
    return nanoseconds / NANOSECONDS
