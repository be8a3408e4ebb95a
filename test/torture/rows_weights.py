"""Checkpoints that are broken, each in its own way."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from broken_weights import Case
from broken_weights import cases as broken
from hardship import CANNOT
from suite import HERE, Findings, borrowed, robot_and_node, row

from librobot_vlm_ros.core import ErrorCode, as_vlm_error

#: Less than the weights of the tiny checkpoint, so that their download does not fit.
_DISK = "64k"
_TINY = "florence-2-base"


def _options(case: Case, good: Path) -> dict[str, Any]:
    """As `create_vlm` and the node take them."""
    from librobot_vlm_ros.models.checkpoints.checksum import weights_sha256

    if "weights_sha256" in case.options:
        return {"weights_sha256": [weights_sha256(good)]}
    return case.options


@contextmanager
def _hub(good: Path) -> Iterator[Any]:
    """A hub of our own that serves the whole checkpoint."""
    files = {file.name: file.read_bytes() for file in good.iterdir() if file.is_file()}
    hub = borrowed("models/checkpoints/test_downloads.py").Hub(files)
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
    from librobot_vlm_ros.models.testing.florence2 import tiny_florence_folder

    with tempfile.TemporaryDirectory() as base:
        ran, good = Path(base) / "ran", tiny_florence_folder(Path(base) / "good")
        home = Path(base) / "home"
        home.mkdir()
        # Libraries keep modules of their own (activations): what one whole load leaves is the base.
        create_vlm(_TINY, pretrained=str(good), device="cpu").close()
        before, kinds, skipped = _networks(), dict[str, set[ErrorCode]](), []
        for name, case in broken(ran).items():
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
    from librobot_vlm_ros.models.testing.florence2 import tiny_florence_folder

    with tempfile.TemporaryDirectory() as base:
        ran, good = Path(base) / "ran", tiny_florence_folder(Path(base) / "good")
        home = Path(base) / "home"
        home.mkdir()
        able = [name for name in ("permissions", "disk") if _possible(home, name)]
        cases = {
            name: case
            for name, case in broken(ran).items()
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
        skipped = sorted(name for name in broken(ran) if name not in cases)
        if skipped:
            found.note(not_possible_here=skipped)
