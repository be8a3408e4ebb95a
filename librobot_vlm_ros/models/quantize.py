"""bitsandbytes quantisation of a language model's linear layers, after loading.

The vision tower stays as it is: it is small, and its sizes don't fit 4-bit kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from librobot_vlm_ros.core import ErrorCode, ModelError

__all__ = ["QUANTIZATIONS", "quantize", "refuse_unknown"]

QUANTIZATIONS = ("none", "int8", "nf4")


def refuse_unknown(kind: str) -> None:
    """Raises ModelError BAD_CONFIG for an unknown kind, MISSING_DEPENDENCY without bitsandbytes."""
    if kind not in QUANTIZATIONS:
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            f"there is no quantization {kind!r}",
            f"use one of: {', '.join(QUANTIZATIONS)}",
        )
    if kind != "none":
        _bitsandbytes()


def quantize(model: nn.Module, kind: str) -> int:
    """Replace the linear layers inside `model` by quantised ones; gives how many."""
    if kind == "none":
        return 0
    bnb = _bitsandbytes()
    count = 0
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if type(layer) is nn.Linear:
                setattr(owner, name, _quantized(bnb, layer, kind))
                count += 1
    return count


def _quantized(bnb: Any, layer: nn.Linear, kind: str) -> nn.Module:
    device, dtype = layer.weight.device, layer.weight.dtype
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    new: nn.Module
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.data.cpu(), has_fp16_weights=False)
    else:
        if device.type == "cpu" and (layer.out_features % 32 or layer.in_features % 64):
            return layer  # the CPU's 4-bit kernels can't
        compute = torch.float32 if device.type == "cpu" else dtype
        new = bnb.nn.Linear4bit(*shape, compute_dtype=compute, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), quant_type="nf4")
    new.bias = layer.bias
    new.requires_grad_(False)
    return new.to(device)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            ErrorCode.MISSING_DEPENDENCY,
            f"quantization needs the package bitsandbytes: {error}",
            "install it: pip install bitsandbytes, or use quantization none",
        ) from error
    return bitsandbytes
