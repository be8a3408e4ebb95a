"""The sha256 of weights: defined simply, and checked before anything is read from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from librobot_vlm_ros.core import ErrorCode, ModelError, RequestError
from librobot_vlm_ros.models import create_vlm, sha256_list
from librobot_vlm_ros.models.checkpoints import loading as checkpoint
from librobot_vlm_ros.models.checkpoints.checksum import weights_sha256


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_one_file_has_the_digest_that_sha256sum_gives(tiny_folder: Path) -> None:
    data = (tiny_folder / "model.safetensors").read_bytes()
    assert weights_sha256(tiny_folder) == sha256(data)


def test_shards_have_the_digest_of_their_names_and_digests(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "not-named.safetensors").write_bytes(b"three")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    lines = f"a.safetensors:{sha256(b'one')}\nb.safetensors:{sha256(b'two')}\n"
    assert weights_sha256(tmp_path) == sha256(lines.encode())


def test_a_tower_in_the_folder_counts_too(tmp_path: Path) -> None:
    (tmp_path / "vision_tower").mkdir()
    (tmp_path / "config.json").write_text('{"mm_projector_type": "mlp2x_gelu"}')
    save_file({"words": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "vision_tower" / "model.safetensors").write_bytes(b"eyes")
    before = weights_sha256(tmp_path)
    (tmp_path / "vision_tower" / "model.safetensors").write_bytes(b"other eyes")
    assert weights_sha256(tmp_path) != before


@pytest.mark.parametrize("name", ["vae-oid.npz", "mask_decoder.safetensors"])
def test_a_decoder_of_masks_in_the_folder_counts_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    (tmp_path / "model.safetensors").write_bytes(b"words")
    alone = weights_sha256(tmp_path)
    (tmp_path / name).write_bytes(b"masks")
    before = weights_sha256(tmp_path)
    (tmp_path / name).write_bytes(b"other masks")
    assert len({alone, before, weights_sha256(tmp_path)}) == 3


def test_weights_of_that_digest_are_loaded(tiny_folder: Path) -> None:
    right = weights_sha256(tiny_folder).upper()
    vlm = create_vlm(
        "florence-2-base",
        pretrained=str(tiny_folder),
        device="cpu",
        weights_sha256=["0" * 64, right],
    )
    assert vlm.module is not None


def test_other_weights_are_refused_before_anything_is_read_from_them(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = weights_sha256(tiny_folder)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    monkeypatch.setattr(checkpoint, "iterate_tensors", lambda path: pytest.fail("was read"))
    with pytest.raises(ModelError) as caught:
        create_vlm("florence-2-base", pretrained=str(copy), device="cpu", weights_sha256=right)
    assert caught.value.code == ErrorCode.CHECKSUM_MISMATCH
    assert right in caught.value.message
    assert weights_sha256(copy) in caught.value.message


def test_hashing_ends_when_loading_is_cancelled(tiny_folder: Path) -> None:
    with pytest.raises(ModelError) as caught:
        weights_sha256(tiny_folder, lambda: True)
    assert caught.value.code == ErrorCode.LOAD_CANCELLED


def test_no_weights_no_digest(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        weights_sha256(tmp_path)
    assert caught.value.code == ErrorCode.WEIGHTS_NOT_FOUND


@pytest.mark.parametrize("wrong", ["abc", "g" * 64, ["0" * 64, "0" * 63]])
def test_what_is_no_digest_is_refused(wrong: str | list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        create_vlm("florence-2-tabletop", weights_sha256=wrong)
    assert caught.value.code == ErrorCode.BAD_PARAMETER


def test_blank_entries_mean_nothing() -> None:
    assert sha256_list("") == sha256_list([""]) == sha256_list(()) == ()
