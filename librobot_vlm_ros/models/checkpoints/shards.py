"""Reading the files of a checkpoint folder, which others wrote, tensor by tensor.

No more than one tensor is held at a time. safetensors files are preferred; a pickle checkpoint is
loaded with weights-only unpickling, which runs no code from the file, or refused. An index file
decides which shards there are. What a file is, and what it claims of its own sizes, is looked at
before a library is given the file: a download that failed leaves something else under the file's
name, and a few kilobytes must not become gigabytes of memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError, as_vlm_error
from librobot_vlm_ros.models.configuration import bad_config
from librobot_vlm_ros.models.placement import dtype_name

#: Of layers; the largest published models have about a hundred.
_MOST_LAYERS = 1000
_COUNT_OF_LAYERS = re.compile(r"(?:^|_)(?:layers|depths?|blocks)$")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
#: Bytes of a file that are mapped at a time, at least; else a share of the file.
_MAPPED_BYTES = 8 << 20
_MAPPED_SHARE = 1 / 32
_PICKLES = (".bin", ".pt", ".pth")
#: Levels of a JSON file, and characters of a foreign name in an error.
_MOST_LEVELS, _SHOWN = 64, 100
_AGAIN = "download or copy it again"
_LFS = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
_HEAD_BYTES = 1 << 20
#: Operations of a pickle that tell it from bytes that happen to begin like one.
_OPERATIONS = 16
#: A hundred thousand tensors need less.
_HEADER_BYTES = 32 << 20
#: Sizes are 64-bit integers in torch.
_LARGEST = 2**63 - 1
#: Names of the kinds of numbers in a safetensors file.
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
    or asking for more than any model has (see `refuse_endless`).
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


def refuse_endless(config: Mapping[str, Any], source: str = "config.json") -> None:
    """Raises ModelError BAD_CONFIG for more layers than any model has, wherever they stand.

    A model of a billion layers would be built until memory ends, and nobody could stop it.
    """
    found: list[tuple[str, Any]] = list(config.items())
    while found:
        name, value = found.pop()
        if isinstance(value, Mapping):
            found += value.items()
        elif _COUNT_OF_LAYERS.search(str(name)):
            numbers = value if isinstance(value, (list, tuple)) else [value]
            count = sum(number for number in numbers if isinstance(number, int))
            if max(count, len(numbers)) > _MOST_LAYERS:
                raise bad_config(
                    f"{source} asks for {count} layers as {name}, expected at most {_MOST_LAYERS}",
                    "use the file that came with the weights",
                )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, safetensors if there are any.

    Raises ModelError WEIGHTS_NOT_FOUND, or WEIGHTS_CORRUPT for an index that names no files of
    this folder.
    """
    if (index := _index(folder)) is not None:
        return [folder / name for name in _names_in_index(index)]
    for single in _SINGLES:
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
        state = _read_pickle(path, "cpu")
        for key in list(state):
            yield key, state.pop(key)
        return
    _check_safetensors(path)
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
        return {key: (dtype_name(value.dtype), value.numel()) for key, value in tensors.items()}
    _check_safetensors(path)
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
    if (index := _index(folder)) is not None:
        return list(_weight_map(index))
    return [key for path in files for key in tensor_kinds(path)]


def _index(folder: Path) -> Path | None:
    """The index of the folder's shards; None where there is none, or a single file before it."""
    for index, single in zip(_INDEXES, _SINGLES, strict=True):
        if (folder / index).is_file():
            return folder / index
        if (folder / single).is_file():
            return None
    return None


def _cut_off(path: Path, error: Exception) -> ModelError:
    return _corrupt(path, f"is not a whole safetensors file: {error}")


def _weight_map(index: Path) -> dict[str, str]:
    shards = read_json(index, ErrorCode.WEIGHTS_CORRUPT).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise _corrupt(index, "holds no weight_map")
    for name in shards.values():
        # A shard lies beside its index; anything else would read files that nobody named.
        if not isinstance(name, str) or Path(name).name != name:
            raise _corrupt(index, f"names a file elsewhere: {str(name)[:_SHOWN]!r}")
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


