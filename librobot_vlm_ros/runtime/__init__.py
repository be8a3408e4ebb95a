"""The runtime: one thread owns the model; newest frames, standing tasks, requests, deadlines,
health.

Needs neither ROS nor torch.
"""

from __future__ import annotations

from librobot_vlm_ros.runtime.config import CameraConfig, DropReason, EngineConfig, EngineState
from librobot_vlm_ros.runtime.engine import Engine
from librobot_vlm_ros.runtime.loader import (
    BackendFactory,
    LoadReport,
    available_memory_bytes,
    collect,
    settle,
)
from librobot_vlm_ros.runtime.pending_request import with_age
from librobot_vlm_ros.runtime.scheduler import StandingTask
from librobot_vlm_ros.runtime.stats import CameraStats, EngineStats
from librobot_vlm_ros.runtime.watchdog import CameraEvent

__all__ = [
    "BackendFactory",
    "CameraConfig",
    "CameraEvent",
    "CameraStats",
    "DropReason",
    "Engine",
    "EngineConfig",
    "EngineState",
    "EngineStats",
    "LoadReport",
    "StandingTask",
    "available_memory_bytes",
    "collect",
    "settle",
    "with_age",
]
