"""Checkpoints that are broken, each in its own way."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hardship import CANNOT
from suite import HERE, Findings, borrowed, robot_and_node, row

from librobot_vlm_ros.core import ErrorCode, as_vlm_error

#: Less than the weights of the tiny checkpoint, so that their download does not fit.
_DISK = "64k"
_TINY = "florence-2-base"


class _Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> Any:
        return (Path.touch, (self._ran,))


@dataclass(frozen=True)
class _Case:
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
    from librobot_vlm_ros.models.tiny import edit_json

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


def _cases(ran: Path) -> dict[str, _Case]:
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
        "missing": _Case(
            "missing file", code.WEIGHTS_NOT_FOUND, lambda folder: (folder / weights).unlink()
        ),
        "shard left out": _Case("missing file", code.WEIGHTS_NOT_FOUND, _shard_left_out),
        "truncated": _Case(
            "truncated", code.WEIGHTS_CORRUPT, lambda folder: os.truncate(folder / weights, 5000)
        ),
        "empty": _Case("truncated", code.WEIGHTS_CORRUPT, written(weights, b"")),
        "wrong shape": _Case(
            "wrong shape",
            code.SHAPE_MISMATCH,
            _tensors(lambda tensors: tensors.update({_first(tensors): _zeros(7)})),
        ),
        "extra key": _Case(
            "other keys",
            code.KEY_MISMATCH,
            _tensors(lambda tensors: tensors.update(extra=_zeros(7))),
        ),
        "key missing": _Case("other keys", code.KEY_MISMATCH, _tensors(key_missing)),
        "NaN": _Case("NaN", code.NAN_WEIGHTS, _filled(float("nan"))),
        "float8": _Case("wrong dtype", code.DTYPE_UNSUPPORTED, _stored_as("float8_e4m3fn")),
        "int8": _Case("wrong dtype", code.DTYPE_UNSUPPORTED, _stored_as("int8")),
        "beyond float16": _Case(
            "wrong dtype", code.DTYPE_UNSUPPORTED, _filled(1e6), {"dtype": "float16"}
        ),
        "pickle with code": _Case("pickle with code", code.UNSAFE_CHECKPOINT, pickled),
        "config no JSON": _Case("bad config", code.BAD_CONFIG, written("config.json", b"{")),
        "another model's": _Case(
            "bad config", code.BAD_CONFIG, lambda folder: _edited(folder, model_type="other")
        ),
        "wrong tokenizer": _Case(
            "wrong tokenizer", code.TOKENIZER_MISMATCH, written("tokenizer.json", b"{")
        ),
        "larger vocabulary": _Case("wrong tokenizer", code.TOKENIZER_MISMATCH, _larger_vocabulary),
        "changed": _Case(
            "changed", code.CHECKSUM_MISMATCH, _filled(0.25), {"weights_sha256": "of the whole one"}
        ),
        "no permission": _Case(
            "no permission",
            code.PERMISSION_DENIED,
            lambda folder: (folder / weights).chmod(0),
            hardship="permissions",
        ),
        "disk full": _Case("disk full", code.DISK_FULL, hardship="disk"),
    }


def _options(case: _Case, good: Path) -> dict[str, Any]:
    """As `create_vlm` and the node take them."""
    from librobot_vlm_ros.models.checksum import weights_sha256

    if "weights_sha256" in case.options:
        return {"weights_sha256": [weights_sha256(good)]}
    return case.options


@contextmanager
def _hub(good: Path) -> Iterator[Any]:
    """A hub of our own that serves the whole checkpoint."""
    files = {file.name: file.read_bytes() for file in good.iterdir() if file.is_file()}
    hub = borrowed("models/test_downloads.py").Hub(files)
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


def _hardships(home: Path, *names: str) -> list[str]:
    """The words to put before a command; `home` is where downloads go."""
    words = [sys.executable, str(HERE / "hardship.py")]
    if "disk" in names:
        words += ["--disk", f"{home}:{_DISK}"]
    if "permissions" in names:
        words += ["--held-to-permissions"]
    return [*words, "--"]


def _possible(home: Path, *names: str) -> bool:
    """Whether this machine allows those hardships."""
    return subprocess.run([*_hardships(home, *names), "true"], check=False).returncode == 0


def _downloads(hub: Any, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


_LOAD = """
import sys
from librobot_vlm_ros.core import as_vlm_error
from librobot_vlm_ros.models import create_vlm
try:
    create_vlm(sys.argv[1], pretrained=sys.argv[2], device="cpu").close()
except Exception as error:
    print(int(as_vlm_error(error).code))
else:
    print(0)
