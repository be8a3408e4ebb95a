"""The demo's figures: every answer compared with the bag's ground truth and source images."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.demo.data import Answer, DemoRun, FrameRecord, truth_regions
from librobot_vlm_ros.evaluation.metrics import (
    caption_exact,
    detection_scores,
    grounding_hit,
    match_regions,
    named_objects,
)
from librobot_vlm_ros.tabletop.labels import LABELS

Figure = int | float | bool | str | None
#: What summary.json holds.
Summary = dict[str, Figure]


def summarize(run: DemoRun, wall_s: float) -> Summary:
    """The figures of a run; None for one that the bag has no ground truth for.

    `stamps_equal`: every result came with the stamp, frame_id and size of an image that was sent.
    `queries_ok`: how many questions were answered without an error.
    `grounding_hit`: share of the grounding results and questions for an object in view whose first
    box meets it with an IoU of at least 0.5.
    """
    known = [frame for frame in run.frames if frame.truth is not None]
    ages = [answer.age_s for frame in run.frames for answer in frame.answers.values()]
    boxes = detection_scores(
        (_detected(frame), truth_regions(frame.truth)) for frame in known if frame.truth
    )
    words = vocabulary(run)
    captions = [answer_is_right(run, frame.answers.get("caption"), words) for frame in known]
    found = [
        answer_is_right(run, answer, words)
        for answer in [
            *(frame.answers.get("ground") for frame in known),
            *(item for item in run.questions if item.task == "ground"),
        ]
        if answer is not None
    ]
    summary: Summary = {
        "frames": len(run.frames),
        "results": len(run.results),
        "precision": boxes.precision if known else None,
        "recall": boxes.recall if known else None,
        "mean_iou": boxes.mean_iou if known else None,
        "caption_exact": _share([right is True for right in captions]),
        "grounding_hit": _share([right for right in found if right is not None]),
        "stamps_equal": bool(run.results) and run.unmatched == 0,
        "queries_ok": sum(not answer.error for answer in run.questions),
        "frame_age_p50_s": _percentile(ages, 50),
        "frame_age_p99_s": _percentile(ages, 99),
        "model": run.model,
        "wall_s": wall_s,
    }
    return {key: _rounded(value) for key, value in summary.items()}


def vocabulary(run: DemoRun) -> frozenset[str]:
    """Names that a caption could say: those of the model's world and those of the bag. A name that
    is not in view must be noticed too.
    """
    seen = {label for frame in run.frames if frame.truth for label in frame.truth.labels}
    return frozenset(LABELS) | seen


def answer_is_right(run: DemoRun, answer: Answer | None, words: frozenset[str]) -> bool | None:
    """Whether an answer agrees with the truth of its frame; None when that cannot be said (no
    truth, no object of that name in view, no such kind of answer). A missing one is wrong.
    """
    if answer is None or answer.error:
        return False
    frame = run.frame(answer.stamp_ns)
    if frame is None or frame.truth is None:
        return None
    truth = truth_regions(frame.truth)
    if answer.task == "caption":
        return caption_exact(answer.text, frame.truth.labels, words)
    if answer.task == "detect":
        matches = match_regions(answer.regions, truth)
        return len(matches) == len(answer.regions) == len(truth)
    if answer.task == "ground":
        return _grounded(answer, truth, words)
    return None


def missed_objects(frame: FrameRecord) -> tuple[Region, ...]:
    """True objects of a frame that no detection met."""
    if frame.truth is None:
        return ()
    truth = truth_regions(frame.truth)
    met = {match.truth for match in match_regions(_detected(frame), truth)}
    return tuple(region for place, region in enumerate(truth) if place not in met)


def _grounded(answer: Answer, truth: tuple[Region, ...], words: frozenset[str]) -> bool | None:
    """Whether each object of the prompt that is in view was found; None if none of them is."""
    asked = named_objects(answer.prompt, words)
    in_view = {name: [r.box for r in truth if r.label == name] for name in sorted(asked)}
    in_view = {name: boxes for name, boxes in in_view.items() if boxes}
    if not in_view:
        return None

    def found_for(name: str) -> list[Region]:
        if len(asked) == 1:
            return list(answer.regions)
        return [r for r in answer.regions if name in named_objects(r.label, words)]

    return all(grounding_hit(found_for(name), boxes) for name, boxes in in_view.items())


def _detected(frame: FrameRecord) -> tuple[Region, ...]:
    answer = frame.answers.get("detect")
    return answer.regions if answer is not None else ()


def _share(flags: Iterable[bool]) -> float | None:
    values = list(flags)
    return sum(values) / len(values) if values else None


def _percentile(values: list[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def _rounded(value: Figure) -> Figure:
    return round(value, 4) if isinstance(value, float) and math.isfinite(value) else value
