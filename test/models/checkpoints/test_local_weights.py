"""Weights are found where they are, and looking for them leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from librobot_vlm_ros.models import list_vlms, model_info
from librobot_vlm_ros.models.checkpoints.local_weights import (
    downloaded,
    hub_cache,
    shipped_folder,
    weights_present,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def snapshot(cache: Path, commit: str, *names: str) -> Path:
    folder = cache / "models--a--b" / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_a_snapshot_with_weights_is_found_by_commit_branch_and_without_either(cache: Path) -> None:
    assert downloaded("a/b") is None
    snapshot(cache, "1" * 40, "config.json")
    old = snapshot(cache, "2" * 40, "pytorch_model.bin")
    assert downloaded("a/b") == old
    new = snapshot(cache, "3" * 40, "model.safetensors")
    assert downloaded("a/b") == new  # rather than a pickle
    assert downloaded("a/b", "2" * 40) == old
    assert downloaded("a/b", "1" * 40) is None
    refs = cache / "models--a--b" / "refs"
    refs.mkdir()
    (refs / "main").write_text("2" * 40 + "\n")
    assert downloaded("a/b", "main") == old
    assert downloaded("a/b", "other") is None


def test_the_cache_is_where_the_hubs_client_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/r")
    assert hub_cache() == Path("/home/r/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/c")
    assert hub_cache() == Path("/home/r/c/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert hub_cache() == Path("/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "~/hub")
    assert hub_cache() == Path("/home/r/hub")


def test_what_ships_with_the_package_is_here() -> None:
    assert weights_present(model_info("florence-2-tabletop"))
    assert (shipped_folder() / "florence_2_tabletop").is_dir()


def test_asking_again_interns_no_strings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interned: list[str] = []
    infos = [model_info(name) for name in list_vlms()]

    def counted(text: str) -> str:
        interned.append(text)
        return text

    monkeypatch.setattr(sys, "intern", counted)
    for info in infos:
        weights_present(info)
    assert interned == []
    assert Path("/not/said/before").parts
    assert interned  # it would have been noticed