"""


def _code_under(hardship: str, source: str, home: Path, hub: Any) -> ErrorCode | None:
    """What loading says in a process that has it hard; None where that cannot be had here."""
    words = [*_hardships(home, hardship), sys.executable, "-c", _LOAD, _TINY, source]
    ended = subprocess.run(
        words,
        env={**os.environ, **_downloads(hub, home)},
        capture_output=True,
        text=True,
        timeout=180.0,
        check=False,
    )
    if ended.returncode == CANNOT:
        return None
    if ended.returncode:
        raise RuntimeError(f"loading under {hardship} ended: {ended.stderr[-500:]}")
    return ErrorCode(int(ended.stdout.split()[-1]))


def _networks() -> int:
    """Networks and layers alive in this process."""
    import torch

    gc.collect()
    return sum(issubclass(type(thing), torch.nn.Module) for thing in gc.get_objects())


@row
def broken_checkpoints(found: Findings) -> None:
    """12 kinds, a code each, nothing left allocated, no code of a pickle run, the whole one loads.
    No permission and a full disk are the kernel's own.
    """
    from librobot_vlm_ros.models import create_vlm
    from librobot_vlm_ros.models.tiny import tiny_florence_folder

    with tempfile.TemporaryDirectory() as base:
        ran, good = Path(base) / "ran", tiny_florence_folder(Path(base) / "good")
        home = Path(base) / "home"
        home.mkdir()
        # Libraries keep modules of their own (activations): what one whole load leaves is the base.
        create_vlm(_TINY, pretrained=str(good), device="cpu").close()
        before, kinds, skipped = _networks(), dict[str, set[ErrorCode]](), []
        for name, case in _cases(ran).items():
            folder = Path(base) / name.replace(" ", "_")
            shutil.copytree(good, folder)
            code: ErrorCode | None = ErrorCode.OK
            try:
                case.spoil(folder)
                if case.hardship:
                    source = "owner/name" if case.hardship == "disk" else str(folder)
                    with _hub(good) as hub:
                        code = _code_under(case.hardship, source, home, hub)
                else:
                    options = {"device": "cpu", **_options(case, good)}
                    create_vlm(_TINY, pretrained=str(folder), **options).close()
            except Exception as error:
                code = as_vlm_error(error).code
            if code is None:
                skipped.append(name)
                continue
            kinds.setdefault(case.kind, set()).add(code)
            found.cases += 1
            found.check(code == case.code, f"{name}: {code.name}, expected {case.code.name}")
        codes = sorted({code.name for of_kind in kinds.values() for code in of_kind})
        found.check(len(codes) == len(kinds), f"{len(kinds)} kinds have {len(codes)} codes")
        found.check(len(kinds) >= 12 or skipped, f"only {len(kinds)} kinds")
        left = _networks() - before
        found.check(left <= 0, f"{left} networks and layers are left")
        create_vlm(_TINY, pretrained=str(good), device="cpu").close()
        found.check(not ran.exists(), "code of the pickle was run")
        found.note(kinds=len(kinds), codes=codes, networks_left=max(0, left))
        if skipped:
            found.note(not_possible_here=skipped)


@row
def broken_checkpoints_at_the_node(found: Findings) -> None:
    """Configuring fails with the code, the node stays unconfigured, good weights load then.
    The node's cache lies on a full disk, and permissions hold for it.
    """
    from librobot_vlm_ros.models.tiny import tiny_florence_folder

    with tempfile.TemporaryDirectory() as base:
        ran, good = Path(base) / "ran", tiny_florence_folder(Path(base) / "good")
        home = Path(base) / "home"
        home.mkdir()
        able = [name for name in ("permissions", "disk") if _possible(home, name)]
        cases = {
            name: case
            for name, case in _cases(ran).items()
            if not case.hardship or case.hardship in able
        }
        # The rare ones first, so that the quick run has them.
        names = sorted(cases, key=lambda name: not cases[name].hardship)
        with (
            _hub(good) as hub,
            robot_and_node(
                before=_hardships(home, *able),
                environment=_downloads(hub, home),
                model=_TINY,
                weights=str(good),
                tasks=[""],
            ) as (_, vlm),
        ):
            for name in names[: found.number(len(names), 3)]:
                case, folder = cases[name], Path(base) / name.replace(" ", "_")
                shutil.copytree(good, folder)
                case.spoil(folder)
                source = "owner/name" if case.hardship == "disk" else str(folder)
                options = {"dtype": "auto", "weights_sha256": [""], **_options(case, good)}
                found.cases += 1
                found.check(not vlm.set_parameters(weights=source, **options), "weights refused")
                said = f"{case.code.name}({int(case.code)})"
                earlier = vlm.log().count(said)
                found.check(not vlm.change_state("configure", 120.0), f"{name}: configured")
                found.check(vlm.state == "unconfigured", f"{name}: {vlm.state}")
                told = vlm.log().count(said) > earlier
                found.check(told, f"{name}: the log does not say {said}")
                vlm.set_parameters(weights=str(good), dtype="auto", weights_sha256=[""])
                found.check(vlm.change_state("configure", 120.0), f"good after {name} refused")
                vlm.change_state("cleanup", 60.0)
            found.check(vlm.process.alive, "the node has ended")
        found.check(not ran.exists(), "code of the pickle was run")
        skipped = sorted(name for name in _cases(ran) if name not in cases)
        if skipped:
            found.note(not_possible_here=skipped)
