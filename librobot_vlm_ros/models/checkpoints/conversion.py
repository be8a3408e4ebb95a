"""Rewrite a checkpoint of any known layout in transformers' native layout, and prove it equal.

The new folder loads here (`create_vlm(name, pretrained=folder)`) and with transformers' own
`from_pretrained`. It is written beside its place and renamed once it has been loaded back and every
tensor was found equal: what stands under the name asked for is whole.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from librobot_vlm_ros.core import BagError, ErrorCode, ModelError
from librobot_vlm_ros.models.backend import BYTES_PER_PARAMETER, ModelInfo
from librobot_vlm_ros.models.catalog import CATALOG
from librobot_vlm_ros.models.checkpoints.checksum import weights_sha256
from librobot_vlm_ros.models.checkpoints.hub import find_weights
from librobot_vlm_ros.models.checkpoints.loading import find_layout
from librobot_vlm_ros.models.checkpoints.progress import LoggedProgress
from librobot_vlm_ros.models.checkpoints.shards import (
    read_config,
    read_json,
    tensor_kinds,
    weight_files,
)
from librobot_vlm_ros.models.placement import resolve_dtype
from librobot_vlm_ros.models.registry import create_vlm, model_info

_log = logging.getLogger(__name__)

#: Files that belong to tokenizer and licence; taken along where the new folder has none.
_TAKEN_ALONG = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "LICENSE*",
)
#: Bytes for the small files, and for what a file system takes itself.
_SPARE_BYTES = 64 << 20
_WATCH_S = 1.0


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    model: str
    layout: str
    """Of the source."""
    dtype: str
    parameters: int
    tensors: int
    """Tensors that were read back and found equal."""
    bytes: int
    sha256: str
    """Of the new weights, see `weights_sha256`."""


def convert_folder(
    source: str,
    out: Path,
    *,
    model: str = "",
    dtype: str = "",
    adapter: Path | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write `source` (a folder, hub id or registered name) to `out` in the native layout.

    `model` names the registered model where the folder's config.json leaves a choice; `dtype`
    defaults to what most of the weights are stored in; `adapter` is a LoRA folder of peft, merged
    into the weights. Raises ModelError as `create_vlm` does, BagError PATH_NOT_ALLOWED when `out`
    is there already, DISK_FULL before anything is loaded when it will not fit.
    """
    out = out.expanduser().absolute()
    _refuse_existing(out, overwrite)
    info, folder = _source(source, model)
    layout = find_layout(read_config(folder)).name
    kind, size = _target(folder, dtype)
    _check_room(out.parent, size)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was ended
    try:
        written = _write(info, folder, partial, kind, adapter, size)
        sizes = sum(path.stat().st_size for path in partial.iterdir())
        digest = weights_sha256(partial)
        _put_in_place(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Converted(out, info.name, layout, kind, *written, sizes, digest)


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise BagError(
            ErrorCode.FILE_NOT_FOUND, f"there is no folder {out.parent}", "Make it first."
        )
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise BagError(
            ErrorCode.PATH_NOT_ALLOWED, f"{out} is there already", "--overwrite replaces it."
        )
    # What is replaced must look like what this writes: a typing error must not cost a home folder.
    if not (out.is_dir() and not out.is_symlink() and (out / "config.json").is_file()):
        raise BagError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{out} is no checkpoint folder, it is not replaced",
            "Name another folder.",
        )


def _source(source: str, model: str) -> tuple[ModelInfo, Path]:
    """The model's row, and the folder of its weights, downloaded if need be."""
    named: ModelInfo | None = None
    folder = Path(source).expanduser()
    if not folder.is_dir():
        with contextlib.suppress(ModelError):
            named = model_info(source.partition("@")[0])
        if named is not None and "@" not in source:
            folder = find_weights(named, None).folder
        else:
            folder = find_weights(named or model_info("florence-2-base"), source).folder
    if model:
        return model_info(model), folder
    if named is not None:
        return named, folder
    # A layout's name begins with the family that reads it.
    family = find_layout(read_config(folder)).name.partition(" ")[0].replace("_", "-")
    rows = [row for row in CATALOG if row.family == family]
    if not rows:
        raise ModelError(
            ErrorCode.UNKNOWN_MODEL,
            f"no registered model has the family {family!r}",
            "name one: --model NAME",
        )
    published = [row for row in rows if row.default_pretrained]
    return (published or rows)[0], folder


