"""Decode steps of BART's decoder as plain arithmetic on the module's own weights.

Learned positions, post-norm layers, attention to what was written and to the encoder's states.
Keys and values of the encoder's states are computed once an answer and stand there once a prompt:
its beams are further rows of the same attention. See `llama` for why.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from librobot_vlm_ros.models.generation.fast.graph_runner import (
    FastDecoder,
    FastModel,
    GraphRunner,
    StaticCache,
)
from librobot_vlm_ros.models.generation.fast.weights import (
    Activation,
    UnsupportedError,
    activation,
    layer_norm,
    linear_weights,
    norm_weights,
    project,
)

_Linear = tuple[Tensor, Tensor]


class _Layer:
    """Weights of a layer; matrices transposed as views, [in, out]."""

    def __init__(self, layer: Any) -> None:
        own, cross = layer.self_attn, layer.encoder_attn
        self.qkv = [_with_bias(getattr(own, f"{x}_proj")) for x in "qkv"]
        self.out = _with_bias(own.out_proj)
        self.norm = norm_weights(layer.self_attn_layer_norm)
        self.cross_q = _with_bias(cross.q_proj)
        self.cross_kv = [_with_bias(getattr(cross, f"{x}_proj")) for x in "kv"]
        self.cross_out = _with_bias(cross.out_proj)
        self.cross_norm = norm_weights(layer.encoder_attn_layer_norm)
        self.fc1, self.fc2 = _with_bias(layer.fc1), _with_bias(layer.fc2)
        self.last_norm = norm_weights(layer.final_layer_norm)


class BartStaticCache(StaticCache):
    """Keys and values of the answers and of `prompts` prompts' encoder states of `width` positions.

    Each prompt has `rows // prompts` rows, side by side.
    """

    def __init__(self, model: FastBart, rows: int, capacity: int, prompts: int, width: int) -> None:
        super().__init__(model, rows, capacity, model.heads, prompts, width)
        options: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        heads, size, depth = model.heads, model.head_dim, len(model.layers)
        #: [layers, 2, prompts, heads, width, D], of the encoder's states.
        self.cross_kv = torch.zeros((depth, 2, prompts, heads, width, size), **options)
        self.cross_mask = torch.zeros((prompts, 1, 1, width), **options)
        #: Whether some position of the encoder's states is padding. A graph is captured before
        #: that is known.
        self.padded = model.device.type == "cuda"
        qkv = torch.empty((3, rows, heads, size), **options)
        self.q_k_v = tuple(qkv.view(3, rows, -1))
        self.query = qkv[0].unsqueeze(2)
        self.new_kv = qkv[1:].unsqueeze(3)
        self.cross_q = torch.empty((rows, heads * size), **options)
        self.cross_query = self.cross_q.view(prompts, rows // prompts, heads, size).transpose(1, 2)
        self.layers = [
            (kv, kv[0], kv[1], cross[0], cross[1])
            for kv, cross in zip(self.kv, self.cross_kv, strict=True)
        ]

    def copy_encoder_states(self, other: BartStaticCache, prompts: Tensor | None) -> None:
        """Copy those of a cache of the same width, of prompt prompts[p] for prompt p (None: p)."""
        cross_kv, mask = other.cross_kv, other.cross_mask
        if prompts is not None:
            cross_kv, mask = cross_kv.index_select(2, prompts), mask.index_select(0, prompts)
        self.cross_kv.copy_(cross_kv)
        self.cross_mask.copy_(mask)
        self.padded = self.padded or other.padded

    def clear(self) -> None:
        """Make it as it was when new."""
        super().clear()
        self.cross_kv.zero_()
        self.cross_mask.zero_()


class FastBart(FastModel):
    """The decode step of BART's decoder."""

    def __init__(self, decoder: Any, head: Any) -> None:
        super().__init__(decoder, head)
        config = decoder.config
        kind = type(decoder.layers[0]).__name__
        if kind != "BartDecoderLayer":
            raise UnsupportedError(f"a {kind} is not known")
        self.heads = int(config.decoder_attention_heads)
        self.head_dim = int(config.d_model) // self.heads
        self.act: Activation = activation(config, "activation_function")
        scale = float(getattr(decoder.embed_tokens, "embed_scale", None) or 1.0)
        self.embed_scale = None if scale == 1.0 else scale
        self.positions = decoder.embed_positions.weight.detach()
        self.positions = self.positions[int(decoder.embed_positions.offset) :]
        self.first_norm = norm_weights(decoder.layernorm_embedding)
        self.layers = [_Layer(layer) for layer in decoder.layers]
        self.largest = max(layer.fc1[0].numel() for layer in self.layers)

    def new_cache(self, rows: int, capacity: int, prompts: int, width: int) -> BartStaticCache:
        """See `FastModel`."""
        return BartStaticCache(self, rows, capacity, prompts, width)

    def set_encoder_states(
        self, cache: BartStaticCache, hidden: Tensor, mask: Tensor | None
    ) -> None:
        """Write keys and values of encoder states [prompts, T <= width, D], and their mask."""
        length = hidden.shape[1]
        for layer, (*_, keys, values) in zip(self.layers, cache.layers, strict=True):
            for (weight, bias), into in zip(layer.cross_kv, (keys, values), strict=True):
                found = (hidden @ weight).add_(bias)
                into[:, :, :length].copy_(found.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        cache.padded = cache.padded or mask is not None or length < cache.width
        if cache.padded:
            cache.cross_mask[..., length:] = -math.inf
        if mask is not None:
            cache.cross_mask[..., :length].masked_fill_((mask == 0)[:, None, None], -math.inf)

    def decode_one_token(
        self, cache: BartStaticCache, allowed: range | Tensor | None = None
    ) -> Tensor:
        """See `FastModel`."""
        rows, position = cache.rows, cache.cache_position
        attention = functional.scaled_dot_product_attention
        cross_mask = cache.cross_mask if cache.padded else None
        cache.mask.index_fill_(3, position, 0.0)
        hidden = functional.embedding(cache.tokens, self.embedding)
        if self.embed_scale is not None:
            hidden = hidden * self.embed_scale
        hidden = hidden + self.positions.index_select(0, position)
        hidden = layer_norm(hidden, self.first_norm)
        for layer, (kv, keys, values, cross_keys, cross_values) in zip(
            self.layers, cache.layers, strict=True
        ):
            for (weight, bias), into in zip(layer.qkv, cache.q_k_v, strict=True):
                torch.addmm(bias, hidden, weight, out=into)
            kv.index_copy_(3, position, cache.new_kv)
            attended = attention(cache.query, keys, values, cache.mask)
            hidden = hidden + _linear(attended.reshape(rows, -1), layer.out)
            hidden = layer_norm(hidden, layer.norm)

            weight, bias = layer.cross_q
            torch.addmm(bias, hidden, weight, out=cache.cross_q)
            attended = attention(cache.cross_query, cross_keys, cross_values, cross_mask)
            attended = attended.transpose(1, 2).reshape(rows, -1)
            hidden = layer_norm(hidden + _linear(attended, layer.cross_out), layer.cross_norm)

            wide = self.act(_linear(hidden, layer.fc1))
            hidden = layer_norm(hidden + _linear(wide, layer.fc2), layer.last_norm)
        position.add_(1)
        return project(hidden, self.head, self.head_bias, allowed)


def _with_bias(layer: Any) -> _Linear:
    weight, bias = linear_weights(layer)
    if bias is None:
        raise UnsupportedError("a linear layer has no bias")
    return weight, bias


def _linear(x: Tensor, layer: _Linear) -> Tensor:
    return torch.addmm(layer[1], x, layer[0])


class FastBartDecoder(FastDecoder):
    """Decodes with a `FastBart` about encoder states `hidden` [B, T, D], `mask` [B, T] or None."""

    def __init__(
        self, runner: GraphRunner, hidden: Tensor, mask: Tensor | None, start_token: int
    ) -> None:
        super().__init__(runner, len(hidden))
        #: Dropped once the static cache holds their keys and values.
        self._states: tuple[Tensor, Tensor | None] | None = (hidden, mask)
        #: Prompts whose encoder states the cache holds, and the positions of each.
        self._prompts, self._width = hidden.shape[:2]
        self._start = torch.full_like(self._prompt, start_token)

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        return self.decode(self._start)

    def _prefill_cache(self) -> None:
        self.decode(self._start, range(0))

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """See `Decoder`."""
        if self._reordered_in_place(rows, within):
            return
        self._prompt = self._prompt[rows]
        # As many rows of each prompt, side by side, share its encoder states.
        shared = torch.arange(self._prompts, device=rows.device)
        shared = shared.repeat_interleave(len(rows) // self._prompts)
        if torch.equal(shared, self._prompt):
            self._move(rows)
        else:
            self._move(rows, encoded=self._prompt)
            self._prompt = torch.arange(len(rows), device=rows.device)

    def _move(self, rows: Tensor | None, encoded: Tensor | None = None) -> None:
        """`encoded`: prompt p gets the encoder states of what was prompt encoded[p]."""
        old, length = self._cache, self._length
        count = self._rows if rows is None else len(rows)
        self._prompts = self._prompts if encoded is None else len(encoded)
        cache = self._runner.static_cache(self, count, length + 1, self._prompts, self._width)
        if self._states is not None:
            model: FastBart = self._runner.model  # type: ignore[assignment]
            model.set_encoder_states(cache, *self._states)
            self._states = None
        else:
            kv = old.kv[:, :, : self._rows, :, :length]
            kv = kv if rows is None else kv.index_select(2, rows)
            cache.kv[:, :, :count, :, :length].copy_(kv)
            cache.mask[:count, ..., :length] = 0.0
            cache.copy_encoder_states(old, encoded)
        cache.cache_position.fill_(length)
        self._cache, self._rows = cache, count
