"""Where weights come from, and what is said when they are not to be had."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from librobot_vlm_ros.core import ErrorCode, ModelError, as_vlm_error
from librobot_vlm_ros.models import create_vlm, model_info
from librobot_vlm_ros.models.checkpoints import hub as weights_module
from librobot_vlm_ros.models.checkpoints.hub import find_weights, folder_digest

BASE = model_info("florence-2-base")
TABLETOP = model_info("florence-2-tabletop")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def put_in_cache(cache: Path, source: Path, commit: str, branch: str = "main") -> Path:
    """Lay `source` out as a download of microsoft/Florence-2-base at `commit`."""
    repo = cache / "models--microsoft--Florence-2-base"
    snapshot = repo / "snapshots" / commit
    shutil.copytree(source, snapshot)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / branch).write_text(commit)
    return snapshot


def test_offline_without_weights_names_the_three_ways_to_get_them() -> None:
    with pytest.raises(ModelError) as caught:
        create_vlm("florence-2-base")
    error = caught.value
    assert error.code == ErrorCode.WEIGHTS_NOT_FOUND
    assert "hf download microsoft/Florence-2-base --revision " + BASE.pinned_revision in error.hint
    assert "weights:=/path/to/folder" in error.hint
    assert "model:=florence-2-tabletop" in error.hint


def test_the_pinned_revision_is_what_is_loaded(cache: Path, tiny_folder: Path) -> None:
    snapshot = put_in_cache(cache, tiny_folder, BASE.pinned_revision)
    found = find_weights(BASE, None)
    assert found.folder.resolve() == snapshot.resolve()
    assert found.revision == BASE.pinned_revision
    assert find_weights(BASE, "microsoft/Florence-2-base") == found


def test_half_a_download_is_not_taken_for_the_model(cache: Path, tiny_folder: Path) -> None:
    snapshot = put_in_cache(cache, tiny_folder, BASE.pinned_revision)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        find_weights(BASE, None)
    assert caught.value.code == ErrorCode.WEIGHTS_NOT_FOUND


def test_without_a_network_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(weights_module, "_download", lambda *given: pytest.fail("was tried"))
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        create_vlm("florence-2-base")
    assert caught.value.code == ErrorCode.WEIGHTS_NOT_FOUND


@pytest.mark.parametrize("trouble", [ConnectionError("no route"), RuntimeError("client closed")])
def test_a_download_that_fails_names_the_ways_too(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    def fail(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("none") if options.get("local_files_only") else trouble

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights_module, "_reach", lambda endpoint: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        create_vlm("florence-2-base")
    assert caught.value.code == ErrorCode.WEIGHTS_NOT_FOUND
    assert "weights:=" in caught.value.hint


def test_a_full_disk_while_downloading_keeps_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("none")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights_module, "_reach", lambda endpoint: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space") as caught:
        find_weights(BASE, None)
    error = as_vlm_error(caught.value)
    assert error.code == ErrorCode.DISK_FULL
    assert constants.HF_HUB_CACHE in error.message


def test_a_model_published_as_a_pickle_only_is_downloaded_as_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def fetch(hub_id: str, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights_module, "_reach", lambda endpoint: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_weights(BASE, "owner/name@main").folder == tmp_path
    assert ["*.bin" in patterns for patterns in asked] == [False, True]
    assert not any("*.py" in patterns for patterns in asked)


def test_another_revision_is_had_by_asking_for_it(cache: Path, tiny_folder: Path) -> None:
    put_in_cache(cache, tiny_folder, "b" * 40, branch="trial")
    assert find_weights(BASE, "microsoft/Florence-2-base@trial").revision == "b" * 40
    assert find_weights(BASE, None, revision="b" * 40).revision == "b" * 40
    with pytest.raises(ModelError):  # the pinned one is not there, and no other takes its place
        find_weights(BASE, None)


def test_a_folder_is_taken_as_it_is(tiny_folder: Path) -> None:
    found = find_weights(BASE, str(tiny_folder))
    assert (found.folder, found.revision) == (tiny_folder, folder_digest(tiny_folder))


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "nonsense", "a/b/c", "a b/c"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_weights(BASE, source)
    assert caught.value.code == ErrorCode.WEIGHTS_NOT_FOUND


def test_the_shipped_model_needs_no_network(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "_SHIPPED", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        find_weights(TABLETOP, None)
    assert caught.value.code == ErrorCode.WEIGHTS_NOT_FOUND
    shutil.copytree(tiny_folder, tmp_path / "florence_2_tabletop")
    vlm = create_vlm("florence-2-tabletop")
    assert vlm.revision == folder_digest(tiny_folder)


def test_the_shipped_model_is_what_its_row_says() -> None:
    vlm = create_vlm("florence-2-tabletop", device="cpu")
    assert vlm.get_num_parameters() == TABLETOP.parameters
    assert vlm.get_embedding_dim() == TABLETOP.embedding_dim
    assert vlm.processor.settings.num_beams == 1
    assert vlm.processor.settings.no_repeat_ngram_size == 0  # location tokens repeat
    assert vlm.processor.image_tokens == 1 + 12 * 12


def test_the_digest_tells_weights_apart(tiny_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    assert folder_digest(copy) == folder_digest(tiny_folder)
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert folder_digest(copy) != folder_digest(tiny_folder)


def test_the_specifications_example_runs_as_written(cache: Path, tiny_folder: Path) -> None:
    put_in_cache(cache, tiny_folder, BASE.pinned_revision)
    import torch

    images = torch.randn(2, 3, 64, 64)
    prompts = torch.randint(4, 40, (2, 5))

    # From here on as in the specification, with this package's import path.
    from librobot_vlm_ros.models import create_vlm

    # Create model
    model = create_vlm("florence-2-base", pretrained="microsoft/Florence-2-base")

    # Task-specific generation
    outputs = model.generate(
        images=images,
        input_ids=prompts,
        task="caption",  # or 'ocr', 'detection', etc.
        max_new_tokens=100,
    )
    assert outputs.shape[0] == 2
    assert outputs.dtype == torch.int64


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_weights_that_are_no_files_are_not_found_and_not_waited_for(
    tiny_folder: Path, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    weights.unlink()
    if kind == "pipe":
        os.mkfifo(weights)
    elif kind == "folder":
        weights.mkdir()
    else:
        weights.symlink_to(weights)
    assert len(folder_digest(folder)) == 16
    with pytest.raises(ModelError) as caught:
        create_vlm("florence-2-base", pretrained=str(folder), device="cpu")
    assert caught.value.code == ErrorCode.WEIGHTS_NOT_FOUND
