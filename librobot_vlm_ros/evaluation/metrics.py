"""How good answers are against ground truth: detection, grounding and caption scores."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.results import Region


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0 to 1; 0 where both have no area."""
    return float(iou_matrix([first], [second])[0, 0])


def iou_matrix(first: npt.ArrayLike, second: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Intersection over union of all boxes [N, 4] with all of `second` [M, 4], as [N, M].

    Boxes are (x_min, y_min, x_max, y_max); one that is inside out or not finite overlaps nothing.
    """
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (first, second))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        low = np.maximum(a[:, None, :2], b[None, :, :2])
        high = np.minimum(a[:, None, 2:], b[None, :, 2:])
        shared = np.maximum(high - low, 0.0).prod(axis=2)
        areas_a, areas_b = _areas(a)[:, None], _areas(b)[None, :]
        ratio = shared / (areas_a + areas_b - shared)
    usable = (areas_a > 0) & (areas_b > 0) & np.isfinite(ratio)
    return np.where(usable, ratio, 0.0)


def _areas(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sides = np.nan_to_num(boxes[:, 2:] - boxes[:, :2], nan=0.0, posinf=0.0, neginf=0.0)
    areas: npt.NDArray[np.float64] = np.maximum(sides, 0.0).prod(axis=1)
    return areas


@dataclass(frozen=True)
class Match:
    """A predicted box and the true box that it is counted for."""

    predicted: int
    """Index among the predicted boxes."""
    truth: int
    """Index among the true boxes."""
    iou: float


def match_boxes(
    predicted: npt.ArrayLike,
    truth: npt.ArrayLike,
    *,
    iou_threshold: float = 0.5,
    predicted_labels: Sequence[str] | None = None,
    truth_labels: Sequence[str] | None = None,
) -> list[Match]:
    """Pairs boxes [N, 4] with boxes [M, 4] one to one, in order of the predicted ones.

    A pair needs an IoU of at least `iou_threshold` and, where both lists of labels are given, equal
    labels. Of all ways to pair, the one with most pairs is taken, and among those the one with the
    largest sum of IoU (optimal, not greedy: the order of the boxes does not matter).
    """
    overlaps = iou_matrix(predicted, truth)
    if overlaps.size == 0:
        return []
    from scipy.optimize import linear_sum_assignment  # here: half a second to import

    allowed = (overlaps >= iou_threshold) & (overlaps > 0)
    if predicted_labels is not None and truth_labels is not None:
        allowed &= np.array(
            [[mine == theirs for theirs in truth_labels] for mine in predicted_labels], bool
        )
    # All IoUs together weigh less than one pair more.
    weights = np.where(allowed, 1.0 + overlaps / (1 + min(overlaps.shape)), 0.0)
    return [
        Match(int(row), int(column), float(overlaps[row, column]))
        for row, column in zip(*linear_sum_assignment(weights, maximize=True), strict=True)
        if allowed[row, column]
    ]


def match_regions(
    predicted: Sequence[Region], truth: Sequence[Region], *, iou_threshold: float = 0.5
) -> list[Match]:
    """`match_boxes` of regions, whose labels must be equal."""
    return match_boxes(
        [region.box for region in predicted],
        [region.box for region in truth],
        iou_threshold=iou_threshold,
        predicted_labels=[region.label for region in predicted],
        truth_labels=[region.label for region in truth],
    )


@dataclass(frozen=True)
class DetectionScores:
    """Counts and scores over a set of frames."""

    frames: int
    predicted: int
    """Boxes that were predicted."""
    expected: int
    """Boxes in the ground truth."""
    matched: int
    precision: float
    """matched / predicted; without predictions 1 when nothing was expected either, else 0."""
    recall: float
    """matched / expected; 1 when nothing was expected."""
    mean_iou: float
    """Mean IoU of the matches; 0 without any."""


def detection_scores(
    frames: Iterable[tuple[Sequence[Region], Sequence[Region]]], *, iou_threshold: float = 0.5
) -> DetectionScores:
    """Scores of (predicted, true) regions of each frame; a match needs label and IoU."""
    count = predicted = expected = 0
    overlaps: list[float] = []
    for found, truth in frames:
        count += 1
        predicted += len(found)
        expected += len(truth)
        matches = match_regions(found, truth, iou_threshold=iou_threshold)
        overlaps += [match.iou for match in matches]
    matched = len(overlaps)
    return DetectionScores(
        frames=count,
        predicted=predicted,
        expected=expected,
        matched=matched,
        precision=matched / predicted if predicted else float(expected == 0),
        recall=matched / expected if expected else 1.0,
        mean_iou=sum(overlaps) / matched if matched else 0.0,
    )


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's mean average precision of boxes, 0 to 1: over labels, and `ap` also over the ten IoU
    thresholds 0.50, 0.55 ... 0.95.
    """

    ap: float
    ap50: float
    ap75: float


def average_precision(
    frames: Iterable[tuple[Sequence[Region], Sequence[Region]]],
) -> AveragePrecision:
    """COCO's AP of (predicted, true) regions of each frame, ranked by the regions' own scores.

    Computed by `faster-coco-eval`, whose figures are those of pycocotools. As there, a label that
    is never in the truth counts nowhere, and at most 100 boxes a frame are looked at. Without truth
    it is 1 when nothing was predicted either, else 0.

    Raises ValueError for a score that is not finite, ImportError where the evaluator is missing.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError(
            "COCO's average precision needs faster-coco-eval: "
            "pip install 'librobot-vlm-ros[evaluation]'"
        ) from error

    pairs = list(frames)
    labels = sorted({region.label for pair in pairs for part in pair for region in part})
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for frame, (predicted, expected) in enumerate(pairs):
        for region in expected:
            entry = _coco_box(region, frame, labels)
            area = entry["bbox"][2] * entry["bbox"][3]
            truth.append({**entry, "id": len(truth) + 1, "area": area, "iscrowd": 0})
        for region in predicted:
            if not math.isfinite(region.score):
                raise ValueError(f"the score of {region.label!r} in frame {frame} is not finite")
            found.append({**_coco_box(region, frame, labels), "score": region.score})
    if not truth or not found:
        return AveragePrecision(*[float(not truth and not found)] * 3)
    dataset = COCO(
        {
            "images": [{"id": frame} for frame in range(len(pairs))],
            "categories": [{"id": number, "name": name} for number, name in enumerate(labels)],
            "annotations": truth,
        }
    )
    evaluator = COCOeval_faster(dataset, dataset.loadRes(found), "bbox")
    evaluator.run()
    figures = evaluator.stats_as_dict
    return AveragePrecision(*(float(figures[key]) for key in ("AP_all", "AP_50", "AP_75")))


def _coco_box(region: Region, frame: int, labels: Sequence[str]) -> dict[str, Any]:
    size = (region.x_max - region.x_min, region.y_max - region.y_min)
    return {
        "image_id": frame,
        "category_id": labels.index(region.label),
        "bbox": [region.x_min, region.y_min, *size],
    }


def grounding_hit(
    found: Sequence[Region], truth: Sequence[Sequence[float]], *, iou_threshold: float = 0.5
) -> bool:
    """Whether the first box found for a phrase meets any of the true boxes of that phrase.

    The usual measure of phrase grounding (recall at 1, any box of the phrase counts).
    """
    return bool(found) and any(iou(found[0].box, box) >= iou_threshold for box in truth)


def named_objects(text: str, vocabulary: Iterable[str]) -> frozenset[str]:
    """The names of `vocabulary` that occur in `text` as whole words, singular or with a plural "s"
    or "es".

    The longest name wins: "a red cube" names "red cube", not also "cube".
    """
    names = {name.lower(): name for name in vocabulary if name}
    if not names:
        return frozenset()
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    pattern = rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?:e?s)?(?!\w)"
    plain = " ".join(text.lower().split())
    return frozenset(names[match] for match in re.findall(pattern, plain))


def caption_exact(caption: str, present: Iterable[str], vocabulary: Iterable[str]) -> bool:
    """Whether a caption names exactly the objects present: none missing, none invented."""
    expected = frozenset(present)
    return named_objects(caption, frozenset(vocabulary) | expected) == expected
