"""Scores against cases worked out by hand, and matching against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.evaluation.metrics import (
    AveragePrecision,
    average_precision,
    caption_exact,
    detection_scores,
    grounding_hit,
    iou_matrix,
    match_boxes,
    named_objects,
)


def region(label, *box):
    return Region(label, math.nan, *box)


def pairs(*args, **more):
    return [(match.predicted, match.truth) for match in match_boxes(*args, **more)]


def test_boxes_are_paired_one_to_one():
    truth = [(0, 0, 10, 10)]
    assert pairs([(0, 0, 10, 9), (0, 0, 10, 10)], truth) == [(1, 0)]


def test_matching_is_optimal_where_greedy_loses_a_pair():
    """Greedy takes the pair with IoU 0.8 first, and leaves both others without a partner."""
    predicted = [(0, 0, 10, 10), (0, 0, 8, 10)]
    truth = [(0, 0, 10, 8), (0, 3, 10, 13)]
    # first with truth 0: 0.8, first with truth 1: 70/130, second with truth 0: 64/96
    assert pairs(predicted, truth) == [(0, 1), (1, 0)]


def test_two_poor_pairs_go_before_one_good_pair():
    predicted = [(0, 0, 10, 1), (-6, 0, 3, 1)]
    truth = [(0, 0, 9, 1), (8, 0, 13, 1)]
    assert pairs(predicted, truth, iou_threshold=0.1) == [(0, 1), (1, 0)]
    assert pairs(predicted, truth, iou_threshold=0.5) == [(0, 0)]


def test_labels_must_agree_where_they_are_given():
    box = [(0, 0, 10, 10)]
    assert pairs(box, box, predicted_labels=["duck"], truth_labels=["mug"]) == []
    assert pairs(box, box, predicted_labels=["duck"], truth_labels=["duck"]) == [(0, 0)]
    assert pairs(box, box) == [(0, 0)]


def test_the_threshold_counts_itself():
    assert pairs([(0, 0, 10, 10)], [(0, 0, 10, 5)], iou_threshold=0.5) == [(0, 0)]
    assert pairs([(0, 0, 10, 10)], [(0, 0, 10, 5)], iou_threshold=0.51) == []
    assert pairs([(0, 0, 1, 1)], [(5, 5, 6, 6)], iou_threshold=0.0) == []


@pytest.mark.parametrize(
    ("predicted", "truth"), [([], []), ([(0, 0, 1, 1)], []), ([], [(0, 0, 1, 1)])]
)
def test_nothing_pairs_with_nothing(predicted, truth):
    assert pairs(predicted, truth) == []


side = st.integers(1, 12).map(float)
start = st.integers(0, 8).map(float)
box_lists = st.lists(
    st.builds(lambda x, y, w, h: (x, y, x + w, y + h), start, start, side, side),
    min_size=1,
    max_size=4,
)


@given(box_lists, box_lists, st.sampled_from([0.1, 0.3, 0.5]))
def test_the_matching_is_as_good_as_the_best_of_all(predicted, truth, threshold):
    """Most pairs, and the largest sum of IoU among those, by trying every way to pair."""
    found = match_boxes(predicted, truth, iou_threshold=threshold)
    assert len({m.predicted for m in found}) == len({m.truth for m in found}) == len(found)
    overlaps = iou_matrix(predicted, truth)
    rows, columns = overlaps.shape
    size = min(rows, columns)
    best = max(
        (sum(shared >= threshold for shared in picked), sum(s for s in picked if s >= threshold))
        for chosen in itertools.combinations(range(rows), size)
        for order in itertools.permutations(range(columns), size)
        for picked in [[overlaps[pair] for pair in zip(chosen, order, strict=True)]]
    )
    assert len(found) == best[0]
    assert sum(match.iou for match in found) == pytest.approx(best[1])


def test_detection_scores_of_two_frames_counted_by_hand():
    frames = [
        (
            [
                region("duck", 0, 0, 10, 10),
                region("mug", 20, 0, 30, 10),
                region("mug", 50, 0, 60, 10),
            ],
            [region("duck", 0, 0, 10, 8), region("mug", 20, 0, 30, 10)],
        ),
        ([region("red cube", 0, 0, 10, 10)], [region("blue cube", 0, 0, 10, 10)]),
    ]
    scores = detection_scores(frames)
    assert (scores.frames, scores.predicted, scores.expected, scores.matched) == (2, 4, 3, 2)
    assert scores.precision == 2 / 4
    assert scores.recall == 2 / 3
    assert scores.mean_iou == pytest.approx((0.8 + 1.0) / 2)


def test_scores_of_empty_frames():
    nothing = detection_scores([([], [])])
    assert (nothing.precision, nothing.recall, nothing.mean_iou) == (1.0, 1.0, 0.0)
    missed = detection_scores([([], [region("duck", 0, 0, 1, 1)])])
    assert (missed.precision, missed.recall) == (0.0, 0.0)
    invented = detection_scores([([region("duck", 0, 0, 1, 1)], [])])
    assert (invented.precision, invented.recall) == (0.0, 1.0)


def test_grounding_hits_any_box_of_the_phrase_with_its_first_answer():
    found = [region("duck", 0, 0, 10, 10), region("duck", 50, 50, 60, 60)]
    assert grounding_hit(found, [(90, 90, 99, 99), (0, 0, 10, 9)])
    assert not grounding_hit(found, [(50, 50, 60, 60)])
    assert not grounding_hit([], [(0, 0, 1, 1)])
    assert not grounding_hit(found, [])


VOCABULARY = ["cube", "red cube", "blue ball", "duck", "teddy bear", "box"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a red cube, a duck and a blue ball", {"red cube", "duck", "blue ball"}),
        ("A Red Cube and a cube.", {"red cube", "cube"}),
        ("two ducks and three boxes", {"duck", "box"}),
        ("a ducking cubed boxer", set()),
        ("red\n  cube", {"red cube"}),
        ("", set()),
    ],
)
def test_objects_are_named_by_whole_words_longest_first(text, names):
    assert named_objects(text, VOCABULARY) == names


def test_a_caption_is_exact_when_nothing_is_missing_or_invented():
    caption = "a red cube and a duck"
    assert caption_exact(caption, ["duck", "red cube"], VOCABULARY)
    assert caption_exact(caption, ["duck", "red cube", "duck"], VOCABULARY)
    assert not caption_exact(caption, ["duck"], VOCABULARY)
    assert not caption_exact(caption, ["duck", "red cube", "box"], VOCABULARY)
    assert caption_exact("an empty table", [], VOCABULARY)
    assert named_objects("anything", []) == frozenset()


def scored(label, score, *box):
    return Region(label, score, *box)


def test_average_precision_of_a_ranking_worked_out_by_hand():
    """Right, wrong, right (at IoU 0.8): precision 1 up to recall 1/2, then 2/3, read at the 101
    recalls 0, 0.01 ... 1, of which 51 are within the first half.
    """
    truth = [region("duck", 0, 0, 10, 10), region("duck", 50, 0, 60, 10)]
    found = [
        scored("duck", 0.9, 0, 0, 10, 10),
        scored("duck", 0.8, 100, 100, 110, 110),
        scored("duck", 0.7, 50, 0, 60, 8),
    ]
    both, first = (51 + 50 * 2 / 3) / 101, 51 / 101
    scores = average_precision([(found, truth)])
    assert scores.ap50 == pytest.approx(both)
    assert scores.ap75 == pytest.approx(both)
    assert scores.ap == pytest.approx((7 * both + 3 * first) / 10)  # 0.50 to 0.80 and above


def test_average_precision_ranks_over_frames_and_averages_over_labels():
    duck, mug = region("duck", 0, 0, 10, 10), region("mug", 20, 0, 30, 10)
    good, bad = scored("duck", 0.6, *duck.box), scored("duck", 0.9, 40, 40, 50, 50)
    frames = [([good], [duck, mug]), ([bad, scored("ball", 0.9, 0, 0, 5, 5)], [])]
    # The duck comes behind a worse box of another frame; the mug is not found; balls count nowhere.
    assert average_precision(frames).ap50 == pytest.approx((0.5 + 0.0) / 2)
    best = [([scored("duck", 0.1, *duck.box), scored("mug", 0.2, *mug.box)], [duck, mug])]
    assert average_precision(best) == AveragePrecision(1.0, 1.0, 1.0)


def test_average_precision_with_nothing_to_find_or_nothing_found():
    duck = scored("duck", 0.5, 0, 0, 10, 10)
    assert average_precision([([], [])]).ap == 1.0
    assert average_precision([([duck], [])]).ap == 0.0
    assert average_precision([([], [duck])]).ap == 0.0
    with pytest.raises(ValueError, match="score of 'duck' in frame 0"):
        average_precision([([region("duck", 0, 0, 1, 1)], [duck])])
