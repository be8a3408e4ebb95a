"""What torch and a model do on this machine, found out in a process of its own.

    python -m librobot_vlm_ros.doctor.probe '{"model": ..., "weights": ..., ...}'

Each fact is a line of JSON behind a mark, written as soon as it is known: a library that ends the
process (a wrong processor, a broken driver, no memory left) takes none of the facts before it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import (
    ErrorCode,
    Frame,
    GenerationParams,
    InferenceRequest,
    VlmError,
    as_vlm_error,
)

__all__ = ["MARK", "probe"]

#: What a line with a fact begins with; libraries print lines of their own.
MARK = "::vlm-fact:: "
_DTYPES = ("float32", "bfloat16", "float16")


def probe(asked: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Tell the facts one after the other.

    `asked`: model, weights ("" for the model's own), device, dtype; probe (whether to ask the model
    about a picture), own (whether its weights are here), dtypes (those that fit, None for all).
    """
    try:
        import torch
    except Exception as error:  # a broken library raises what it likes
        tell({"fact": "torch", "error": f"{type(error).__name__}: {error}"})
        return
    tell(
        {
            "fact": "torch",
            "version": torch.__version__,
            "cuda_build": torch.version.cuda,
            "threads": torch.get_num_threads(),
        }
    )
    _tell_devices(torch, tell)
    try:
        import transformers

        tell({"fact": "transformers", "version": transformers.__version__})
        from librobot_vlm_ros.models.placement import free_bytes, place
    except Exception as error:
        tell({"fact": "transformers", "error": f"{type(error).__name__}: {error}"})
        return
    try:
        where = place(asked["device"], asked.get("dtype", "auto"))
        known: dict[str, Any] = {"free_bytes": free_bytes(where.device)}
        dtype = str(where.dtype).removeprefix("torch.")
        tell({"fact": "placement", "device": str(where.device), "dtype": dtype, **known})
    except VlmError as error:
        tell({"fact": "placement", "error": str(error)})
        return
    if asked.get("probe"):
        _probe_model(asked, str(where.device), tell)


def _tell_devices(torch: Any, tell: Callable[[dict[str, Any]], None]) -> None:
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = []
        for number in range(count):
            free, total = torch.cuda.mem_get_info(number)
            major, minor = torch.cuda.get_device_capability(number)
            name = torch.cuda.get_device_name(number)
            gpus.append(
                {"name": name, "free": free, "total": total, "capability": f"{major}.{minor}"}
            )
        tell({"fact": "cuda", "gpus": gpus})
    except Exception as error:
        tell({"fact": "cuda", "error": f"{type(error).__name__}: {error}"})


def _probe_model(
    asked: dict[str, Any], device: str, tell: Callable[[dict[str, Any]], None]
) -> None:
    """Answer one picture in each dtype; the weights are the model's own or tiny random ones."""
    from librobot_vlm_ros.models.registry import model_info
    from librobot_vlm_ros.models.testing.conformance import hooks_of

    info = model_info(asked["model"])
    if "torch" not in info.requires:
        return
    with tempfile.TemporaryDirectory(prefix="librobot-vlm-doctor-") as scratch:
        weights = asked["weights"]
        if not asked["own"]:
            weights = str(Path(scratch) / "tiny")
            try:
                if info.shipped_folder is None:
                    hooks_of(info).write_official(Path(weights))
            except Exception as error:
                tell({"fact": "probe", "dtype": "any", "error": str(as_vlm_error(error))})
                return
        for dtype in asked.get("dtypes") or _DTYPES:
            started = time.perf_counter()
            fact: dict[str, Any] = {"fact": "probe", "dtype": dtype, "own": asked["own"]}
            try:
                fact["finite"] = _is_finite(info.name, weights, device, dtype)
            except Exception as error:
                coded = as_vlm_error(error)
                if coded.code == ErrorCode.DTYPE_UNSUPPORTED:
                    continue  # the device does not do it, which is no fault
                fact["error"] = str(coded)
            fact["seconds"] = time.perf_counter() - started
            tell(fact)


def _is_finite(name: str, weights: str, device: str, dtype: str) -> bool:
    """Whether an answer comes without NaN: the guard leaves the dtype when one is met."""
    import numpy as np

    from librobot_vlm_ros.models.registry import create_vlm

    vlm = create_vlm(name, pretrained=weights, device=device, dtype=dtype)
    try:
        random = np.random.default_rng(1)
        pixels = random.integers(0, 256, (240, 320, 3), dtype=np.uint8)
        task = "caption" if "caption" in vlm.tasks else "embed"
        request = InferenceRequest(
            "probe",
            Frame(pixels, camera="probe", stamp_ns=0),
            task,
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


def main(argv: list[str]) -> int:
    """Write the facts as lines."""

    def tell(fact: dict[str, Any]) -> None:
        print(MARK + json.dumps(fact), flush=True)

    probe(json.loads(argv[0]), tell)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
