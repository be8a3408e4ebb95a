"""Quality of service as a bag records it, in words that ROS and the file format share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rosbags.interfaces import (
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)

_MAX_DEPTH = 1000


@dataclass(frozen=True)
class BagQos:
    """What a publisher of a topic offers.

    Deadline, lifespan and liveliness are left out: they speak of the timing of the machine that
    recorded, which a replay at another rate does not keep.
    """

    reliability: Literal["reliable", "best_effort"] = "reliable"
    durability: Literal["volatile", "transient_local"] = "volatile"
    depth: int = 10
    """Messages kept for late or slow subscribers; 0 means all."""


def from_recorded(profiles: Sequence[Qos]) -> BagQos:
    """One offer for all publishers that were recorded on a topic.

    Several offers become the strongest that all subscribers of any of them can match: reliable if
    one was reliable, transient local if one was. What a bag leaves open is ROS's own default.
    """
    if not profiles:
        return BagQos()
    reliable = any(profile.reliability != QosReliability.BEST_EFFORT for profile in profiles)
    latched = any(profile.durability == QosDurability.TRANSIENT_LOCAL for profile in profiles)
    keep_all = any(profile.history == QosHistory.KEEP_ALL for profile in profiles)
    depth = max(profile.depth for profile in profiles)
    return BagQos(
        reliability="reliable" if reliable else "best_effort",
        durability="transient_local" if latched else "volatile",
        depth=0 if keep_all else min(max(depth, 1), _MAX_DEPTH),
    )


def to_recorded(qos: BagQos) -> Qos:
    """The same in the form that `rosbags` writes."""
    forever = QosTime(9223372036, 854775807)  # how rosbag2 records "no limit"
    return Qos(
        history=QosHistory.KEEP_LAST if qos.depth else QosHistory.KEEP_ALL,
        depth=qos.depth,
        reliability=QosReliability[qos.reliability.upper()],
        durability=QosDurability[qos.durability.upper()],
        deadline=forever,
        lifespan=forever,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=forever,
        avoid_ros_namespace_conventions=False,
    )
