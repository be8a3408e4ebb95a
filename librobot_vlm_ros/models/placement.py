"""Where a model runs and how: device, dtype, attention, and how many CPU threads."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from librobot_vlm_ros.core import ErrorCode, ModelError

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
ATTENTIONS = ("auto", "flash_attention_2", "sdpa", "eager")


@dataclass(frozen=True)
class Placement:
    """Device, dtype and attention that this machine has."""

    device: torch.device
    dtype: torch.dtype
    #: flash_attention_2, sdpa or eager.
    attention: str

    def __str__(self) -> str:
        return f"{self.device}, {dtype_name(self.dtype)}, {self.attention}"


def resolve_placement(
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
) -> Placement:
    """Resolve the three choices for this machine.

    Raises ModelError DEVICE_UNAVAILABLE, DTYPE_UNSUPPORTED or ATTENTION_UNAVAILABLE.
    """
    where = _resolve_device(device)
    kind = resolve_dtype(dtype, where)
    return Placement(where, kind, _resolve_attention(attention, where, kind))


def move_module(
    module: nn.Module, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Bring a model to a device and a dtype; buffers outside of its checkpoint to the device alone.

    Rotary frequencies are such: rounded to half precision they would put far positions wrong.
    """
    kept = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if name in owner._non_persistent_buffers_set
    ]
    module.to(device=device, dtype=dtype)
    for owner, name, buffer in kept:
        setattr(owner, name, buffer.to(device))


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for torch.float16."""
    return str(dtype).removeprefix("torch.")


def usable_cores() -> int:
    """Processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a model could still take on a GPU: free ones, and those that torch keeps unused.

    None for other devices: their memory is not torch's to tell.
    """
    if device.type != "cuda":
        return None
    free: int = torch.cuda.mem_get_info(device)[0]
    unused: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused


def _resolve_device(device: str | torch.device) -> torch.device:
    wanted = str(device).strip().lower()
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(wanted)
    except RuntimeError as error:
        raise ModelError(
            ErrorCode.DEVICE_UNAVAILABLE,
            f"there is no device called {device!r}",
            "use auto, cpu, cuda or cuda:N",
        ) from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise ModelError(
            ErrorCode.DEVICE_UNAVAILABLE,
            f"device {wanted} is not supported",
            "use auto, cpu, cuda or cuda:N",
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = found.index or 0
    if number >= count:
        raise ModelError(
            ErrorCode.DEVICE_UNAVAILABLE,
            f"device {wanted} was asked for, but torch {torch.__version__} sees {count} of them",
            "use device cpu or auto, or install a CUDA build of torch and the driver",
        )
    return torch.device("cuda", number)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype that `device` computes in. ``auto``: float32 on CPU, float16 on CUDA."""
    if isinstance(dtype, torch.dtype):
        dtype = dtype_name(dtype)
    wanted = str(dtype).strip().lower().removeprefix("torch.")
    if wanted == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if wanted not in _DTYPES:
        raise ModelError(
            ErrorCode.DTYPE_UNSUPPORTED,
            f"there is no dtype called {dtype!r}",
            "use auto, float32, float16 or bfloat16",
        )
    found = _DTYPES[wanted]
    bfloat16_on_cuda = found == torch.bfloat16 and device.type == "cuda"
    if bfloat16_on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError(
            ErrorCode.DTYPE_UNSUPPORTED,
            f"{torch.cuda.get_device_name(device)} does not compute in bfloat16",
            "use float16 or float32",
        )
    return found


def _resolve_attention(attention: str, device: torch.device, dtype: torch.dtype) -> str:
    wanted = str(attention).strip().lower().replace("-", "_")
    wanted = {"flash": "flash_attention_2", "flash_attn_2": "flash_attention_2"}.get(wanted, wanted)
    if wanted not in ATTENTIONS:
        raise ModelError(
            ErrorCode.ATTENTION_UNAVAILABLE,
            f"there is no attention called {attention!r}",
            f"use one of: {', '.join(ATTENTIONS)}",
        )
    missing = missing_for_flash(device, dtype)
    if wanted == "auto":
        return "flash_attention_2" if not missing else "sdpa"
    if wanted == "flash_attention_2" and missing:
        raise ModelError(
            ErrorCode.ATTENTION_UNAVAILABLE,
            f"flash_attention_2 was asked for, but {missing}",
            "use attention sdpa or auto",
        )
    return wanted


def missing_for_flash(device: torch.device, dtype: torch.dtype) -> str:
    """What flash-attn 2 lacks here; "" when it can be used."""
    if device.type != "cuda":
        return f"it needs a CUDA device and this is {device}"
    if dtype == torch.float32:
        return "it computes in float16 or bfloat16 only"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "it needs an Ampere or newer GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    return ""


#: Weights of a matrix up to which a second thread costs more than it brings where a few rows are
#: multiplied with it (measured up to eight), and far more on a machine that has other work.
_LIGHT = 1 << 20


def is_light(model: Any) -> bool:
    """Whether one CPU thread computes a decode step of a `FastModel` as fast as several."""
    return bool(model.device.type == "cpu" and model.largest <= _LIGHT)


@contextmanager
def threads_for(decoder: Any) -> Iterator[None]:
    """Keep torch to the calling thread meanwhile where the decoder's steps are `light`."""
    if not getattr(decoder, "light", False):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
