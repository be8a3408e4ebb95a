"""Weights are found where they are, and looking for them leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from librobot_vlm_ros.models import list_vlms, model_info
from librobot_vlm_ros.models.checkpoints import hub
from librobot_vlm_ros.models.checkpoints.hub import downloaded, shipped_folder, weights_present


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def snapshot(cache: Path, commit: str, *names: str, repo: str = "a/b") -> Path:
    folder = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in ("config.json", *names):
        (folder / name).write_bytes(b"x")
    return folder


def test_a_snapshot_with_weights_is_found_by_commit_branch_and_without_either(cache: Path) -> None:
    assert downloaded("a/b") is None
    snapshot(cache, "1" * 40)
    old = snapshot(cache, "2" * 40, "pytorch_model.bin")
    new = snapshot(cache, "3" * 40, "model.safetensors")
    assert downloaded("a/b") is None  # no branch was downloaded
    assert downloaded("a/b", "3" * 40) == new
    assert downloaded("a/b", "2" * 40) == old
    assert downloaded("a/b", "1" * 40) is None
    refs = cache / "models--a--b" / "refs"
    refs.mkdir()
    (refs / "main").write_text("2" * 40)
    assert downloaded("a/b", "main") == downloaded("a/b") == old
    assert downloaded("a/b", "other") is None
    assert downloaded("a--b/c") is None  # no id that a repository can have


def test_shards_are_here_when_all_are_that_the_index_names(cache: Path) -> None:
    folder = snapshot(cache, "1" * 40, "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.bin"}}))
    assert downloaded("a/b", "1" * 40) is None
    (folder / "model-2.bin").write_bytes(b"x")
    assert downloaded("a/b", "1" * 40) == folder
    for broken in ("{", "[]", "{}", '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(broken)
        assert downloaded("a/b", "1" * 40) is None


def test_the_cache_is_where_the_hubs_client_has_it(tmp_path: Path) -> None:
    script = "from librobot_vlm_ros.models.checkpoints.hub import hub_cache; print(hub_cache())"
    for given, expected in (
        ({"HF_HOME": "/hf"}, "/hf/hub"),
        ({"HF_HUB_CACHE": "~/hub"}, f"{tmp_path}/hub"),
        ({}, f"{tmp_path}/.cache/huggingface/hub"),
    ):
        own = {key: value for key, value in os.environ.items() if not key.startswith(("HF", "XDG"))}
        environment = {**own, "HOME": str(tmp_path), **given}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected, done.stderr


def test_what_ships_with_the_package_is_here() -> None:
    assert weights_present(model_info("florence-2-tabletop"))
    assert (shipped_folder() / "florence_2_tabletop").is_dir()


def test_asking_again_leaves_no_interned_strings(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interned: list[str] = []
    infos = [model_info(name) for name in list_vlms()]
    published = model_info("florence-2-base")
    commit, repo = str(published.pinned_revision), str(published.default_pretrained)
    snapshot(cache, commit, "model.safetensors", repo=repo)

    def counted(text: str) -> str:
        interned.append(text)
        return text

    assert weights_present(published)
    monkeypatch.setattr(sys, "intern", counted)
    for info in infos:
        weights_present(info)
    assert set(interned) <= {hub._CONFIG}  # which stays: it is not interned anew
    assert Path("/not/said/before").parts
    assert "before" in interned  # it would have been noticed
