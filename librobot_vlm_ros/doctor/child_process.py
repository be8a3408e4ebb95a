"""Questions to torch and other libraries, asked in a child process.

A library that ends its process (a wrong processor, a broken driver, no memory left) ends the
child's only. Each fact is a line of JSON behind a mark, written as soon as it is known, so that
none is lost. `ask_python` runs a few lines of Python, `ask_torch` runs this module:

    python -m librobot_vlm_ros.doctor.child_process '{"model": ..., "weights": ..., ...}'
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import librobot_vlm_ros
from librobot_vlm_ros.core import (
    ErrorCode,
    Frame,
    GenerationParams,
    InferenceRequest,
    VlmError,
    as_vlm_error,
)

#: What a line with a fact begins with; libraries print lines of their own.
_MARK = "::vlm-fact:: "
_ROOT = Path(librobot_vlm_ros.__file__).parents[1]
_LAST_WORDS = 300
_DTYPES = ("float32", "bfloat16", "float16")
#: `package.Error: text` or `Error`, as a traceback ends; its stack is indented.
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(: |$)")


# -- the parent's side


def ask_python(script: str, timeout_s: float = 60.0) -> tuple[dict[str, Any], str]:
    """(what `script` told by `tell(name=value, ...)`, why it ended early or "")."""
    head = f"import json\ndef tell(**facts): print({_MARK!r} + json.dumps(facts), flush=True)\n"
    facts, why = _run([sys.executable, "-c", head + script], timeout_s)
    return {key: value for fact in facts for key, value in fact.items()}, why


def ask_torch(asked: dict[str, Any], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """(facts as below, why the child ended early or ""). Each has a name, "fact", and its values,
    or an "error": torch, cuda, transformers, placement, and "probe" for each dtype.

    `asked`: model, weights ("" for the model's own), device, dtype; probe (whether to ask the model
    about a picture), own (whether its weights are here), dtypes (those that fit, None for all).
    """
    return _run([sys.executable, "-m", __name__, json.dumps(asked)], timeout_s)


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
    lines = out.decode(errors="replace").splitlines()
    facts = [json.loads(line.removeprefix(_MARK)) for line in lines if line.startswith(_MARK)]
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


# -- the child's side


def _tell(fact: str, **values: Any) -> None:
    print(_MARK + json.dumps({"fact": fact, **values}), flush=True)


def _answer(asked: dict[str, Any]) -> None:
    try:
        import torch
    except Exception as error:  # a broken library raises what it likes
        _tell("torch", error=f"{type(error).__name__}: {error}")
        return
    _tell("torch", version=torch.__version__, cuda_build=torch.version.cuda)
    try:
        _tell("cuda", gpus=_gpus(torch.cuda))
    except Exception as error:
        _tell("cuda", error=f"{type(error).__name__}: {error}")
    try:
        import transformers

        _tell("transformers", version=transformers.__version__)
        from librobot_vlm_ros.models.placement import free_bytes, resolve_placement
    except Exception as error:
        _tell("transformers", error=f"{type(error).__name__}: {error}")
        return
    try:
        where = resolve_placement(asked["device"], asked.get("dtype", "auto"))
        free = free_bytes(where.device)
    except VlmError as error:
        _tell("placement", error=str(error))
        return
    dtype = str(where.dtype).removeprefix("torch.")
    _tell("placement", device=str(where.device), dtype=dtype, free_bytes=free)
    if asked.get("probe"):
        _probe_model(asked, str(where.device))


def _gpus(cuda: Any) -> list[dict[str, Any]]:
    found = []
    for number in range(cuda.device_count() if cuda.is_available() else 0):
        free, total = cuda.mem_get_info(number)
        major, minor = cuda.get_device_capability(number)
        found.append(
            {
                "name": cuda.get_device_name(number),
                "free": free,
                "total": total,
                "capability": f"{major}.{minor}",
            }
        )
    return found


def _probe_model(asked: dict[str, Any], device: str) -> None:
    """Answer one picture in each dtype; the weights are the model's own or tiny random ones."""
    from librobot_vlm_ros.models.registry import model_info
    from librobot_vlm_ros.models.testing.conformance import hooks_of

    info = model_info(asked["model"])
    with tempfile.TemporaryDirectory(prefix="librobot-vlm-doctor-") as scratch:
        weights = asked["weights"]
        if not asked["own"]:
            weights = str(Path(scratch) / "tiny")
            try:
                if info.shipped_folder is None:
                    hooks_of(info).write_official(Path(weights))
            except Exception as error:
                _tell("probe", dtype="any", error=str(as_vlm_error(error)))
                return
        for dtype in asked["dtypes"] or _DTYPES:
            started = time.perf_counter()
            outcome: dict[str, Any]
            try:
                outcome = {"finite": _is_finite(info.name, weights, device, dtype)}
            except Exception as error:
                coded = as_vlm_error(error)
                if coded.code == ErrorCode.DTYPE_UNSUPPORTED:
                    continue  # the device does not do it, which is no fault
                outcome = {"error": str(coded)}
            _tell("probe", dtype=dtype, seconds=time.perf_counter() - started, **outcome)


def _is_finite(name: str, weights: str, device: str, dtype: str) -> bool:
    """Whether an answer comes without NaN: the guard leaves the dtype when one is met."""
    import numpy as np

    from librobot_vlm_ros.models.registry import create_backend

    vlm = create_backend(name, pretrained=weights, device=device, dtype=dtype)
    try:
        pixels = np.random.default_rng(1).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        request = InferenceRequest(
            "probe",
            Frame(pixels, camera="probe", stamp_ns=0),
            "caption" if "caption" in vlm.tasks else "embed",
            params=GenerationParams(max_new_tokens=4),
        )
        (entry,) = vlm.run([request])
        if isinstance(entry, VlmError):
            if entry.code == ErrorCode.NAN_LOGITS:
                return False
            raise entry
        return bool(vlm.dtype == dtype)
    finally:
        vlm.close()


if __name__ == "__main__":
    _answer(json.loads(sys.argv[1]))
