"""bitsandbytes quantisation of a language model's linear layers, after loading.

The vision tower stays as it is: it is small, and its sizes don't fit 4-bit kernels. What is gained
is memory, not time: on GPUs int8 is slower than float16, and on a CPU both kinds are about ten
times slower than float32 (2048 x 4096 times one row on one core: 2.5 ms, int8 28 ms, nf4 40 ms).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.configuration import ModelConfig, bad_config

QUANTIZATIONS = ("none", "int8", "nf4")

_log = logging.getLogger(__name__)


def quantization_for(config: ModelConfig, asked: str) -> str:
    """The kind of quantisation that `asked` and `use_qlora` mean together.

    Raises ModelError BAD_CONFIG for an unknown kind or where the two exclude each other,
    MISSING_DEPENDENCY without bitsandbytes.
    """
    if config.use_qlora and asked == "int8":
        raise bad_config(
            "use_qlora is 4-bit, quantization is int8",
            "use use_lora with quantization int8, or use_qlora alone",
        )
    kind = "nf4" if config.use_qlora else asked
    if kind not in QUANTIZATIONS:
        raise bad_config(
            f"there is no quantization {kind!r}", f"use one of: {', '.join(QUANTIZATIONS)}"
        )
    if kind != "none":
        _bitsandbytes()
    return kind


def is_quantized(module: nn.Module) -> bool:
    """Whether layers are held in 8 or 4 bits."""
    return any(not parameter.is_floating_point() for parameter in module.parameters())


def quantize(model: nn.Module, kind: str) -> int:
    """Replace the linear layers inside `model` by quantised ones; gives how many.

    Raises ModelError DTYPE_UNSUPPORTED where this hardware cannot compute them, MISSING_DEPENDENCY
    without bitsandbytes.
    """
    if kind == "none":
        return 0
    bnb = _bitsandbytes()
    if kind == "int8":
        # Said again with every call of every layer.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    found = [
        (owner, name, layer)
        for owner in model.modules()
        for name, layer in owner.named_children()
        if type(layer) is nn.Linear
    ]
    for owner, name, layer in found:
        try:
            setattr(owner, name, _quantized(bnb, layer, kind))
        except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(
                ErrorCode.DTYPE_UNSUPPORTED,
                f"bitsandbytes cannot hold a layer as {kind} on {layer.weight.device}: {error}",
                "use quantization none, or another device",
            ) from error
    _log.info("%d linear layers of the language model are held as %s", len(found), kind)
    return len(found)


def _is_news(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.msg


def _quantized(bnb: Any, layer: nn.Linear, kind: str) -> nn.Module:
    device, dtype = layer.weight.device, layer.weight.dtype
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    new: nn.Module
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.data.cpu(), has_fp16_weights=False)
    else:
        compute = torch.float32 if device.type == "cpu" else dtype
        new = bnb.nn.Linear4bit(*shape, compute_dtype=compute, quant_type="nf4")
        odd = layer.out_features % 32 or layer.in_features % 64
        if device.type == "cpu" and odd and new.support_avx512bf16_for_cpu:
            raise ValueError(
                f"it is {layer.out_features} x {layer.in_features}, this CPU's kernels take "
                "multiples of 32 x 64"
            )
        new.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), quant_type="nf4")
    new.bias = layer.bias
    new.requires_grad_(False)
    return new.to(device)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:  # a build that does not fit, too
        raise ModelError(
            ErrorCode.MISSING_DEPENDENCY,
            f"quantization needs the package bitsandbytes: {error}",
            "install it: pip install bitsandbytes, or use quantization none",
        ) from error
    return bitsandbytes
