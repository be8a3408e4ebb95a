"""Bags: reading db3 and MCAP files, writing them, and the ground truth that our own bags carry.

Needs `rosbags`, `mcap`, numpy and Pillow; no ROS installation. May import `core` only.
"""

from __future__ import annotations

from librobot_vlm_ros.bags.camera_bag import (
    TRUTH_TOPIC,
    FrameTruth,
    TruthObject,
    read_truth,
    shipped_bag,
    write_camera_bag,
)
from librobot_vlm_ros.bags.qos import BagQos
from librobot_vlm_ros.bags.reader import BagMessage, BagReader, BagTopic
from librobot_vlm_ros.bags.typestore import package_typestore
from librobot_vlm_ros.bags.writer import BagSummary, BagWriter

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
