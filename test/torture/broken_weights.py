"""A whole checkpoint, broken in each way that somebody has met: 12 kinds, some in variants."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode


class _Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> Any:
        return (Path.touch, (self._ran,))


@dataclass(frozen=True)
class Case:
    """One broken checkpoint: what is done to a whole one, and what loading it must say."""

    #: Cases of a kind may share a code; kinds must not.
    kind: str
    code: ErrorCode
    spoil: Callable[[Path], Any] = lambda folder: None
    options: dict[str, Any] = field(default_factory=dict)
    #: What the kernel must do: the load is a process of its own then (see hardship.py).
    hardship: str = ""


def _tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return spoil


def _first(weights: dict[str, Any]) -> str:
    return next(name for name in sorted(weights) if name.endswith("norm.weight"))


def _zeros(size: int) -> Any:
    import torch

    return torch.zeros(size)


def _filled(value: float) -> Callable[[Path], None]:
    return _tensors(lambda weights: weights[_first(weights)].__setitem__(0, value))


def _stored_as(name: str) -> Callable[[Path], None]:
    import torch

    return _tensors(
        lambda weights: weights.update({_first(weights): _zeros(8).to(getattr(torch, name))})
    )


def _edited(folder: Path, **values: Any) -> None:
    from librobot_vlm_ros.models.testing.florence2 import edit_json

    edit_json(folder / "config.json", **values)


def _shard_left_out(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _larger_vocabulary(folder: Path) -> None:
    from tokenizers import Tokenizer

    file = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.add_tokens([f"word{number}" for number in range(100)])
    tokenizer.save(file)


def cases(ran: Path) -> dict[str, Case]:
    """By name; `ran` is the file that a pickle's code would touch."""

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": _Bomb(ran)}))

    def written(name: str, content: bytes) -> Callable[[Path], Any]:
        return lambda folder: (folder / name).write_bytes(content)

    def key_missing(weights: dict[str, Any]) -> None:
        weights.pop(_first(weights))

    weights = "model.safetensors"
    code = ErrorCode
    return {
        "missing": Case(
            "missing file", code.WEIGHTS_NOT_FOUND, lambda folder: (folder / weights).unlink()
        ),
        "shard left out": Case("missing file", code.WEIGHTS_NOT_FOUND, _shard_left_out),
        "truncated": Case(
            "truncated", code.WEIGHTS_CORRUPT, lambda folder: os.truncate(folder / weights, 5000)
        ),
        "empty": Case("truncated", code.WEIGHTS_CORRUPT, written(weights, b"")),
        "wrong shape": Case(
            "wrong shape",
            code.SHAPE_MISMATCH,
            _tensors(lambda tensors: tensors.update({_first(tensors): _zeros(7)})),
        ),
        "extra key": Case(
            "other keys",
            code.KEY_MISMATCH,
            _tensors(lambda tensors: tensors.update(extra=_zeros(7))),
        ),
        "key missing": Case("other keys", code.KEY_MISMATCH, _tensors(key_missing)),
        "NaN": Case("NaN", code.NAN_WEIGHTS, _filled(float("nan"))),
        "float8": Case("wrong dtype", code.DTYPE_UNSUPPORTED, _stored_as("float8_e4m3fn")),
        "int8": Case("wrong dtype", code.DTYPE_UNSUPPORTED, _stored_as("int8")),
        "beyond float16": Case(
            "wrong dtype", code.DTYPE_UNSUPPORTED, _filled(1e6), {"dtype": "float16"}
        ),
        "pickle with code": Case("pickle with code", code.UNSAFE_CHECKPOINT, pickled),
        "config no JSON": Case("bad config", code.BAD_CONFIG, written("config.json", b"{")),
        "another model's": Case(
            "bad config", code.BAD_CONFIG, lambda folder: _edited(folder, model_type="other")
        ),
        "wrong tokenizer": Case(
            "wrong tokenizer", code.TOKENIZER_MISMATCH, written("tokenizer.json", b"{")
        ),
        "larger vocabulary": Case("wrong tokenizer", code.TOKENIZER_MISMATCH, _larger_vocabulary),
        "changed": Case(
            "changed", code.CHECKSUM_MISMATCH, _filled(0.25), {"weights_sha256": "of the whole one"}
        ),
        "no permission": Case(
            "no permission",
            code.PERMISSION_DENIED,
            lambda folder: (folder / weights).chmod(0),
            hardship="permissions",
        ),
        "disk full": Case("disk full", code.DISK_FULL, hardship="disk"),
    }
