"""How a VLM is put together: few classes, parts as objects, rows that are enough."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from librobot_vlm_ros.core import ModelAnswer
from librobot_vlm_ros.models import (
    AbstractVLM,
    VlmBackend,
    create_backend,
    create_vlm,
    get_vlm,
    model_info,
    register_vlm,
    registry,
)
from librobot_vlm_ros.models.catalog import CATALOG
from librobot_vlm_ros.models.local_backend import LocalBackend
from librobot_vlm_ros.models.processor import Processor
from librobot_vlm_ros.models.testing.conformance import hooks_of

NAMES = [info.name for info in CATALOG if "torch" in info.requires]


def ours(cls: type) -> list[str]:
    return [c.__name__ for c in cls.__mro__ if c.__module__.startswith("librobot_vlm_ros.")]


@pytest.mark.parametrize("name", NAMES)
def test_at_most_three_of_our_classes_stand_in_a_models_mro(name: str) -> None:
    assert 2 <= len(ours(get_vlm(name))) <= 3, ours(get_vlm(name))


def test_a_vlm_has_a_processor_a_generator_and_a_backend(load_family: Any) -> None:
    vlm = load_family()
    assert isinstance(vlm, AbstractVLM)
    assert isinstance(vlm.processor, Processor)
    assert len(ours(type(vlm.processor))) <= 3
    assert isinstance(vlm.backend, LocalBackend)
    assert isinstance(vlm.backend, VlmBackend)
    assert vlm.backend.vlm is vlm
    assert vlm.tokenizer is vlm.processor.tokenizer


def test_the_robots_side_of_a_model_is_its_backend(family: str, family_folder: Path) -> None:
    backend = create_backend(family, pretrained=str(family_folder), device="cpu")
    assert isinstance(backend, LocalBackend)
    assert backend.tasks == set(model_info(family).tasks)
    fake = create_backend("fake")
    assert isinstance(fake, VlmBackend)
    assert fake.name == "fake"


def test_another_size_of_a_family_is_one_row(
    family: str, family_folder: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_rows", dict(registry._rows))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    row = dataclasses.replace(model_info(family), name="mine-3b", aliases=(), parameters=1)
    register_vlm(info=row)(get_vlm(family))
    vlm = create_vlm("mine-3b", pretrained=str(family_folder), device="cpu", dtype="float32")
    assert (vlm.name, vlm.family) == ("mine-3b", model_info(family).family)
    (answer,) = vlm.run([ask("caption")])
    (same,) = create_vlm(family, pretrained=str(family_folder), device="cpu", dtype="float32").run(
        [ask("caption")]
    )
    assert isinstance(answer, ModelAnswer)
    assert (answer.text, answer.score) == (same.text, same.score)
    assert hooks_of(row) is not None
