"""Fixtures for models: tiny checkpoints in place of gigabytes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from librobot_vlm_ros.core import Frame, InferenceRequest
from librobot_vlm_ros.models import AbstractVLM, create_vlm, model_info
from librobot_vlm_ros.models.catalog import CATALOG
from librobot_vlm_ros.models.testing.conformance import hooks_of
from librobot_vlm_ros.models.testing.florence2 import tiny_florence_folder

transformers_logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Florence-2 folder; tests read it and never write to it."""
    return tiny_florence_folder(tmp_path_factory.mktemp("florence") / "tiny")


@pytest.fixture
def vlm(tiny_folder: Path):
    """The tiny folder loaded as base, which can do every task; greedy, so that tests are quick."""
    return create_vlm("florence-2-base", pretrained=str(tiny_folder), device="cpu")


@pytest.fixture
def make_frame() -> Callable[..., Frame]:
    """A frame of noise by its seed."""

    def make(seed: int = 1, height: int = 48, width: int = 80) -> Frame:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Frame(pixels, camera="test", stamp_ns=seed, sequence=seed)

    return make


@pytest.fixture
def frame(make_frame: Callable[..., Frame]) -> Frame:
    return make_frame()


@pytest.fixture
def ask(frame: Frame) -> Callable[..., InferenceRequest]:
    def make(task: str, *, on: Frame | None = None, name: str = "r", **fields) -> InferenceRequest:
        return InferenceRequest(name, on or frame, task, **fields)

    return make


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.getLogger("librobot_vlm_ros").setLevel(logging.INFO)


#: One model of each family that is loaded from official checkpoints, by the family.
FAMILIES = {info.family: info.name for info in reversed(CATALOG) if info.default_pretrained}


@pytest.fixture(scope="session", params=sorted(FAMILIES.values()))
def family(request: pytest.FixtureRequest) -> str:
    """The name of a model; a test that takes it runs once for every family there is."""
    return request.param


@pytest.fixture(scope="session")
def family_folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the family in its official layout; tests never write to it."""
    folder = tmp_path_factory.mktemp("official") / family
    hooks_of(model_info(family)).write_official(folder)
    return folder


@pytest.fixture
def load_family(family: str, family_folder: Path) -> Callable[..., AbstractVLM]:
    """`load_family(**options)`: the tiny checkpoint as a model on the CPU in float32."""

    def load(**options: Any) -> AbstractVLM:
        return create_vlm(
            family, pretrained=str(family_folder), device="cpu", dtype="float32", **options
        )

    return load


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two images with six tokens each, the last three to be learnt."""
    random = torch.Generator().manual_seed(3)
    input_ids = torch.randint(20, 60, (2, 6), generator=random)
    labels = input_ids.clone()
    labels[:, :3] = -100
    images = torch.randint(0, 256, (2, 3, 48, 64), generator=random, dtype=torch.uint8)
    return {"images": images, "input_ids": input_ids, "labels": labels}
