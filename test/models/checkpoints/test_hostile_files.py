"""Weights that are damaged, or made to do harm: each is refused with a code, before it costs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models import load_module
from librobot_vlm_ros.models.checkpoints.shards import (
    iterate_tensors,
    read_json,
    tensor_kinds,
    weight_files,
)
from librobot_vlm_ros.models.families.paligemma import masks as paligemma_masks
from librobot_vlm_ros.models.families.paligemma.masks import read_mask_decoder
from librobot_vlm_ros.models.testing import florence2 as conformance_florence
from librobot_vlm_ros.models.testing import internvl2 as internvl
from librobot_vlm_ros.models.testing import llava

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 463221266\n"
GOOD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


def refused(read: Callable[[], Any]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read()
    return caught.value


def refused_weights(path: Path) -> ModelError:
    """The error for a file, which must be the same for its table and for its tensors."""
    error = refused(lambda: list(iterate_tensors(path)))
    assert refused(lambda: tensor_kinds(path)).code == error.code
    return error


def pickled(folder: Path, state: Any, **options: Any) -> Path:
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_plain_table_is_read(tmp_path: Path, zipped: bool) -> None:
    state = {**GOOD, "tied": GOOD["a"], "view": GOOD["a"].t(), "epoch": 3}
    path = pickled(tmp_path, state, _use_new_zipfile_serialization=zipped)
    found = dict(iterate_tensors(path))
    assert found.keys() == {"a", "b", "tied", "view"} == tensor_kinds(path).keys()
    assert all(torch.equal(found[key], state[key]) for key in found)


@pytest.mark.parametrize("key", [1, None, b"x", ("a",)])
def test_a_name_that_is_no_string(tmp_path: Path, key: Any) -> None:
    error = refused_weights(pickled(tmp_path, {**GOOD, key: torch.ones(1)}))
    assert error.code == ErrorCode.WEIGHTS_CORRUPT
    assert repr(key) in error.message


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.to_sparse(),
        lambda t: t.to_sparse_csr(),
        lambda t: torch.nested.nested_tensor([t]),
        lambda t: t[:1, :1].clone().expand(2**20, 2**20),
    ],
    ids=["sparse", "csr", "nested", "expanded"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_no_plain_one(tmp_path: Path, make: Callable[[Tensor], Tensor]) -> None:
    error = refused_weights(pickled(tmp_path, {**GOOD, "odd": make(GOOD["a"])}))
    assert error.code == ErrorCode.WEIGHTS_CORRUPT
    assert "odd" in error.message


def test_a_tensor_without_values(tmp_path: Path) -> None:
    path = pickled(tmp_path, {**GOOD, "odd": torch.empty(3, device="meta")})
    assert refused(lambda: list(iterate_tensors(path))).code == ErrorCode.WEIGHTS_CORRUPT


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_tensor(tmp_path: Path) -> None:
    odd = torch.quantize_per_tensor(GOOD["a"], 0.1, 0, torch.qint8)
    path = pickled(tmp_path, {**GOOD, "odd": odd})
    assert refused(lambda: list(iterate_tensors(path))).code == ErrorCode.DTYPE_UNSUPPORTED


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (LFS, "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n<html>", "web page"),
        (b"Entry not found", "'Entry not found'"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_a_failed_download_leaves_is_named(
    tmp_path: Path, name: str, content: bytes, looks: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = refused_weights(tmp_path / name)
    assert error.code == ErrorCode.WEIGHTS_CORRUPT
    assert looks in error.message


@pytest.mark.parametrize(
    "content",
    [b"", b"hello" * 100, b"\x80\x02" + b"(" * 20000, bytes(range(256)) * 4, b"PK\x03\x04 cut"],
)
def test_bytes_that_are_no_pickle_are_damage_and_not_code(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    assert refused_weights(path).code == ErrorCode.WEIGHTS_CORRUPT


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_code_is_still_called_unsafe(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], protocol: int
) -> None:
    path = tmp_path / "pytorch_model.bin"
    for size in (1, 5000):
        path.write_bytes(pickle.dumps([_Code(), "x" * size], protocol))
        assert refused_weights(path).code == ErrorCode.UNSAFE_CHECKPOINT
    assert "it ran" not in capfd.readouterr().out


def test_a_compressed_checkpoint_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pickled(tmp_path, GOOD)
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in old.infolist():
            data = old.read(entry) + bytes(1 << 20) * entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, data, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    error = refused_weights(packed)
    assert error.code == ErrorCode.WEIGHTS_CORRUPT
    assert "unpack" in error.message


def write_header(path: Path, header: str, data: bytes = bytes(64)) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)


ENTRY = '{"dtype":"F32","shape":[16],"data_offsets":[0,64]}'
EMPTY = '{"dtype":"F32","shape":[%s],"data_offsets":[64,64]}'


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{ENTRY},"a":{ENTRY}}}',
        f'{{"a":{ENTRY},"b":{EMPTY % f"{2**64 - 1},0"}}}',
        f'{{"a":{ENTRY},"b":{EMPTY % "null"}}}',
        f'{{"a":{ENTRY},"__metadata__":{"[" * 9999}{"]" * 9999}}}',
        f'{{"a":{ENTRY}',
        "[]",
    ],
    ids=["twice", "huge", "no number", "deep", "cut", "list"],
)
def test_a_header_of_no_use(tmp_path: Path, header: str) -> None:
    path = tmp_path / "model.safetensors"
    write_header(path, f'{{"a":{ENTRY}}}')
    assert [key for key, _ in iterate_tensors(path)] == ["a"]
    write_header(path, header)
    assert refused_weights(path).code == ErrorCode.WEIGHTS_CORRUPT


@pytest.mark.parametrize(
    ("index", "code"),
    [
        ("{", ErrorCode.WEIGHTS_CORRUPT),
        ("[]", ErrorCode.WEIGHTS_CORRUPT),
        ("{}", ErrorCode.WEIGHTS_CORRUPT),
        ("[" * 100_000, ErrorCode.WEIGHTS_CORRUPT),
        ('{"weight_map": {"a": null}}', ErrorCode.WEIGHTS_CORRUPT),
        ('{"weight_map": {"a": "../x"}}', ErrorCode.WEIGHTS_CORRUPT),
        (json.dumps({"weight_map": {"a": "x" * 5000}}), ErrorCode.WEIGHTS_NOT_FOUND),
        ('{"weight_map": {"a": "a\\u0000b"}}', ErrorCode.WEIGHTS_NOT_FOUND),
        ('{"weight_map": {"a": "\\ud800"}}', ErrorCode.WEIGHTS_NOT_FOUND),
    ],
)
def test_an_index_of_no_use(tmp_path: Path, index: str, code: ErrorCode) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert refused(lambda: weight_files(tmp_path)).code == code


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)])
def test_what_has_the_name_of_weights_and_is_no_file(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "model.safetensors")
    assert refused(lambda: weight_files(tmp_path)).code == ErrorCode.WEIGHTS_NOT_FOUND


@pytest.mark.parametrize("depth", [70, 900, 100_000])
def test_json_that_is_nested_deeper_than_any_real_file(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a":' + "[" * depth + "]" * depth + "}")
    assert refused(lambda: read_json(path)).code == ErrorCode.BAD_CONFIG
    path.write_text('{"a":' + "[" * 30 + "]" * 30 + "}")
    assert read_json(path).keys() == {"a"}


@pytest.mark.parametrize(
    ("write", "key"),
    [
        (conformance_florence.write_official, "language_model.model.shared.weight"),
        (conformance_florence.write_official, "image_projection"),
        (llava.write_official, "lm_head.weight"),
        (internvl.write_official, "vision_model.encoder.layers.0.attn.qkv.weight"),
        (internvl.write_official, "language_model.model.layers.0.attention.wqkv.weight"),
    ],
    ids=["florence words", "florence projection", "llava words", "internvl tower", "internvl"],
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 2, 2)])
def test_a_tensor_of_another_rank(
    tmp_path: Path, write: Callable[[Path], Any], key: str, shape: tuple[int, ...]
) -> None:
    folder = tmp_path / "model"
    write(folder)
    for path in weight_files(folder):
        weights = dict(iterate_tensors(path))
        if key in weights:
            weights[key] = torch.zeros(shape)
            torch.save(weights, path) if path.suffix == ".bin" else save_file(weights, path)
    error = refused(lambda: load_module(folder, "float32", "cpu"))
    assert error.code == ErrorCode.SHAPE_MISMATCH
    assert key in error.message


class TestADecoderOfMasks:
    def test_what_it_does_not_need_is_not_unpacked(self, tmp_path: Path) -> None:
        places = dict(paligemma_masks.MaskDecoder().named_parameters())
        state = {name: np.zeros(place.shape, np.float32) for name, place in places.items()}
        np.savez_compressed(
            tmp_path / "vae-oid.npz", **state, encoder=np.array([object()], dtype=object)
        )
        read_mask_decoder(tmp_path / "vae-oid.npz")

    @pytest.mark.parametrize("content", [LFS, bytes(range(1, 256)), b"<html>"])
    def test_bytes_of_something_else_are_damage_and_not_code(
        self, tmp_path: Path, content: bytes
    ) -> None:
        (tmp_path / "vae-oid.npz").write_bytes(content)
        error = refused(lambda: read_mask_decoder(tmp_path / "vae-oid.npz"))
        assert error.code == ErrorCode.WEIGHTS_CORRUPT

    def test_an_array_that_unpacks_to_more_than_a_decoder_has(self, tmp_path: Path) -> None:
        path = tmp_path / "vae-oid.npz"
        np.savez_compressed(path, **{"decoder.0.weight": np.zeros(5 << 20, np.float32)})
        error = refused(lambda: read_mask_decoder(path))
        assert error.code == ErrorCode.WEIGHTS_CORRUPT
        assert "decoder.0.weight would unpack to" in error.message

    def test_a_header_that_claims_more_than_there_is(self, tmp_path: Path) -> None:
        stated = "{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000000,), }"
        np.lib.format.write_array(buffer := io.BytesIO(), np.zeros(1))
        header = buffer.getvalue()[:8] + struct.pack("<H", 118) + f"{stated:<117}\n".encode()
        with zipfile.ZipFile(tmp_path / "vae-oid.npz", "w") as archive:
            archive.writestr("decoder.0.weight.npy", header)
        error = refused(lambda: read_mask_decoder(tmp_path / "vae-oid.npz"))
        assert error.code == ErrorCode.WEIGHTS_CORRUPT
