"""Weights come from where the operator allows: ids of the hub, and folders that he names."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from librobot_vlm_ros.core import BagError, ErrorCode, VlmError
from librobot_vlm_ros.models.checkpoints.hub import hub_cache, shipped_folder
from librobot_vlm_ros.models.checkpoints.path_policy import (
    allowed_folders,
    confined,
    open_to_clients,
)


def refused(weights: str, *folders: Path) -> bool:
    try:
        confined(weights, [folder.resolve() for folder in folders])
    except BagError as error:
        return error.code == ErrorCode.PATH_NOT_ALLOWED
    return False


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of models with `mine` in it, and `secret` beside it."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    return tmp_path / "models"


def test_folders_below_an_allowed_one_and_ids_of_the_hub_pass(models: Path) -> None:
    assert confined(str(models / "mine"), [models]) == str(models / "mine")
    assert confined(str(models), [models]) == str(models)
    assert confined("owner/name@main", [models]) == "owner/name@main"
    assert confined("", []) == ""


def test_everything_else_is_refused_be_it_there_or_not(models: Path) -> None:
    for weights in (
        str(models.parent / "secret"),
        str(models / ".." / "secret"),
        str(models / "mine" / ".." / ".." / "secret"),
        f"{models}-2/mine",
        "/etc",
        "/no/such/folder",
        "~root",
        "~nobody-at-all/x",
        "..",
        "a\0b",
        "x" * 5000,
    ):
        assert refused(weights, models), weights


def test_symlinks_are_followed(models: Path) -> None:
    (models / "out").symlink_to(models.parent / "secret")
    assert refused(str(models / "out"), models)
    (models.parent / "entrance").symlink_to(models)
    resolved = confined(str(models.parent / "entrance" / "mine"), [models])
    assert resolved == str(models / "mine")  # what is loaded is what was checked


def test_a_folder_that_looks_like_an_id_is_a_folder(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models.parent)
    assert refused("models/mine")
    assert confined("models/mine", [models]) == str(models / "mine")


def test_without_a_list_clients_reach_siblings_shipped_weights_and_the_cache(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (models / "other").mkdir()
    open_folders = open_to_clients((), str(models / "mine"))
    assert not refused(str(models / "other"), *open_folders)
    assert not refused(str(shipped_folder() / "florence_2_tabletop"), *open_folders)
    assert not refused(str(hub_cache() / "models--a--b" / "snapshots" / "c"), *open_folders)
    assert refused(str(tmp_path / "secret"), *open_folders)
    assert refused(str(models / "mine"), *open_to_clients((), ""))
    assert refused(str(models / "mine"), *open_to_clients((), "owner/name"))


def test_weights_right_below_the_root_open_nothing_beside_them() -> None:
    assert refused("/etc", *open_to_clients((), "/usr"))


def test_a_folder_that_is_not_absolute_is_no_bound() -> None:
    for text in ("models", ".", "~nobody-at-all"):
        with pytest.raises(VlmError) as caught:
            allowed_folders([text])
        assert caught.value.code == ErrorCode.BAD_PARAMETER
