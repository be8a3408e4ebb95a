"""Fixtures for models: tiny checkpoints in place of gigabytes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from librobot_vlm_ros.core import Frame, InferenceRequest
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.tiny import tiny_florence_folder

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
