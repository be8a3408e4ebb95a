"""Questions to libraries in processes of their own: one that ends its process ends no more."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import librobot_vlm_ros
from librobot_vlm_ros.doctor.probe import MARK

__all__ = ["ask_python", "ask_probe", "last_words"]

_ROOT = Path(librobot_vlm_ros.__file__).parents[1]
_LAST_WORDS = 300
#: `package.Error: text` or `Error`, as a traceback ends; its stack is indented.
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(: |$)")


def ask_python(script: str, timeout_s: float = 60.0) -> tuple[dict[str, Any], str]:
    """(what `script` told by `tell(name=value, ...)`, why it ended early or "")."""
    head = f"import json\ndef tell(**facts): print({MARK!r} + json.dumps(facts), flush=True)\n"
    facts, why = _run([sys.executable, "-c", head + script], timeout_s)
    return {key: value for fact in facts for key, value in fact.items()}, why


def ask_probe(asked: dict[str, Any], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """(facts of `models.probe`, why it ended early or "")."""
    module = "librobot_vlm_ros.doctor.probe"
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
    return facts, last_words(errors.decode(errors="replace")) or f"exit code {code}"


def last_words(errors: str) -> str:
    """What a Python process ended with: the exception of the last traceback, all its lines in one,
    or the last line where there is none. Of a long text the two ends.
    """
    lines = [line.rstrip() for line in errors.splitlines() if line.strip()]
    tops = [number for number, line in enumerate(lines) if line.startswith("Traceback (most")]
    stack = range(tops[-1] if tops else len(lines), len(lines))
    begin = next((number for number in stack if _EXCEPTION.match(lines[number])), -1)
    text = " ".join(line.strip() for line in lines[begin:])
    if len(text) <= _LAST_WORDS:
        return text
    head, tail = text[: _LAST_WORDS // 2], text[-_LAST_WORDS // 2 :]
    return f"{head.rpartition(' ')[0] or head} ... {tail.partition(' ')[2] or tail}"
