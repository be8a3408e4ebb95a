"""What the tiny checkpoints of several families, and their original arithmetic, have alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["encoder_weights", "heads", "layer_norm", "projection_sizes", "turned"]


def encoder_weights(
    normal: Callable[..., Tensor], base: str, vision: dict[str, Any], outer_norms: Sequence[str]
) -> dict[str, Tensor]:
    """Layers and norms of a CLIP or SigLIP tower by their published names."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    state, norms = {}, list(outer_norms)
    for layer in range(vision["num_hidden_layers"]):
        at = f"{base}encoder.layers.{layer}."
        norms += [f"{at}layer_norm1", f"{at}layer_norm2"]
        sizes = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
        for name, size in {**sizes, "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}.items():
            state[f"{at}{name}.weight"], state[f"{at}{name}.bias"] = normal(*size), normal(size[0])
    for norm in norms:
        state[f"{norm}.weight"], state[f"{norm}.bias"] = 1 + normal(width), normal(width)
    return state


def projection_sizes(hidden: int, inner: int, kv: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices of a Llama or Gemma layer; `kv` rows for keys and values."""
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def heads(x: Tensor, count: int) -> Tensor:
    """[T, count * d] to [count, T, d]."""
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def layer_norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    """Mean 0 and spread 1 along the last axis, then the learnt scale and shift."""
    spread = x.var(-1, correction=0, keepdim=True)
    scaled = (x - x.mean(-1, keepdim=True)) / (spread + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def turned(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions 0, 1, ... on [heads, T, d]: pairs (i, i + d / 2) as complex numbers."""
    length, size = x.shape[-2:]
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :])
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)
