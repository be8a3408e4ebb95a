"""The runtime: one thread owns the model; newest frames, standing tasks, requests, deadlines,
health.

Needs neither ROS nor torch.
"""

from __future__ import annotations

from .config import CameraConfig, DropReason, EngineConfig, EngineState
from .engine import Engine
from .garbage import collect, settle
from .loader import BackendFactory, LoadReport, available_memory_bytes
from .results import frame_age_s, with_age
from .standing import StandingTask
from .stats import CameraStats, EngineStats
from .watchdog import CameraEvent

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
    "frame_age_s",
    "settle",
    "with_age",
]
