"""The demo's output bag: the bag's own messages and the node's results among them."""

from __future__ import annotations

import heapq
from pathlib import Path

from librobot_vlm_ros.bags import BagReader, BagSummary, BagWriter
from librobot_vlm_ros.demo.data import DemoRun

__all__ = ["save_bag"]


def save_bag(run: DemoRun, reader: BagReader, path: Path) -> BagSummary:
    """Write the input's topics unchanged and every result, in order of time.

    A result is recorded as long after its frame as it took to arrive. Raises `BagError`.
    """
    late_ns = {frame.stamp_ns: frame.bag_ns - round(frame.sent_s * 1e9) for frame in run.frames}
    results = [
        (round(item.arrived_s * 1e9) + late_ns[item.stamp_ns], item.topic, item.data)
        for item in run.results
        if item.stamp_ns in late_ns
    ]
    recorded = ((item.stamp_ns, item.topic, item.data) for item in reader.messages())
    rows = heapq.merge(recorded, sorted(results, key=_when), key=_when)
    with BagWriter(path, overwrite=True, types=reader.typestore) as bag:
        for topic in reader.topics:
            bag.add_topic(topic.name, topic.type, topic.qos)
        for result in run.results:
            bag.add_topic(result.topic, result.type)
        for stamp_ns, name, data in rows:
            bag.write(name, stamp_ns, data)
    return bag.summary()


def _when(row: tuple[int, str, bytes]) -> int:
    return row[0]
