"""A configuration that nobody can build is refused before anything is built of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from librobot_vlm_ros.core import ErrorCode, ModelError, VlmError
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.checkpoints import loading
from librobot_vlm_ros.models.checkpoints.loading import refuse_oversized
from librobot_vlm_ros.models.checkpoints.shards import read_config, refuse_endless
from librobot_vlm_ros.models.placement import resolve_placement

MANY = 10**9


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": MANY},
        {"text_config": {"num_hidden_layers": MANY}},
        {"text_config": {"encoder_layers": MANY}},
        {"llm_config": {"num_hidden_layers": MANY}},
        {"vision_config": {"depth": MANY}},
        {"vision_config": {"depths": [1, 1, MANY, 1]}},
        {"vision_config": {"depths": [0] * 2000}},
    ],
)
def test_more_layers_than_any_model_has_are_refused_where_they_are_read(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"layers as .*, expected at most 1000") as caught:
        read_config(tmp_path)
    assert caught.value.code == ErrorCode.BAD_CONFIG


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 80, "vision_config": {"depth": 45, "hidden_size": 3200}},
        {"vision_config": {"depths": [1, 1, 9, 1]}, "vocab_size": 257216},
        {"num_hidden_layers": "many", "depth": None, "layers": {"a": 1}},  # others refuse those
    ],
)
def test_published_numbers_pass(config):
    refuse_endless(config)


@pytest.mark.parametrize("family", ["qwen2-vl-2b", "florence-2-base"])
def test_a_config_of_a_user_is_held_to_the_same(family):
    key = "encoder_layers" if family.startswith("florence") else "num_hidden_layers"
    with pytest.raises(VlmError) as caught:
        create_vlm(family, config={"text_config": {key: MANY}})
    assert caught.value.code == ErrorCode.BAD_CONFIG


def test_a_model_that_no_memory_of_the_machine_could_hold_is_refused(monkeypatch):
    with torch.device("meta"):
        shape = nn.Linear(2**20, 2**20)  # 4.4 TB
    with pytest.raises(VlmError, match=r"takes 4398\.\d GB as cpu, float32") as caught:
        refuse_oversized(shape, resolve_placement("cpu", "float32"))
    assert caught.value.code == ErrorCode.OUT_OF_MEMORY
    monkeypatch.setattr(loading, "_memory_bytes", lambda device: 2**40 * 2 + 2**21)
    with torch.device("meta"):
        refuse_oversized(nn.Linear(2**20, 2**20), resolve_placement("cpu", "bfloat16"))  # just fits


def test_buffers_count_too(monkeypatch):
    shape = nn.Module()
    shape.register_buffer("positions", torch.empty(10**13, dtype=torch.int64, device="meta"))
    with pytest.raises(VlmError) as caught:
        refuse_oversized(shape, resolve_placement("cpu", "float32"))
    assert caught.value.code == ErrorCode.OUT_OF_MEMORY


def test_the_memory_of_this_machine_is_known():
    assert 2**28 < loading._memory_bytes(torch.device("cpu")) < 2**50
