"""Decode steps of Llama-like text models as plain arithmetic on the module's own weights.

RMSNorm, rotary positions, grouped attention, gated MLP: Llama, Mistral, Qwen2, Qwen2-VL, Qwen3,
Qwen3-VL and Gemma. For one new token the module spends most of its time between its operations;
here nothing is left but them. An answer goes on from the highest position of its prompt on all
axes alike, so that multimodal rotary embeddings, sectioned or interleaved, are the plain one here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from librobot_vlm_ros.models.generation.causal_decoder import CausalDecoder
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
    linear_weights,
    project,
    weight_of,
)

#: Decoder layers whose arithmetic is known here; True where the norm's weight counts from one.
_LAYERS = {
    "LlamaDecoderLayer": False,
    "MistralDecoderLayer": False,
    "Qwen2DecoderLayer": False,
    "Qwen2VLDecoderLayer": False,
    "Qwen3DecoderLayer": False,
    "Qwen3VLTextDecoderLayer": False,
    "GemmaDecoderLayer": True,
}
#: Kinds of rotary embedding whose frequencies don't depend on the length.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class _Layer:
    """Weights of a layer of `model`; matrices transposed as views, [in, out]."""

    def __init__(self, model: FastLlama, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm = model.norm_weight(layer.input_layernorm)
        self.qkv = [linear_weights(getattr(attention, f"{x}_proj")) for x in "qkv"]
        #: [Hq + Hkv, D] of models that normalise queries and keys.
        self.qk_norm: Tensor | None = None
        if hasattr(attention, "q_norm"):
            q, k = (weight_of(n, None) for n in (attention.q_norm, attention.k_norm))
            self.qk_norm = torch.cat([q.expand(model.heads, -1), k.expand(model.kv_heads, -1)])
        self.out, self.out_bias = linear_weights(attention.o_proj)
        self.mlp_norm = model.norm_weight(layer.post_attention_layernorm)
        mlps = [linear_weights(linear) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        if any(bias is not None for _, bias in mlps):
            raise UnsupportedError("its MLP has a bias")
        self.gate, self.up, self.down = (weight for weight, _ in mlps)


class LlamaStaticCache(StaticCache):
    """Keys and values, rotary tables and the work buffers of a step."""

    def __init__(self, model: FastLlama, rows: int, capacity: int) -> None:
        super().__init__(model, rows, capacity, model.kv_heads)
        options: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        heads, kv_heads, size = model.heads, model.kv_heads, model.head_dim
        #: By cache position [capacity, rows, 1, D]; the sine's first half has its sign turned.
        self.cos = torch.zeros((capacity, rows, 1, size), **options)
        self.sin = torch.zeros_like(self.cos)
        qkv = torch.empty((rows, heads + 2 * kv_heads, size), **options)
        self.q_k_v = qkv.view(rows, -1).split([heads * size, *2 * [kv_heads * size]], dim=1)
        self.qk = qkv[:, : heads + kv_heads]
        #: The halves of each head the other way round, and room for them.
        self.halves = [self.qk[..., size // 2 :], self.qk[..., : size // 2]]
        self.rotated = torch.empty((rows, heads + kv_heads, size), **options)
        # A query that shares its keys with others is a further row of the same attention.
        self.query = qkv[:, :heads].view(rows, kv_heads, heads // kv_heads, size)
        #: The new keys and values as `kv` has them, [2, rows, kv heads, 1, D].
        self.new_kv = qkv[:, heads:].view(rows, 2, kv_heads, 1, size).transpose(0, 1)
        self.layers = [(layer, layer[0], layer[1]) for layer in self.kv]
        self.hidden = torch.empty((rows, model.width), **options)
        self.normed = torch.empty((rows, model.width), **options)
        self.gate = torch.empty((rows, model.inner), **options)
        self.up = torch.empty((rows, model.inner), **options)
        # The hidden states as rows and as columns, and their sum of squares.
        self.row, self.column = self.hidden.unsqueeze(1), self.hidden.unsqueeze(2)
        self.square = torch.empty((rows, 1, 1), **options)
        self.squares = self.square.squeeze(2)


class FastLlama(FastModel):
    """The decode step of a text model with layers named above, without sliding windows."""

    def __init__(self, text_model: Any, head: Any) -> None:
        super().__init__(text_model, head)
        config = text_model.config
        kind = type(text_model.layers[0]).__name__
        if kind not in _LAYERS:
            raise UnsupportedError(f"a {kind} is not known")
        rope = text_model.rotary_emb
        self.inv_freq = rope.inv_freq
        if rope.rope_type == "dynamic":
            # Its frequencies grow with what is longer than the model was made for, and only then.
            self.longest = int(rope.original_max_seq_len) - 1
            self.inv_freq = rope.original_inv_freq
        elif rope.rope_type not in _FIXED_ROPE:
            raise UnsupportedError(f"rotary embedding {rope.rope_type!r} depends on the length")
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
            kind == "MistralDecoderLayer" and config.sliding_window
        ):
            raise UnsupportedError("its attention has a sliding window")
        attention = text_model.layers[0].self_attn
        self.from_one = _LAYERS[kind]
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(attention.head_dim)
        self.scaling = float(attention.scaling)
        self.act: Activation = activation(config, "hidden_act")
        scale = getattr(text_model.embed_tokens, "embed_scale", None)
        self.embed_scale = None if scale is None else scale.to(self.embedding.dtype)
        self.rope_scale = float(rope.attention_scaling)
        self.eps = float(config.rms_norm_eps)
        # In float32 on a CPU a few small operations beat the one that torch offers.
        self.quick = self.dtype == torch.float32 and self.device.type == "cpu"
        self.width, self.inner = int(self.embedding.shape[1]), int(config.intermediate_size)
        self.norm_eps = torch.full((1, 1, 1), self.width * self.eps, device=self.device)
        self.layers = [_Layer(self, layer) for layer in text_model.layers]
        self.norm = self.norm_weight(text_model.norm)
        self.largest = max(layer.gate.numel() for layer in self.layers)

    def norm_weight(self, norm: Any) -> Tensor:
        """The weight of an RMSNorm as `decode_one_token` multiplies with it."""
        weight = weight_of(norm, None)
        # Gemma multiplies before it rounds, with a weight that counts from one.
        weight = 1.0 + weight.float() if self.from_one else weight
        return weight * math.sqrt(weight.shape[0]) if self.quick else weight

    def new_cache(
        self, rows: int, capacity: int, prompts: int = 0, width: int = 0
    ) -> LlamaStaticCache:
        """See `FastModel`."""
        return LlamaStaticCache(self, rows, capacity)

    def set_positions(self, cache: LlamaStaticCache, first: Tensor, length: int) -> None:
        """Give the token at cache position `length` of row r the position first[r].

        `first`: int64 [rows], of the rows in use.
        """
        first = functional.pad(first, (0, cache.rows - len(first)))
        steps = torch.arange(cache.capacity, device=self.device) - length
        angles = (steps[:, None] + first)[:, :, None].float() * self.inv_freq.float()
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        cache.cos.copy_(torch.cat([cos, cos], dim=-1)[:, :, None])
        cache.sin.copy_(torch.cat([-sin, sin], dim=-1)[:, :, None])

    def decode_one_token(
        self, cache: LlamaStaticCache, allowed: range | Tensor | None = None
    ) -> Tensor:
        """See `FastModel`."""
        position = cache.cache_position
        cache.mask.index_fill_(3, position, 0.0)
        cos, sin = cache.cos.index_select(0, position)[0], cache.sin.index_select(0, position)[0]
        hidden, normed, gate, up = cache.hidden, cache.normed, cache.gate, cache.up
        hidden.copy_(functional.embedding(cache.tokens, self.embedding))
        if self.embed_scale is not None:
            hidden.mul_(self.embed_scale)
        for layer, (kv, keys, values) in zip(self.layers, cache.layers, strict=True):
            self._rms_norm(cache, layer.norm)
            for (weight, bias), into in zip(layer.qkv, cache.q_k_v, strict=True):
                if bias is None:
                    torch.mm(normed, weight, out=into)
                else:
                    torch.addmm(bias, normed, weight, out=into)
            if layer.qk_norm is not None:
                self._qk_norm(cache.qk, layer.qk_norm)
            torch.cat(cache.halves, dim=-1, out=cache.rotated)
            cache.qk.mul_(cos).add_(cache.rotated.mul_(sin))
            kv.index_copy_(3, position, cache.new_kv)
            attended = functional.scaled_dot_product_attention(
                cache.query, keys, values, cache.mask, scale=self.scaling
            )
            self._add_linear(hidden, attended.reshape(cache.rows, -1), layer.out, layer.out_bias)
            self._rms_norm(cache, layer.mlp_norm)
            torch.mm(normed, layer.gate, out=gate)
            torch.mm(normed, layer.up, out=up)
            self._add_linear(hidden, self.act(gate).mul_(up), layer.down, None)
        position.add_(1)
        self._rms_norm(cache, self.norm)
        return project(normed, self.head, self.head_bias, allowed)

    def _rms_norm(self, cache: LlamaStaticCache, weight: Tensor) -> None:
        """`cache.normed` from `cache.hidden`."""
        hidden, normed = cache.hidden, cache.normed
        if self.quick:
            torch.baddbmm(self.norm_eps, cache.row, cache.column, out=cache.square)
            cache.square.rsqrt_()
            torch.mul(hidden, cache.squares, out=normed).mul_(weight)
        elif self.from_one:
            normed.copy_(functional.rms_norm(hidden.float(), (self.width,), weight, self.eps))
        else:
            normed.copy_(functional.rms_norm(hidden, (self.width,), weight, self.eps))

    def _qk_norm(self, qk: Tensor, weight: Tensor) -> None:
        """In place, over the last axis, rounded where the module rounds."""
        wide = qk.float()
        scale = (wide * wide).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        if self.dtype == torch.float32:
            qk.mul_(scale).mul_(weight)
        else:
            qk.copy_(wide.mul(scale)).mul_(weight)

    def _add_linear(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """x += y W (+ bias); in half precision rounded where the module rounds."""
        if bias is not None:
            x.add_(torch.addmm(bias, y, weight))
        elif self.dtype == torch.float32:
            x.addmm_(y, weight)
        else:
            x.add_(torch.mm(y, weight))


class FastCausalDecoder(FastDecoder):
    """Prefills through a `CausalDecoder`, then decodes with a `FastLlama`."""

    def __init__(self, runner: GraphRunner, prompts: CausalDecoder) -> None:
        super().__init__(runner, len(prompts.mask))
        #: Dropped once the static cache holds its keys and values.
        self._prompts: CausalDecoder | None = prompts
        #: Of each row: the prompt's mask [rows, T], and the position of the answer's first token.
        self._mask, self._first_position = prompts.mask, prompts.next_position

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        return self._begin().prefill()

    def _prefill_cache(self) -> None:
        self._begin().prefill_hidden()

    def _begin(self) -> CausalDecoder:
        assert self._prompts is not None
        self._length = self._common = self._mask.shape[1]
        return self._prompts

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """See `Decoder`."""
        if not self._reordered_in_place(rows, within):
            self._prompt, self._mask = self._prompt[rows], self._mask[rows]
            self._first_position = self._first_position[rows]
            self._move(rows)

    def _move(self, rows: Tensor | None) -> None:
        count, length = len(self._mask), self._length
        cache = self._runner.static_cache(self, count, length + 1)
        if self._prompts is None:
            layers = self._cache.kv[:, :, : self._rows, :, :length]
        else:
            layers = [(layer.keys, layer.values) for layer in self._prompts.cache.layers]
            self._prompts = None
        for into, old in zip(cache.kv, layers, strict=True):
            for which, part in enumerate(old):
                part = part if rows is None else part.index_select(0, rows)
                into[which, :count, :, :length].copy_(part)
        cache.mask[:count, ..., :length] = 0.0
        padding = (self._mask == 0)[:, None, None]
        cache.mask[:count, ..., : self._common].masked_fill_(padding, -math.inf)
        cache.cache_position.fill_(length)
        model: FastLlama = self._runner.model  # type: ignore[assignment]
        model.set_positions(cache, self._first_position, self._common)
        self._cache, self._rows = cache, count
