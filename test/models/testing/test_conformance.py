"""The conformance check measures: it passes what is right, and finds each kind of fault."""

from __future__ import annotations

import dataclasses

import pytest

from librobot_vlm_ros.models import list_vlms, model_info
from librobot_vlm_ros.models.testing import conformance
from librobot_vlm_ros.models.testing.conformance import CONVERSION_TOLERANCE, check_model


@pytest.mark.parametrize("name", list_vlms())
def test_every_registered_model_conforms(name: str) -> None:
    found, info = check_model(name), model_info(name)
    assert (found.ok, found.error) == (True, "")
    assert found.parameters == info.parameters
    assert found.tasks == list(info.tasks)
    if info.default_pretrained is not None:  # what is converted is measured, and is no copy
        assert found.conversion_max_abs_diff is not None
        assert 0 < found.conversion_max_abs_diff <= CONVERSION_TOLERANCE
    if "torch" in info.requires:
        assert found.preprocess_max_abs_diff is not None


def test_a_converter_that_mixes_up_two_keys_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from librobot_vlm_ros.models.families.llava import checkpoint as llava_convert

    right = llava_convert.renamed

    def wrong(key: str, renames: object) -> str:
        swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        for old, new in swapped.items():
            if old in key:
                return right(key.replace(old, new), renames)  # type: ignore[arg-type]
        return right(key, renames)  # type: ignore[arg-type]

    monkeypatch.setattr(llava_convert, "renamed", wrong)
    found = check_model("llava-v1.5-7b")
    assert not found.ok
    assert found.conversion_max_abs_diff > CONVERSION_TOLERANCE
    assert "conversion: differs by" in found.error


def test_wrong_counts_pixels_and_tasks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from librobot_vlm_ros.models.testing import paligemma as hooks

    info = model_info("paligemma-3b")
    strange = dataclasses.replace(
        info, parameters=info.parameters + 1, tasks=(*info.tasks, "region_ocr")
    )
    right = hooks.pixels
    monkeypatch.setattr(
        hooks, "pixels", lambda vlm, image: (right(vlm, image)[0], right(vlm, image[::-1])[1])
    )
    monkeypatch.setattr(conformance, "model_info", lambda name: strange)
    found = check_model("paligemma-3b")
    assert not found.ok
    for part in ("parameters: ", "preprocessing: differs by", "task region_ocr: "):
        assert part in found.error
    assert "caption" in found.tasks
    assert "region_ocr" not in found.tasks


def test_a_family_without_a_check_is_not_called_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    strange = dataclasses.replace(model_info("paligemma-3b"), module="families.nobody.model")
    monkeypatch.setattr(conformance, "model_info", lambda name: strange)
    found = check_model("paligemma-3b")
    assert not found.ok
    assert "testing.nobody" in found.error
