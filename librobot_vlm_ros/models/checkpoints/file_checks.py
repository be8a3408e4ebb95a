"""What a file of weights is and claims, looked at before a library is given the file.

A download that failed leaves something else under the file's name. And what a file claims of its
own sizes is compared with what lies there: a few kilobytes must not become gigabytes of memory.
"""

from __future__ import annotations

import json
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, ModelError

__all__ = ["check_archive", "check_pickle", "check_safetensors", "check_tensors", "corrupt"]

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


def corrupt(path: Path, what: str, hint: str = _AGAIN) -> ModelError:
    """The error for a file of weights that is damaged."""
    return ModelError(ErrorCode.WEIGHTS_CORRUPT, f"{path.name} {what}", hint)


def check_safetensors(path: Path) -> None:
    """Raises ModelError WEIGHTS_CORRUPT for what is no safetensors file, or states a tensor twice.

    What the library checks itself is left to it.
    """
    _refuse_other(path)
    with path.open("rb") as file:
        length = file.read(8)
        (size,) = struct.unpack("<Q", length) if len(length) == 8 else (0,)
        if size > min(_HEADER_BYTES, path.stat().st_size):
            raise corrupt(path, f"is not a whole safetensors file: its header has {size} bytes")
        header = file.read(size)
    try:
        table = json.loads(header, object_pairs_hook=_once)
        shapes = [entry["shape"] for key, entry in table.items() if key != "__metadata__"]
        largest = max((side for shape in shapes for side in shape), default=0)
        if largest > _LARGEST:
            raise ValueError(f"a tensor has {largest} rows")
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise corrupt(path, f"is not a whole safetensors file: {error}") from error


def check_archive(path: Path) -> bool:
    """Whether a file is a zip archive; False means a pickle.

    Raises ModelError WEIGHTS_CORRUPT for anything else.
    """
    head = _refuse_other(path)
    if not head.startswith(_ZIP) and not _is_pickle(head):
        raise corrupt(path, "is no whole file of weights: neither an archive nor a pickle")
    return head.startswith(_ZIP)


def check_pickle(path: Path) -> None:
    """Raises ModelError WEIGHTS_CORRUPT for what torch.save did not write, before it is opened.

    Pickles of any kind pass: whether they hold code is found out by whoever unpickles them.
    """
    if not check_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except (NotImplementedError, ValueError, zipfile.BadZipFile) as error:
        raise corrupt(path, f"is not a whole checkpoint: {error}") from error
    # torch.save compresses nothing.
    if claimed > path.stat().st_size:
        raise corrupt(path, f"would unpack to {claimed} bytes, more than it has itself")


def check_tensors(path: Path, state: dict[Any, Any], device: str) -> dict[str, Tensor]:
    """The tensors of an unpickled table, of plain kinds all of them.

    Raises ModelError WEIGHTS_CORRUPT, or DTYPE_UNSUPPORTED for quantised ones.
    """
    strange = next((key for key in state if not isinstance(key, str)), "")
    if strange != "":
        raise corrupt(path, f"names a tensor {strange!r}, expected a string")
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        if value.is_quantized:
            raise ModelError(
                ErrorCode.DTYPE_UNSUPPORTED,
                f"{path.name}: {key} is quantised ({value.dtype})",
                "take the model's unquantised weights",
            )
        if value.is_nested or value.layout is not torch.strided:
            raise corrupt(path, f"holds {key} as a sparse or nested tensor, expected a dense one")
        if value.device.type != device:
            raise corrupt(path, f"holds {key} without its values")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise corrupt(path, f"holds {list(value.shape)} of {key}, and values for less")
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
    raise corrupt(path, f"holds no weights: it is {looks}", way)


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