def _read_pickle(path: Path, device: str) -> dict[str, Tensor]:
    """Every tensor by its name, on "cpu" or, without values, on "meta"."""
    _check_pickle(path)
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
        raise _corrupt(path, f"is not a whole checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise _corrupt(path, "holds no table of tensors")
    return _check_tensors(path, state, device)


def _corrupt(path: Path, what: str, hint: str = _AGAIN) -> ModelError:
    """The error for a file of weights that is damaged."""
    return ModelError(ErrorCode.WEIGHTS_CORRUPT, f"{path.name} {what}", hint)


def _check_safetensors(path: Path) -> None:
    """Raises ModelError WEIGHTS_CORRUPT for what is no safetensors file, or states a tensor twice.

    What the library checks itself is left to it.
    """
    _refuse_other(path)
    with path.open("rb") as file:
        length = file.read(8)
        (size,) = struct.unpack("<Q", length) if len(length) == 8 else (0,)
        if size > min(_HEADER_BYTES, path.stat().st_size):
            raise _corrupt(path, f"is not a whole safetensors file: its header has {size} bytes")
        header = file.read(size)
    try:
        table = json.loads(header, object_pairs_hook=_once)
        shapes = [entry["shape"] for key, entry in table.items() if key != "__metadata__"]
        largest = max((side for shape in shapes for side in shape), default=0)
        if largest > _LARGEST:
            raise ValueError(f"a tensor has {largest} rows")
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise _corrupt(path, f"is not a whole safetensors file: {error}") from error


def check_archive(path: Path) -> bool:
    """Whether a file is a zip archive; False means a pickle.

    Raises ModelError WEIGHTS_CORRUPT for anything else.
    """
    head = _refuse_other(path)
    if not head.startswith(_ZIP) and not _is_pickle(head):
        raise _corrupt(path, "is no whole file of weights: neither an archive nor a pickle")
    return head.startswith(_ZIP)


def _check_pickle(path: Path) -> None:
    """Raises ModelError WEIGHTS_CORRUPT for what torch.save did not write, before it is opened.

    Pickles of any kind pass: whether they hold code is found out by whoever unpickles them.
    """
    if not check_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (NotImplementedError, ValueError, zipfile.BadZipFile) as error:
        raise _corrupt(path, f"is not a whole checkpoint: {error}") from error
    # torch.save compresses nothing.
    if claimed > path.stat().st_size:
        raise _corrupt(path, f"would unpack to {claimed} bytes, more than it has itself")


def _check_tensors(path: Path, state: dict[Any, Any], device: str) -> dict[str, Tensor]:
    """The tensors of an unpickled table, of plain kinds all of them.

    Raises ModelError WEIGHTS_CORRUPT, or DTYPE_UNSUPPORTED for quantised ones.
    """
    strange = next((key for key in state if not isinstance(key, str)), "")
    if strange != "":
        raise _corrupt(path, f"names a tensor {strange!r}, expected a string")
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        if value.is_quantized:
            raise ModelError(
                ErrorCode.DTYPE_UNSUPPORTED,
                f"{path.name}: {key} is quantised ({value.dtype})",
                "take the model's unquantised weights",
            )
        if value.is_nested or value.layout is not torch.strided:
            raise _corrupt(path, f"holds {key} as a sparse or nested tensor, expected a dense one")
        if value.device.type != device:
            raise _corrupt(path, f"holds {key} without its values")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise _corrupt(path, f"holds {list(value.shape)} of {key}, and values for less")
    return tensors


def _refuse_other(path: Path) -> bytes:
    """Refuse what a download that failed leaves, and say what it looks like; else its begin."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    text = head.lstrip().lower()
    if head.startswith(_LFS):
        looks, way = "a git-lfs pointer", "fetch the file itself: git lfs pull"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        looks, way = "a web page", _AGAIN
    elif head and len(head) < 200 and head.isascii() and b" " in head and _prints(head):
        looks, way = f"the message {head.decode('ascii').strip()!r}", _AGAIN
    else:
        return head
    raise _corrupt(path, f"holds no weights: it is {looks}", way)


def _prints(head: bytes) -> bool:
    return head.decode("ascii").strip().isprintable()


def _is_pickle(head: bytes) -> bool:
    """Whether these first bytes are a whole pickle, or operations of one that says so itself."""
    declared = head.startswith(b"\x80")
    try:
        for number, (operation, _, _) in enumerate(pickletools.genops(head)):
            if operation.name == "STOP" or (declared and number == _OPERATIONS):
                return True
    except Exception:  # whatever bytes of another kind make its decoders raise
        return False
    return False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose names must differ."""
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"its header states {name!r} twice")
        table[name] = value
    return table