def _target(folder: Path, dtype: str) -> tuple[str, int]:
    """(dtype of the new folder, about how many bytes it will take)."""
    counts: collections.Counter[str] = collections.Counter()
    sources = [folder, *(path for path in (folder / "vision_tower",) if path.is_dir())]
    for path in (file for source in sources for file in weight_files(source)):
        for kind, values in tensor_kinds(path).values():
            counts[kind] += values
    floats = {kind: n for kind, n in counts.items() if kind in BYTES_PER_PARAMETER}
    stored = max(floats, key=lambda kind: floats[kind], default="float32")
    kind = dtype or stored
    kind = str(resolve_dtype(kind, torch.device("cpu"))).removeprefix("torch.")
    return kind, int(sum(counts.values()) * BYTES_PER_PARAMETER[kind])


def _check_room(parent: Path, size: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < size + _SPARE_BYTES:
        raise BagError(
            ErrorCode.DISK_FULL,
            f"{parent} has {free / 1e6:,.0f} MB free, about {(size + _SPARE_BYTES) / 1e6:,.0f} MB "
            "are needed",
            "Free space there, write elsewhere, or choose a smaller dtype.",
        )


def _write(
    info: ModelInfo, folder: Path, partial: Path, dtype: str, adapter: Path | None, size: int
) -> tuple[int, int]:
    """Load, save, load back, compare; (parameters, tensors compared)."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype, "attention": "eager"}
    vlm = create_vlm(info.name, pretrained=str(folder), **options)
    if adapter is not None:
        vlm.load_adapter(adapter)
        vlm.merge_adapter()
    before, parameters = _digests(vlm.module), vlm.get_num_parameters()
    with _watched(partial, size):
        vlm.save_pretrained(partial)
        _take_along(folder, partial)
    vlm.close()
    del vlm
    _log.info("loading back what was written")
    again = create_vlm(info.name, pretrained=str(partial), **options)
    after = _digests(again.module)
    again.close()
    different = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    if different:
        raise ModelError(
            ErrorCode.WEIGHTS_CORRUPT,
            f"{len(different)} tensors are not what was written ({', '.join(different[:3])})",
            "The disk may be failing; nothing was kept.",
        )
    return parameters, len(after)


def _digests(module: Any) -> dict[str, str]:
    """A digest of each tensor's kind, shape and bytes, by its name."""
    found = {}
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
        found[name] = hashlib.sha256(head + hashlib.sha256(flat).digest()).hexdigest()
    return found


def _take_along(folder: Path, partial: Path) -> None:
    for pattern in _TAKEN_ALONG:
        for path in folder.glob(pattern):
            new = partial / path.name
            if not path.is_file() or new.exists():
                continue
            if path.name == "tokenizer_config.json":
                content = read_json(path)
                content.pop("auto_map", None)  # names code of the repository, which is not here
                new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(path, new)


@contextlib.contextmanager
def _watched(folder: Path, total: int) -> Iterator[None]:
    """Say in the log how much of `total` bytes lies in the folder while this lasts."""
    progress, ending = LoggedProgress("writing"), threading.Event()

    def watch() -> None:
        while not ending.wait(_WATCH_S):
            with contextlib.suppress(OSError):
                progress.at(sum(path.stat().st_size for path in folder.iterdir()), total)

    thread = threading.Thread(target=watch, name="convert-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
        progress.finish()


def _put_in_place(partial: Path, out: Path) -> None:
    """The old folder goes only when the new one is whole."""
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = out.with_name(f"{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)
