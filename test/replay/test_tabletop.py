"""The shipped bag through the real node with the model that ships: what it says is what is there.

The bounds are those that the model is held to; each frame's stamp, label and boxes are compared
with the ground truth that lies in the bag.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from librobot_vlm_ros.bags import BagReader, FrameTruth, read_truth, shipped_bag
from librobot_vlm_ros.core import Region
from librobot_vlm_ros.evaluation.metrics import (
    caption_exact,
    detection_scores,
    grounding_hit,
    named_objects,
)
from librobot_vlm_ros.tabletop.labels import LABELS

pytestmark = pytest.mark.slow

TASKS = ("caption", "detect", "embed", "ground")
Results = list[Any]


@pytest.fixture(scope="module")
def truth() -> dict[int, FrameTruth]:
    with BagReader(shipped_bag()) as bag:
        return read_truth(bag)


@pytest.fixture(scope="module")
def frame_ids() -> dict[int, str]:
    with BagReader(shipped_bag()) as bag:
        images = [bag.deserialize(message) for message in bag.messages(["/camera/image_raw"])]
    return {
        image.header.stamp.sec * 10**9 + image.header.stamp.nanosec: image.header.frame_id
        for image in images
    }


@pytest.fixture
def replays(
    start_node: Callable[..., Any], lock_step: Callable[..., tuple[Any, Results]]
) -> Callable[..., Results]:
    """`replays(topic)` plays the bag once, at the image topic given, to a node that stays."""
    started: set[str] = set()

    def play(topic: str) -> Results:
        transport = "compressed" if topic.endswith("/compressed") else "raw"
        if not started:
            started.add(topic)
            start_node(
                "model:=florence-2-tabletop",
                "lock_step:=true",
                f"tasks:=[{','.join(TASKS)}]",
                f"image_topic:={topic}",
                f"image_transport:={transport}",
                timeout_s=180.0,
            )
        report, results = lock_step(shipped_bag(), topics=(topic, "/instruction"))
        assert report.unanswered == []
        return results

    return play


def regions_of(message: Any) -> list[Region]:
    return [Region(r.label, r.score, r.x_min, r.y_min, r.x_max, r.y_max) for r in message.regions]


def of_task(results: Results, task: str) -> dict[int, Any]:
    """The messages of one task by the stamp of their frame."""
    return {r.stamp_ns: r.message for r in results if r.message.info.task == task}


def check(results: Results, truth: dict[int, FrameTruth], frame_ids: dict[int, str]) -> None:
    for task in TASKS:
        assert set(of_task(results, task)) <= set(truth), "a stamp that no image had"
    for task in ("caption", "detect", "embed"):
        assert set(of_task(results, task)) == set(truth), f"a frame without {task}"
    for result in results:
        message = result.message
        assert message.header.frame_id == frame_ids[result.stamp_ns]
        assert message.error_code == 0, message.error_msg
        assert message.info.model == "florence-2-tabletop"
        for region in getattr(message, "regions", []):
            assert 0 <= region.x_min < region.x_max <= message.image_width
            assert 0 <= region.y_min < region.y_max <= message.image_height
            assert math.isnan(region.score) or 0 <= region.score <= 1

    detected = of_task(results, "detect")
    scores = detection_scores(
        (
            regions_of(detected[stamp_ns]),
            [Region(item.label, math.nan, *item.box) for item in frame.objects],
        )
        for stamp_ns, frame in truth.items()
    )
    assert scores.precision >= 0.90, scores
    assert scores.recall >= 0.90, scores
    assert scores.mean_iou >= 0.80, scores

    captions = of_task(results, "caption")
    exact = [
        caption_exact(captions[stamp_ns].text, frame.labels, LABELS)
        for stamp_ns, frame in truth.items()
    ]
    assert np.mean(exact) >= 0.85, [message.text for message in captions.values()]

    hits = []
    for stamp_ns, message in of_task(results, "ground").items():
        for name in named_objects(message.info.prompt, LABELS):
            boxes = [item.box for item in truth[stamp_ns].objects if item.label == name]
            if boxes:
                hits.append(grounding_hit(regions_of(message), boxes))
    assert len(hits) >= len(truth) / 2, "the bag's instructions name what is in view"
    assert np.mean(hits) >= 0.92, hits


def content(results: Results) -> list[tuple[Any, ...]]:
    """Everything that may not differ from one replay to the next."""
    rows = []
    for result in sorted(results, key=lambda r: (r.stamp_ns, r.message.info.task)):
        message = result.message
        regions = [
            (r.label, r.score, r.x_min, r.y_min, r.x_max, r.y_max)
            for r in getattr(message, "regions", [])
        ]
        rows.append(
            (
                result.stamp_ns,
                message.info.task,
                message.info.prompt,
                message.info.generated_tokens,
                getattr(message, "text", ""),
                repr(regions),  # a NaN equals nothing, its name does
                bytes(getattr(message, "data", b"")),
            )
        )
    return rows


def test_results_agree_with_the_ground_truth_and_two_replays_are_identical(
    replays: Callable[..., Results], truth: dict[int, FrameTruth], frame_ids: dict[int, str]
) -> None:
    first = replays("/camera/image_raw")
    check(first, truth, frame_ids)
    assert content(replays("/camera/image_raw")) == content(first)


def test_the_jpeg_topic_is_understood_as_well(
    replays: Callable[..., Results], truth: dict[int, FrameTruth], frame_ids: dict[int, str]
) -> None:
    check(replays("/camera_jpeg/image_raw/compressed"), truth, frame_ids)


def test_the_shipped_bag_is_what_the_readme_says() -> None:
    """About ten seconds, 320x240 or larger, both kinds of image, instructions among them."""
    with BagReader(shipped_bag()) as bag:
        assert 8.0 <= bag.duration_s <= 12.0
        raw = bag.require_topic("/camera/image_raw", "sensor_msgs/msg/Image")
        jpeg = bag.require_topic(
            "/camera_jpeg/image_raw/compressed", "sensor_msgs/msg/CompressedImage"
        )
        assert raw.count == jpeg.count == bag.require_topic("/ground_truth").count > 0
        assert bag.require_topic("/instruction", "std_msgs/msg/String").count >= 2
        image = bag.deserialize(next(bag.messages(["/camera/image_raw"])))
        assert image.width >= 320
        assert image.height >= 240
    size = sum(file.stat().st_size for file in shipped_bag().iterdir())
    assert size < 6_000_000
