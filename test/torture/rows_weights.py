"""Checkpoints that are broken, each in its own way."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from suite import Findings, robot_and_node, row

from librobot_vlm_ros.core import ErrorCode, as_vlm_error


class _Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> Any:
        return (Path.touch, (self._ran,))


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


def _nan(weights: dict[str, Any]) -> None:
    weights[_first(weights)][0] = float("nan")


def _edited(folder: Path, **values: Any) -> None:
    from librobot_vlm_ros.models.tiny import edit_json

    edit_json(folder / "config.json", **values)


def _cases(ran: Path) -> dict[str, tuple[Callable[[Path], Any], ErrorCode]]:
    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": _Bomb(ran)}))

    return {
        "weights missing": (
            lambda f: (f / "model.safetensors").unlink(),
            ErrorCode.WEIGHTS_NOT_FOUND,
        ),
        "truncated": (
            lambda f: os.truncate(f / "model.safetensors", 5000),
            ErrorCode.WEIGHTS_CORRUPT,
        ),
        "empty": (
            lambda f: (f / "model.safetensors").write_bytes(b""),
            ErrorCode.WEIGHTS_CORRUPT,
        ),
        "pickle with code": (pickled, ErrorCode.UNSAFE_CHECKPOINT),
        "wrong shape": (
            _tensors(lambda w: w.update({_first(w): _zeros(7)})),
            ErrorCode.SHAPE_MISMATCH,
        ),
        "extra key": (_tensors(lambda w: w.update(extra=_zeros(7))), ErrorCode.KEY_MISMATCH),
        "key missing": (_tensors(lambda w: w.pop(_first(w))), ErrorCode.KEY_MISMATCH),
        "NaN": (_tensors(_nan), ErrorCode.NAN_WEIGHTS),
        "config no JSON": (
            lambda f: (f / "config.json").write_text("{"),
            ErrorCode.BAD_CONFIG,
        ),
        "another model's": (lambda f: _edited(f, model_type="other"), ErrorCode.BAD_CONFIG),
        "wrong tokenizer": (
            lambda f: (f / "tokenizer.json").write_text("{"),
            ErrorCode.TOKENIZER_MISMATCH,
        ),
        "no permission": (
            lambda f: (f / "model.safetensors").chmod(0),
            ErrorCode.PERMISSION_DENIED,
        ),
        "disk full": (lambda f: None, ErrorCode.DISK_FULL),
    }


def _refusing(name: str) -> Any:
    """What the system does at "no permission" and "disk full", whoever runs this (root may read
    everything, and loading writes only what it downloads).
    """
    from librobot_vlm_ros.models import weights

    if name == "no permission":
        real = Path.open

        def refused(path: Path, *words: Any, **named: Any) -> Any:
            if path.name == "model.safetensors":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *words, **named)

        return mock.patch.object(Path, "open", refused)
    if name == "disk full":
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return mock.patch.multiple(
            weights,
            _downloaded=lambda *_: None,
            _reach=lambda *_: None,
            _download=mock.Mock(side_effect=full),
        )
    return contextlib.nullcontext()


def _networks() -> int:
    """Networks and layers alive in this process."""
    import torch

    gc.collect()
    return sum(issubclass(type(thing), torch.nn.Module) for thing in gc.get_objects())


@row
def broken_checkpoints(found: Findings) -> None:
    """A code each, nothing left allocated, no code of a pickle run, and the whole one loads."""
    from librobot_vlm_ros.models import create_vlm
    from librobot_vlm_ros.models.tiny import tiny_florence_folder

    with tempfile.TemporaryDirectory() as base:
        ran, good = Path(base) / "ran", tiny_florence_folder(Path(base) / "good")
        # Libraries keep modules of their own (activations): what one whole load leaves is the base.
        create_vlm("florence-2-base", pretrained=str(good), device="cpu").close()
        before, codes = _networks(), set()
        for name, (spoil, expected) in _cases(ran).items():
            folder = Path(base) / name.replace(" ", "_")
            shutil.copytree(good, folder)
            source = None if name == "disk full" else str(folder)
            code = ErrorCode.OK
            with _refusing(name):
                try:
                    spoil(folder)
                    create_vlm("florence-2-base", pretrained=source, device="cpu").close()
                except Exception as error:
                    code = as_vlm_error(error).code
            codes.add(code)
            found.cases += 1
            found.check(code == expected, f"{name}: {code.name}, expected {expected.name}")
        left = _networks() - before
        found.check(left <= 0, f"{left} networks and layers are left")
        create_vlm("florence-2-base", pretrained=str(good), device="cpu").close()
        found.check(not ran.exists(), "code of the pickle was run")
        found.note(codes=sorted(code.name for code in codes), networks_left=max(0, left))


@row
def broken_checkpoints_at_the_node(found: Findings) -> None:
    """Configuring fails with the code, the node stays unconfigured, good weights load then."""
    from librobot_vlm_ros.models.tiny import tiny_florence_folder

    with tempfile.TemporaryDirectory() as base:
        ran, good = Path(base) / "ran", tiny_florence_folder(Path(base) / "good")
        cases = [name for name in _cases(ran) if name not in ("no permission", "disk full")]
        with robot_and_node(model="florence-2-base", weights=str(good), tasks=[""]) as (_, vlm):
            for name in cases[: found.number(len(cases), 2)]:
                spoil, expected = _cases(ran)[name]
                folder = Path(base) / name.replace(" ", "_")
                shutil.copytree(good, folder)
                spoil(folder)
                found.cases += 1
                found.check(not vlm.set_parameters(weights=str(folder)), "weights refused")
                found.check(not vlm.change_state("configure", 120.0), f"{name}: configured")
                found.check(vlm.state == "unconfigured", f"{name}: {vlm.state}")
                said = f"{expected.name}({int(expected)})"
                found.check(said in vlm.log(), f"{name}: the log does not say {said}")
                vlm.set_parameters(weights=str(good))
                found.check(vlm.change_state("configure", 120.0), f"good after {name} refused")
                vlm.change_state("cleanup", 60.0)
            found.check(vlm.process.alive, "the node has ended")
        found.check(not ran.exists(), "code of the pickle was run")
