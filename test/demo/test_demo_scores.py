"""The figures of the demo are those that a person would count."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from librobot_vlm_ros.demo.data import Answer, DemoRun
from librobot_vlm_ros.demo.scores import (
    answer_is_right,
    missed_objects,
    summarize,
    vocabulary,
)

#: Exactly the keys of summary.json.
SUMMARY_KEYS = (
    "frames",
    "results",
    "precision",
    "recall",
    "mean_iou",
    "caption_exact",
    "grounding_hit",
    "stamps_equal",
    "queries_ok",
    "frame_age_p50_s",
    "frame_age_p99_s",
    "model",
    "wall_s",
)


def test_the_summary_has_exactly_its_keys_and_is_json(run: DemoRun) -> None:
    summary = summarize(run, 12.5)
    assert tuple(summary) == SUMMARY_KEYS
    assert json.loads(json.dumps(summary)) == summary
    assert set(summary) == {
        *("frames", "results", "precision", "recall", "mean_iou", "caption_exact"),
        *("grounding_hit", "stamps_equal", "queries_ok", "frame_age_p50_s", "frame_age_p99_s"),
        *("model", "wall_s"),
    }


def test_the_figures_are_counted_from_the_answers(run: DemoRun) -> None:
    summary = summarize(run, 12.5)
    assert (summary["frames"], summary["results"]) == (2, 6)
    assert summary["precision"] == 0.75  # duck, cube, duck of four boxes
    assert summary["recall"] == 0.75  # of four objects
    assert summary["mean_iou"] == 1.0
    assert summary["caption_exact"] == 0.5
    assert summary["grounding_hit"] == 0.5
    assert summary["frame_age_p50_s"] == 0.2
    assert summary["frame_age_p99_s"] == pytest.approx(0.3)
    assert summary["stamps_equal"] is True
    assert (summary["model"], summary["wall_s"]) == ("florence-2-tabletop", 12.5)


def test_a_missing_answer_counts_as_wrong(run: DemoRun) -> None:
    del run.frames[0].answers["caption"], run.frames[0].answers["detect"]
    summary = summarize(run, 1.0)
    assert summary["caption_exact"] == 0.0
    assert summary["recall"] == 0.25


def test_a_result_of_no_frame_that_was_sent_spoils_the_stamps(run: DemoRun) -> None:
    run.unmatched = 1
    assert summarize(run, 1.0)["stamps_equal"] is False
    run.unmatched, run.results = 0, []
    assert summarize(run, 1.0)["stamps_equal"] is False


def test_questions_count_only_when_they_were_answered(
    run: DemoRun, answer: Callable[..., Answer]
) -> None:
    run.questions = [
        answer("ground", 1000, prompt="red cube", regions=[("red cube", (50, 10, 80, 40), 0.9)]),
        answer("detect", 1000, error="BUSY(500): the queue is full."),
    ]
    summary = summarize(run, 1.0)
    assert summary["queries_ok"] == 1
    assert summary["grounding_hit"] == pytest.approx(2 / 3, abs=1e-4)


def test_without_ground_truth_the_quality_is_left_open(run: DemoRun) -> None:
    for frame in run.frames:
        frame.truth = None
    summary = summarize(run, 1.0)
    for key in ("precision", "recall", "mean_iou", "caption_exact", "grounding_hit"):
        assert summary[key] is None
    assert summary["results"] == 6


def test_an_object_that_is_nowhere_in_the_bag_is_noticed_in_a_caption(
    run: DemoRun, answer: Callable[..., Answer]
) -> None:
    words = vocabulary(run)
    said = answer("caption", 1000, "a red cube, a duck and a soccer ball")
    assert answer_is_right(run, said, words) is False


def test_grounding_of_what_is_not_in_view_says_nothing(
    run: DemoRun, answer: Callable[..., Answer]
) -> None:
    words = vocabulary(run)
    asked = answer("ground", 1000, prompt="pick up the teddy bear", regions=[])
    assert answer_is_right(run, asked, words) is None
    assert answer_is_right(run, answer("ground", 1000, prompt="the duck"), words) is False


def test_both_objects_of_a_prompt_must_be_found(
    run: DemoRun, answer: Callable[..., Answer]
) -> None:
    words = vocabulary(run)
    duck = ("duck", (10.0, 10.0, 40.0, 40.0), 0.9)
    cube = ("red cube", (50.0, 10.0, 80.0, 40.0), 0.9)
    prompt = "the duck and the red cube"
    assert answer_is_right(run, answer("ground", 1000, prompt=prompt, regions=[cube, duck]), words)
    one = answer("ground", 1000, prompt=prompt, regions=[duck])
    assert answer_is_right(run, one, words) is False


def test_what_was_missed_is_named(run: DemoRun) -> None:
    assert missed_objects(run.frames[0]) == ()
    assert [region.label for region in missed_objects(run.frames[1])] == ["red cube"]
