"""Questions to libraries in processes of their own: one that ends its process ends no more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import librobot_vlm_ros
from librobot_vlm_ros.models.probe import MARK

__all__ = ["ask_python", "ask_probe"]

_ROOT = Path(librobot_vlm_ros.__file__).parents[1]
_LAST_WORDS = 300


def ask_python(script: str, timeout_s: float = 60.0) -> tuple[dict[str, Any], str]:
    """(what `script` told by `tell(name=value, ...)`, why it ended early or "")."""
    head = f"import json\ndef tell(**facts): print({MARK!r} + json.dumps(facts), flush=True)\n"
    facts, why = _run([sys.executable, "-c", head + script], timeout_s)
    return {key: value for fact in facts for key, value in fact.items()}, why


def ask_probe(asked: dict[str, Any], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """(facts of `models.probe`, why it ended early or "")."""
    module = "librobot_vlm_ros.models.probe"
    return _run([sys.executable, "-m", module, json.dumps(asked)], timeout_s)


def _run(words: list[str], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(
            words,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
        )
        out, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        out, errors, code = error.stdout or b"", error.stderr or b"", None
    except OSError as error:
        return [], f"no process could be started: {error}"
    facts = []
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(MARK):
            facts.append(json.loads(line.removeprefix(MARK)))
    if code == 0:
        return facts, ""
    if code is None:
        return facts, f"it did not end within {timeout_s:g} s"
    if code < 0:
        return facts, f"the process was ended by {signal.Signals(-code).name}"
    said = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    return facts, (said[-1] if said else f"exit code {code}")[-_LAST_WORDS:]
