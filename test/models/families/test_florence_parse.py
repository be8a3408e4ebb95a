"""Florence-2's answers, as literal strings, into regions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.models.families.florence2.processor import (
    NOT_GROUNDED,
    parse_answer,
    without_locations,
)

#: A 1000 x 2000 image: bins are 1 pixel wide and 2 pixels high.
WIDTH, HEIGHT = 1000, 2000


def read(text: str, answer: str = "boxes", **options) -> tuple[list[Region], int]:
    regions, malformed = parse_answer(text, answer, WIDTH, HEIGHT, **options)
    return list(regions), malformed


def loc(*bins: int) -> str:
    return "".join(f"<loc_{number}>" for number in bins)


def test_a_box_lies_at_the_centres_of_its_bins() -> None:
    (region,), malformed = read("red cube<loc_0><loc_10><loc_999><loc_20>")
    assert region.label == "red cube"
    assert region.box == (0.5, 21.0, 999.5, 41.0)
    assert region.polygon == ()
    assert malformed == 0


def test_several_labels_and_several_boxes_of_one_label() -> None:
    text = "</s><s>cube" + loc(1, 2, 3, 4, 5, 6, 7, 8) + "duck" + loc(9, 10, 11, 12) + "</s>"
    regions, malformed = read(text)
    assert [(r.label, r.x_min) for r in regions] == [("cube", 1.5), ("cube", 5.5), ("duck", 9.5)]
    assert malformed == 0


@pytest.mark.parametrize(
    ("text", "labels", "malformed"),
    [
        ("", [], 0),
        ("no box here", [], 1),
        ("cube" + loc(1, 2, 3), [], 1),
        ("cube" + loc(1, 2, 3, 4, 5), ["cube"], 1),
        (loc(1, 2, 3, 4), [], 1),
        (loc(1, 2, 3, 4) + "cube" + loc(1, 2, 3, 4), ["cube"], 1),
        ("cube" + loc(9, 2, 3, 4), [], 1),
        ("cube" + loc(1, 9, 3, 4), [], 1),
        ("cube" + loc(1, 2, 3, 4000), [], 1),
        ("cube" + loc(1, 2, 1, 2), ["cube"], 0),
        ("cube" + loc(1, 2, 3, 4) + "duck", ["cube"], 1),
        ("a < b" + loc(1, 2, 3, 4), ["a < b"], 0),
        ("café ☕" + loc(1, 2, 3, 4), ["café ☕"], 0),
        ("<od>cube</od>" + loc(1, 2, 3, 4), ["cube"], 0),
        ("cube<loc_1><loc_2><loc_3><loc_", [], 2),
    ],
)
def test_what_is_no_box_is_counted_and_the_rest_kept(
    text: str, labels: list[str], malformed: int
) -> None:
    regions, count = read(text)
    assert [region.label for region in regions] == labels
    assert count == malformed


def test_proposals_need_no_label() -> None:
    regions, malformed = read(loc(1, 2, 3, 4, 5, 6, 7, 8), "proposals")
    assert [(r.label, r.x_min) for r in regions] == [("", 1.5), ("", 5.5)]
    assert malformed == 0


def test_written_text_has_a_quad() -> None:
    (region,), malformed = read("EXIT" + loc(10, 10, 50, 12, 50, 30, 10, 28), "quads")
    assert region.label == "EXIT"
    assert region.polygon == ((10.5, 21.0), (50.5, 25.0), (50.5, 61.0), (10.5, 57.0))
    assert region.box == (10.5, 21.0, 50.5, 61.0)
    assert malformed == 0


@pytest.mark.parametrize(
    ("count", "regions", "malformed"), [(7, 0, 1), (9, 1, 1), (16, 1, 1), (0, 0, 1)]
)
def test_a_quad_has_exactly_eight_coordinates(count: int, regions: int, malformed: int) -> None:
    found, bad = read("EXIT" + loc(*range(count)), "quads")
    assert (len(found), bad) == (regions, malformed)


def test_polygons_are_parted_by_separators() -> None:
    text = loc(1, 1, 9, 1, 9, 9) + "<sep>" + loc(20, 20, 30, 20, 30, 30, 20, 30)
    regions, malformed = read(text, "polygons", default_label="the cup")
    assert [region.label for region in regions] == ["the cup", "the cup"]
    assert regions[0].polygon == ((1.5, 3.0), (9.5, 3.0), (9.5, 19.0))
    assert regions[0].box == (1.5, 3.0, 9.5, 19.0)
    assert len(regions[1].polygon) == 4
    assert malformed == 0


@pytest.mark.parametrize(
    ("count", "regions", "malformed"), [(4, 0, 1), (5, 0, 1), (6, 1, 0), (7, 1, 1)]
)
def test_a_polygon_has_at_least_three_points(count: int, regions: int, malformed: int) -> None:
    found, bad = read(loc(*range(count)), "polygons")
    assert (len(found), bad) == (regions, malformed)


def test_open_vocabulary_gives_boxes_or_polygons_by_what_was_written() -> None:
    (box,), _ = read("cup" + loc(1, 2, 3, 4), "boxes_or_polygons")
    assert box.polygon == ()
    (mask,), _ = read("cup<poly>" + loc(1, 1, 9, 1, 9, 9) + "</poly>", "boxes_or_polygons")
    assert (mask.label, len(mask.polygon)) == ("cup", 3)


def test_grounding_leaves_out_words_that_are_no_objects() -> None:
    assert {"it", "the image", "lots"} <= NOT_GROUNDED
    text = "it" + loc(1, 2, 3, 4) + "a red cube" + loc(5, 6, 7, 8)
    regions, malformed = read(text, "grounding")
    assert [region.label for region in regions] == ["a red cube"]
    assert malformed == 0


def test_a_region_is_scored_by_its_own_text() -> None:
    asked = []

    def score(stretches: list[tuple[int, int]]) -> float:
        asked.append(sorted(text[a:b] for a, b in stretches))
        return 0.5

    text = "cube" + loc(1, 2, 3, 4, 5, 6, 7, 8)
    regions, _ = read(text, score=score)
    assert [region.score for region in regions] == [0.5, 0.5]
    assert asked == [
        ["<loc_1>", "<loc_2>", "<loc_3>", "<loc_4>", "cube"],
        ["<loc_5>", "<loc_6>", "<loc_7>", "<loc_8>", "cube"],
    ]


def test_without_probabilities_there_is_no_score() -> None:
    (region,), _ = read("cube" + loc(1, 2, 3, 4))
    assert math.isnan(region.score)


def test_words_of_an_answer_without_its_locations() -> None:
    assert without_locations("a car<loc_1><loc_2> on<loc_3>a road<loc_4>") == "a car on a road"


REFERENCE_CASES = [
    ("description_with_bboxes", "boxes", "cube" + loc(*range(8)) + "duck" + loc(9, 10, 11, 12)),
    ("description_with_bboxes", "boxes", "</s><s>a red car" + loc(52, 332, 932, 774) + "</s>"),
    ("description_with_bboxes", "boxes", "car" + loc(52, 332, 932, 774) + "wheel" + loc(7, 5, 8)),
    (
        "phrase_grounding",
        "grounding",
        f"it{loc(1, 2, 3, 4)}A green car{loc(52, 331, 933, 775)}a house{loc(0, 0, 998, 680)}",
    ),
    ("bboxes", "proposals", loc(52, 331, 933, 775, 1, 2, 3, 4)),
    (
        "ocr",
        "quads",
        f"EXIT{loc(1, 2, 30, 4, 30, 16, 1, 18)}PUSH{loc(5, 6, 70, 8, 70, 19, 5, 20)}",
    ),
    (
        "polygons",
        "polygons",
        f"{loc(1, 2, 30, 4, 30, 60)}<sep>{loc(5, 6, 70, 8, 70, 90)}",
    ),
    ("description_with_bboxes_or_polygons", "boxes_or_polygons", "cup" + loc(1, 2, 3, 4)),
]


@pytest.mark.parametrize(("kind", "answer", "text"), REFERENCE_CASES)
def test_regions_equal_those_of_transformers_where_its_integers_allow(
    kind: str, answer: str, text: str
) -> None:
    tokenizer = SimpleNamespace(all_special_tokens=["<s>", "</s>", "<pad>"])
    config = {kind: {}, "phrase_grounding": {"banned_grounding_tokens": sorted(NOT_GROUNDED)}}
    reference = Florence2PostProcessor(config, tokenizer)(
        text=text, image_size=(WIDTH, HEIGHT), parse_tasks=kind
    )[kind]
    expected = []
    for item in reference:
        label = item.get("cat_name", item.get("text"))
        if kind == "ocr":
            expected.append((label, item["quad_box"]))
        elif kind == "polygons":
            expected += [(label, polygon) for polygon in item["polygons"]]
        elif kind == "phrase_grounding":
            expected += [(label, box) for box in item["bbox"]]
        else:
            expected.append((label, item["bbox"]))
    assert expected
    regions, _ = read(text, answer)
    found = [
        (r.label, [int(v) for point in r.polygon for v in point] or [int(v) for v in r.box])
        for r in regions
    ]
    assert found == expected
