"""Scoring of the embedded model: scenes and answers made by hand, no rendering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from librobot_vlm_ros.core import BagError, ErrorCode, InferenceRequest, ModelAnswer, Region
from librobot_vlm_ros.tabletop.evaluate import evaluate, score_scenes
from librobot_vlm_ros.tabletop.scenes import Scene, SceneObject

DUCK = SceneObject("duck", (10.0, 10.0, 40.0, 40.0))
CUBE = SceneObject("red cube", (50.0, 10.0, 80.0, 40.0))


def scene(*objects: SceneObject) -> Scene:
    return Scene(np.zeros((60, 100, 3), np.uint8), objects)


class Model:
    """Sees every duck, and calls every cube a mug; sure of the former, not of the latter."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = scenes

    def run(self, requests: Sequence[InferenceRequest]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: InferenceRequest) -> ModelAnswer:
        seen = self.scenes[request.frame.sequence].objects
        duck = Region("duck", 0.9, *DUCK.box)
        mug = Region("mug", 0.3, *CUBE.box)
        regions = [duck if item is DUCK else mug for item in seen]
        if request.task == "ground":
            regions = [duck] if "duck" in request.prompt else []
        names = " and ".join(f"a {region.label}" for region in regions)
        return ModelAnswer(text=names, regions=tuple(regions))


def test_every_figure_is_counted_over_all_scenes() -> None:
    scenes = [scene(DUCK, CUBE), scene(DUCK)]
    figures = score_scenes(Model(scenes), scenes, seed=1)
    assert figures["frames"] == 2
    assert figures["objects"] == 3
    assert (figures["precision"], figures["recall"]) == (2 / 3, 2 / 3)
    assert figures["mean_iou"] == 1.0
    assert figures["grounding_hit"] == 2 / 3
    assert figures["caption_exact"] == 0.5
    assert figures["most_missed"] == {"red cube": 1}
    # Of two labels in the truth one is found without a fault, the other never.
    assert (figures["ap"], figures["ap50"], figures["ap75"]) == (0.5, 0.5, 0.5)


def test_a_refused_question_ends_the_scoring() -> None:
    class Refusing(Model):
        def run(self, requests: Sequence[InferenceRequest]) -> list[Any]:
            return [BagError(ErrorCode.BAG_UNREADABLE, "no")]

    with pytest.raises(BagError, match="no"):
        score_scenes(Refusing([]), [scene(DUCK)], seed=1)


def test_seeds_of_the_training_renders_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="choose a smaller SEED"):
        evaluate(9_999_999, 2, tmp_path, "florence-2-tabletop", None)
