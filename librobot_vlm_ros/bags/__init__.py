"""Bags: reading db3 and MCAP files, writing them, and the ground truth that our own bags carry.

Needs `rosbags`, numpy and Pillow; no ROS installation. May import `core` only.
"""

from __future__ import annotations

from .camera_bag import write_camera_bag
from .quality import BagQos
from .reader import BagMessage, BagReader, BagTopic
from .shipped import shipped_bag
from .truth import TRUTH_TOPIC, FrameTruth, TruthObject, read_truth
from .typestore import package_typestore
from .writer import BagSummary, BagWriter

__all__ = [
    "TRUTH_TOPIC",
    "BagMessage",
    "BagQos",
    "BagReader",
    "BagSummary",
    "BagTopic",
    "BagWriter",
    "FrameTruth",
    "TruthObject",
    "package_typestore",
    "read_truth",
    "shipped_bag",
    "write_camera_bag",
]
