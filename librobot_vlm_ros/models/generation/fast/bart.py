"""One decode step of BART's decoder as plain arithmetic on its module's own weights.

Learned positions, post-norm layers, attention to what was written and to the encoder's states.
Keys and values of the encoder's states are computed once an answer, and stand there once a prompt:
its beams are further rows of the same attention. See `step_llama` for why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from librobot_vlm_ros.models.generation.fast.weights import (
    Activation,
    UnsupportedError,
    activation,
    addresses,
    plain,
    project,
    weight_of,
)

__all__ = ["BartBuffers", "BartStep"]

_Linear = tuple[Tensor, Tensor]
_Norm = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Layer:
    """Weights of a layer; matrices transposed as views, [in, out]."""

    qkv: tuple[_Linear, ...]
    out: _Linear
    norm: _Norm
    cross_q: _Linear
    cross_kv: tuple[_Linear, ...]
    cross_out: _Linear
    cross_norm: _Norm
    fc1: _Linear
    fc2: _Linear
    last_norm: _Norm


class BartBuffers:
    """Everything a step writes, for `rows` rows with room for `capacity` tokens each.

    `prompts` encoder rows of `width` places; each has `rows // prompts` rows in a row.
    """

    def __init__(self, step: BartStep, rows: int, capacity: int, prompts: int, width: int) -> None:
        self.rows, self.capacity, self.prompts, self.width = rows, capacity, prompts, width
        options: dict[str, Any] = {"dtype": step.dtype, "device": step.device}
        heads, size, depth = step.heads, step.head_dim, len(step.layers)
        #: [layers, 2, rows, heads, capacity, D]; zero where nothing is, for 0 * NaN is NaN.
        self.kv = torch.zeros((depth, 2, rows, heads, capacity, size), **options)
        #: [layers, 2, prompts, heads, width, D], of the encoder's states.
        self.cross = torch.zeros((depth, 2, prompts, heads, width, size), **options)
        #: Added to the attentions' scores: 0 where a row looks, else -inf.
        self.mask = torch.full((rows, 1, 1, capacity), -math.inf, **options)
        self.cross_mask = torch.zeros((prompts, 1, 1, width), **options)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=step.device)
        #: Of `StepPool`: a graph over these buffers, what it writes, and who uses them now.
        self.graph: Any = None
        self.logits: Any = None
        self.owner: Any = lambda: None
        #: Where the next token goes.
        self.slot = torch.zeros(1, dtype=torch.int64, device=step.device)
        qkv = torch.empty((3, rows, heads, size), **options)
        self.q_k_v = tuple(qkv.view(3, rows, -1))
        self.query = qkv[0].unsqueeze(2)
        self.new_kv = qkv[1:].unsqueeze(3)
        beams = rows // prompts
        asked = torch.empty((rows, heads * size), **options)
        self.asked = asked
        self.cross_query = asked.view(prompts, beams, heads, size).transpose(1, 2)
        #: Whether some place of the encoder's states is not looked at. A graph is captured before
        #: that is known.
        self.padded = step.device.type == "cuda"
        self.layers = [
            (kv, kv[0], kv[1], cross[0], cross[1])
            for kv, cross in zip(self.kv, self.cross, strict=True)
        ]

    def look_as(self, other: BartBuffers, prompts: Tensor | None) -> None:
        """Take over what `BartStep.look` has put into buffers of the same width, for prompt p that
        of prompt prompts[p] (None: its own).
        """
        cross, mask = other.cross, other.cross_mask
        if prompts is not None:
            cross, mask = cross.index_select(2, prompts), mask.index_select(0, prompts)
        self.cross.copy_(cross)
        self.cross_mask.copy_(mask)
        self.padded = self.padded or other.padded

    def clear(self) -> None:
        """As they were when made."""
        self.kv.zero_()
        self.cross.zero_()
        self.mask.fill_(-math.inf)
        self.cross_mask.zero_()
        self.slot.zero_()


class BartStep:
    """The arithmetic of a decoder and its head; holds views of their weights.

    Raises UnsupportedError, with the reason, for what it does not know: quantised and adapted
    layers, hooks.
    """

    #: See `LlamaStep.longest`: its table of positions bounds answers, not the arithmetic.
    longest: int | None = None

    def __init__(self, decoder: Any, head: Any) -> None:
        config = decoder.config
        self._modules = decoder, head
        kind = type(decoder.layers[0]).__name__
        if kind != "BartDecoderLayer":
            raise UnsupportedError(f"a {kind} is not known")
        self.heads = int(config.decoder_attention_heads)
        self.head_dim = int(config.d_model) // self.heads
        self.act: Activation = activation(config, "activation_function")
        self.embedding = weight_of(decoder.embed_tokens, nn.Embedding)
        scale = float(getattr(decoder.embed_tokens, "embed_scale", None) or 1.0)
        self.embed_scale = None if scale == 1.0 else scale
        self.offset = int(decoder.embed_positions.offset)
        self.positions = decoder.embed_positions.weight.detach()[self.offset :]
        self.first_norm = _norm(decoder.layernorm_embedding)
        self.head, self.head_bias = plain(head)
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.layers = [_layer(layer) for layer in decoder.layers]
        #: Weights of its largest matrix, but for the head.
        self.largest = max(layer.fc1[0].numel() for layer in self.layers)

    def buffers(self, rows: int, capacity: int, prompts: int, width: int) -> BartBuffers:
        """Room for a batch."""
        return BartBuffers(self, rows, capacity, prompts, width)

    def look(self, buffers: BartBuffers, hidden: Tensor, mask: Tensor | None) -> None:
        """Take in the encoder's states [prompts, T, D] and their mask [prompts, T], T <= width."""
        length = hidden.shape[1]
        for layer, (_, _, _, keys, values) in zip(self.layers, buffers.layers, strict=True):
            for (weight, bias), into in zip(layer.cross_kv, (keys, values), strict=True):
                found = (hidden @ weight).add_(bias)
                into[:, :, :length].copy_(found.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        buffers.padded = buffers.padded or mask is not None or length < buffers.width
        if buffers.padded:
            buffers.cross_mask[..., length:] = -math.inf
        if mask is not None:
            unseen = (mask == 0)[:, None, None]
            buffers.cross_mask[..., :length].masked_fill_(unseen, -math.inf)

    def weights(self) -> tuple[Any, ...]:
        """Where its weights lie and what they are; equal while a captured graph is valid."""
        return addresses(*self._modules)

    def __call__(self, buffers: BartBuffers, allowed: range | Tensor | None = None) -> Tensor:
        """Take `buffers.tokens` in, one a row; gives the logits [rows, V] of what follows.

        `allowed`: only those columns.
        """
        rows, slot = buffers.rows, buffers.slot
        attend = functional.scaled_dot_product_attention
        cross_mask = buffers.cross_mask if buffers.padded else None
        buffers.mask.index_fill_(3, slot, 0.0)
        hidden = functional.embedding(buffers.tokens, self.embedding)
        if self.embed_scale is not None:
            hidden = hidden * self.embed_scale
        hidden = hidden + self.positions.index_select(0, slot)
        hidden = self._normed(hidden, self.first_norm)
        for layer, (both, keys, values, far_keys, far_values) in zip(
            self.layers, buffers.layers, strict=True
        ):
            for (weight, bias), into in zip(layer.qkv, buffers.q_k_v, strict=True):
                torch.addmm(bias, hidden, weight, out=into)
            both.index_copy_(3, slot, buffers.new_kv)
            seen = attend(buffers.query, keys, values, buffers.mask)
            hidden = hidden + _linear(seen.reshape(rows, -1), layer.out)
            hidden = self._normed(hidden, layer.norm)

            weight, bias = layer.cross_q
            torch.addmm(bias, hidden, weight, out=buffers.asked)
            seen = attend(buffers.cross_query, far_keys, far_values, cross_mask)
            hidden = hidden + _linear(seen.transpose(1, 2).reshape(rows, -1), layer.cross_out)
            hidden = self._normed(hidden, layer.cross_norm)

            wide = self.act(_linear(hidden, layer.fc1))
            hidden = self._normed(hidden + _linear(wide, layer.fc2), layer.last_norm)
        slot.add_(1)
        return project(hidden, self.head, self.head_bias, allowed)

    def _normed(self, x: Tensor, norm: _Norm) -> Tensor:
        return torch.layer_norm(x, x.shape[-1:], norm[0], norm[1], 1e-5)


def _layer(layer: Any) -> _Layer:
    own, far = layer.self_attn, layer.encoder_attn
    return _Layer(
        qkv=tuple(_both(getattr(own, f"{x}_proj")) for x in "qkv"),
        out=_both(own.out_proj),
        norm=_norm(layer.self_attn_layer_norm),
        cross_q=_both(far.q_proj),
        cross_kv=tuple(_both(getattr(far, f"{x}_proj")) for x in "kv"),
        cross_out=_both(far.out_proj),
        cross_norm=_norm(layer.encoder_attn_layer_norm),
        fc1=_both(layer.fc1),
        fc2=_both(layer.fc2),
        last_norm=_norm(layer.final_layer_norm),
    )


def _both(layer: Any) -> _Linear:
    weight, bias = plain(layer)
    if bias is None:
        raise UnsupportedError("a linear layer has no bias")
    return weight, bias


def _norm(layer: Any) -> _Norm:
    if type(layer) is not nn.LayerNorm or layer.eps != 1e-5:
        raise UnsupportedError(f"a {type(layer).__name__} stands in a norm's place")
    return layer.weight.detach(), layer.bias.detach()


def _linear(x: Tensor, layer: _Linear) -> Tensor:
    return torch.addmm(layer[1], x, layer[0])
