"""Reading a checkpoint folder tensor by tensor, without holding more than one at a time.

safetensors files are preferred; a pickle checkpoint is loaded with weights-only unpickling, which
runs no code from the file, or refused. An index file decides which shards there are.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError, as_vlm_error
from librobot_vlm_ros.models.checkpoints.file_checks import (
    check_pickle,
    check_safetensors,
    check_tensors,
    corrupt,
)
from librobot_vlm_ros.models.checkpoints.size_limits import refuse_endless

__all__ = [
    "iterate_tensors",
    "read_config",
    "read_json",
    "tensor_kinds",
    "tensor_names",
    "weight_files",
]

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
#: Bytes of a file that are mapped at a time, at least; else a share of the file.
_MAPPED_BYTES = 8 << 20
_MAPPED_SHARE = 1 / 32
_PICKLES = (".bin", ".pt", ".pth")
#: Levels of a JSON file, and characters of a foreign name in an error.
_MOST_LEVELS, _SHOWN = 64, 100
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_json(path: Path, code: ErrorCode = ErrorCode.BAD_CONFIG) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError of that code when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ModelError(code, f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(code, f"{path.name} holds no JSON object")
    if not _is_shallow(content):
        raise ModelError(code, f"{path.name} is nested more than {_MOST_LEVELS} levels deep")
    return content


def _is_shallow(content: Any) -> bool:
    """What is nested deeper than any real file would break whoever copies or prints it."""
    level = [content]
    for _ in range(_MOST_LEVELS):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return not level


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises ModelError WEIGHTS_NOT_FOUND when folder or file is missing, BAD_CONFIG when unreadable
    or asking for more than any model has (see `proportions.refuse_endless`).
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            ErrorCode.WEIGHTS_NOT_FOUND,
            f"{folder} holds no config.json" if folder.is_dir() else f"there is no folder {folder}",
            "a checkpoint folder holds config.json and *.safetensors",
        )
    config = read_json(path)
    refuse_endless(config)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, safetensors if there are any.

    Raises ModelError WEIGHTS_NOT_FOUND, or WEIGHTS_CORRUPT for an index that names no files of
    this folder.
    """
    for index, single in zip(_INDEXES, _SINGLES, strict=True):
        if (folder / index).is_file():
            return [folder / name for name in _names_in_index(folder / index)]
        if (folder / single).is_file():
            return [folder / single]
    others = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if others:
        return others
    raise ModelError(
        ErrorCode.WEIGHTS_NOT_FOUND,
        f"{folder} holds no weights",
        "expected model.safetensors, a model.safetensors.index.json, or pytorch_model.bin",
    )


def iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of one file with its key, on the CPU; of a safetensors file the largest first.

    So what is mapped beside what has been copied is small when most has been copied.

    Raises ModelError WEIGHTS_CORRUPT or UNSAFE_CHECKPOINT.
    """
    if path.suffix in _PICKLES:
        yield from _iterate_pickle(path)
        return
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = sorted(file.keys(), key=lambda key: -math.prod(file.get_slice(key).get_shape()))
        at_once = max(_MAPPED_BYTES, int(path.stat().st_size * _MAPPED_SHARE))
        while keys:
            # What was read stays mapped, and counts as our memory, until the file is closed.
            left = at_once
            with safe_open(path, framework="pt", device="cpu") as file:
                while keys and left > 0:
                    tensor = file.get_tensor(keys[0])
                    left -= tensor.nbytes
                    yield keys.pop(0), tensor
                    del tensor
    except SafetensorError as error:
        raise _cut_off(path, error) from error


def tensor_kinds(path: Path) -> dict[str, tuple[str, int]]:
    """Each tensor of one file by its key: (dtype such as "float16", number of values).

    Only the file's table is read. Raises ModelError WEIGHTS_CORRUPT or UNSAFE_CHECKPOINT.
    """
    if path.suffix in _PICKLES:
        tensors = _read_pickle(path, "meta")
        return {key: (_name(value.dtype), value.numel()) for key, value in tensors.items()}
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  no mapping
            return {
                key: (_SAFETENSORS.get(part.get_dtype(), "other"), math.prod(part.get_shape()))
                for key, part in slices.items()
            }
    except SafetensorError as error:
        raise _cut_off(path, error) from error


def tensor_names(folder: Path) -> list[str]:
    """Keys of all tensors of a checkpoint folder; of a folder with an index that alone is read.

    Raises ModelError as `weight_files` and `tensor_kinds` do.
    """
    files = weight_files(folder)
    for index, single in zip(_INDEXES, _SINGLES, strict=True):
        if (folder / index).is_file():
            return list(_weight_map(folder / index))
        if (folder / single).is_file():
            break
    return [key for path in files for key in tensor_kinds(path)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cut_off(path: Path, error: Exception) -> ModelError:
    return corrupt(path, f"is not a whole safetensors file: {error}")


def _weight_map(index: Path) -> dict[str, str]:
    shards = read_json(index, ErrorCode.WEIGHTS_CORRUPT).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise corrupt(index, "holds no weight_map")
    for name in shards.values():
        # A shard lies beside its index; anything else would read files that nobody named.
        if not isinstance(name, str) or Path(name).name != name:
            raise corrupt(index, f"names a file elsewhere: {str(name)[:_SHOWN]!r}")
    return shards


def _names_in_index(index: Path) -> list[str]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        # Not Path.is_file: that raises for names too long for any file.
        if not os.path.isfile(index.parent / name):
            raise ModelError(
                ErrorCode.WEIGHTS_NOT_FOUND,
                f"{index.name} names {name[:_SHOWN]}, which is not there",
                "the download is not complete: run it again",
            )
    return names


def _iterate_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    state = _read_pickle(path, "cpu")
    for key in list(state):
        yield key, state.pop(key)


def _read_pickle(path: Path, device: str) -> dict[str, Tensor]:
    """Every tensor by its name, on "cpu" or, without values, on "meta"."""
    check_pickle(path)
    try:
        with warnings.catch_warnings():  # it warns of odd pickles, and then refuses them
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            ErrorCode.UNSAFE_CHECKPOINT,
            f"{path.name} is no plain table of weights; it was not unpickled, nothing of it ran",
            "use a safetensors checkpoint",
        ) from error
    except Exception as error:  # on damaged bytes the unpickler raises whatever it stumbles over
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the disk or its permissions; EINVAL is how a cut zip file shows itself
        if as_vlm_error(error).code == ErrorCode.OUT_OF_MEMORY:
            raise
        raise corrupt(path, f"is not a whole checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise corrupt(path, "holds no table of tensors")
    return check_tensors(path, state, device)
