"""One decode step of a Llama-like text model as plain arithmetic on its module's own weights.

RMSNorm, rotary positions, grouped attention, gated MLP: Llama, Mistral, Qwen2, Qwen2-VL, Qwen3,
Qwen3-VL and Gemma. For one new token the time of the module is mostly spent between its
operations; here nothing is left but them. Every weight is read where the module has it. An answer
goes on from the highest place of its prompt on all axes alike, so that the multimodal rotary
embeddings, sectioned or interleaved, are here the plain one.
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

__all__ = ["LlamaBuffers", "LlamaStep"]

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


@dataclass(frozen=True)
class _Layer:
    """Weights of a layer; matrices transposed as views, [in, out]."""

    norm: Tensor
    qkv: tuple[tuple[Tensor, Tensor | None], ...]
    #: [Hq + Hkv, D] of models that normalise queries and keys.
    qk_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class LlamaBuffers:
    """Everything a step writes, for `rows` rows with room for `capacity` tokens each.

    Nothing of it is made anew during an answer, so that a CUDA graph can be replayed over it.
    """

    def __init__(self, step: LlamaStep, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        options: dict[str, Any] = {"dtype": step.dtype, "device": step.device}
        heads, kv_heads, size = step.heads, step.kv_heads, step.head_dim
        #: [layers, 2, rows, kv heads, capacity, D]; zero where nothing is, for 0 * NaN is NaN.
        self.kv = torch.zeros((len(step.layers), 2, rows, kv_heads, capacity, size), **options)
        #: Added to the attention's scores: 0 where a row looks, else -inf.
        self.mask = torch.full((rows, 1, 1, capacity), -math.inf, **options)
        #: By slot [capacity, rows, 1, D]; the sine's first half has its sign turned.
        self.cos = torch.zeros((capacity, rows, 1, size), **options)
        self.sin = torch.zeros_like(self.cos)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=step.device)
        #: Of `StepPool`: a graph over these buffers, what it writes, and who uses them now.
        self.graph: Any = None
        self.logits: Any = None
        self.owner: Any = lambda: None
        #: Where the next token goes.
        self.slot = torch.zeros(1, dtype=torch.int64, device=step.device)
        qkv = torch.empty((rows, heads + 2 * kv_heads, size), **options)
        flat = qkv.view(rows, -1)
        ends = [heads * size, (heads + kv_heads) * size, (heads + 2 * kv_heads) * size]
        self.q_k_v = flat[:, : ends[0]], flat[:, ends[0] : ends[1]], flat[:, ends[1] :]
        self.qk = qkv[:, : heads + kv_heads]
        #: The halves of each head the other way round, and room for them.
        self.swapped = [self.qk[..., size // 2 :], self.qk[..., : size // 2]]
        self.turned = torch.empty((rows, heads + kv_heads, size), **options)
        # A query that shares its keys with others is a further row of the same attention.
        self.query = qkv[:, :heads].view(rows, kv_heads, heads // kv_heads, size)
        #: The new keys and values as the cache has them, [2, rows, kv heads, 1, D].
        new = qkv[:, heads:].view(rows, 2, kv_heads, 1, size)
        self.new_kv = new.transpose(0, 1)
        self.layers = [(layer, layer[0], layer[1]) for layer in self.kv]
        self.hidden = torch.empty((rows, step.width), **options)
        self.normed = torch.empty((rows, step.width), **options)
        self.gate = torch.empty((rows, step.inner), **options)
        self.up = torch.empty((rows, step.inner), **options)
        # The hidden states as rows and as columns, and their squares.
        self.row, self.column = self.hidden.unsqueeze(1), self.hidden.unsqueeze(2)
        self.square = torch.empty((rows, 1, 1), **options)
        self.squares = self.square.squeeze(2)

    def clear(self) -> None:
        """As they were when made."""
        self.kv.zero_()
        self.mask.fill_(-math.inf)
        self.slot.zero_()


class LlamaStep:
    """The arithmetic of a text model and its head; holds views of their weights.

    Raises UnsupportedError, with the reason, for what it does not know: quantised and adapted
    layers, hooks, sliding windows, other layers than those named above.
    """

    #: Places of prompt and answer together that it is right for; None means any number.
    longest: int | None = None

    def __init__(self, text_model: Any, head: Any) -> None:
        config = text_model.config
        self._modules = text_model, head
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
        self.embedding = weight_of(text_model.embed_tokens, nn.Embedding)
        scale = getattr(text_model.embed_tokens, "embed_scale", None)
        self.embed_scale = None if scale is None else scale.to(self.embedding.dtype)
        self.head, self.head_bias = plain(head)
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.rope_scale = float(rope.attention_scaling)
        self.eps = float(config.rms_norm_eps)
        # In float32 on a CPU a few small operations beat the one that torch offers.
        self.quick = self.dtype == torch.float32 and self.device.type == "cpu"
        self.width, self.inner = int(self.embedding.shape[1]), int(config.intermediate_size)
        self.norm_eps = torch.full((1, 1, 1), self.width * self.eps, device=self.device)
        self.layers = [self._layer(layer) for layer in text_model.layers]
        self.norm = self._norm_weight(text_model.norm)
        #: Weights of its largest matrix, but for the head.
        self.largest = max(layer.gate.numel() for layer in self.layers)

    def _norm_weight(self, norm: Any) -> Tensor:
        weight = weight_of(norm, None)
        # Gemma multiplies before it rounds, with a weight that counts from one.
        weight = 1.0 + weight.float() if self.from_one else weight
        return weight * math.sqrt(weight.shape[0]) if self.quick else weight

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qk_norm = None
        if hasattr(attention, "q_norm"):
            q, k = (weight_of(n, None) for n in (attention.q_norm, attention.k_norm))
            counts = (self.heads, self.kv_heads)
            qk_norm = torch.cat([w.expand(n, -1) for w, n in zip((q, k), counts, strict=True)])
        out, out_bias = plain(attention.o_proj)
        rest = [plain(linear) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        if any(bias is not None for _, bias in rest):
            raise UnsupportedError("its MLP has a bias")
        return _Layer(
            norm=self._norm_weight(layer.input_layernorm),
            qkv=tuple(plain(getattr(attention, f"{x}_proj")) for x in "qkv"),
            qk_norm=qk_norm,
            out=out,
            out_bias=out_bias,
            mlp_norm=self._norm_weight(layer.post_attention_layernorm),
            gate=rest[0][0],
            up=rest[1][0],
            down=rest[2][0],
        )

    def buffers(self, rows: int, capacity: int) -> LlamaBuffers:
        """Room for a batch."""
        return LlamaBuffers(self, rows, capacity)

    def place(self, buffers: LlamaBuffers, first: Tensor, length: int) -> None:
        """The token in slot `length` of row r has the position first[r] (int64 [rows])."""
        slots = torch.arange(buffers.capacity, device=self.device) - length
        angles = (slots[:, None] + first)[:, :, None].float() * self.inv_freq.float()
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        buffers.cos.copy_(torch.cat([cos, cos], dim=-1)[:, :, None])
        buffers.sin.copy_(torch.cat([-sin, sin], dim=-1)[:, :, None])

    def weights(self) -> tuple[Any, ...]:
        """Where its weights lie and what they are; equal while a captured graph is valid."""
        return addresses(*self._modules)

    def __call__(self, buffers: LlamaBuffers, allowed: range | Tensor | None = None) -> Tensor:
        """Take `buffers.tokens` in, one a row; gives the logits [rows, V] of what follows.

        `allowed`: only those columns.
        """
        rows, slot = buffers.rows, buffers.slot
        buffers.mask.index_fill_(3, slot, 0.0)
        cos, sin = buffers.cos.index_select(0, slot)[0], buffers.sin.index_select(0, slot)[0]
        hidden, normed, gate, up = buffers.hidden, buffers.normed, buffers.gate, buffers.up
        hidden.copy_(functional.embedding(buffers.tokens, self.embedding))
        if self.embed_scale is not None:
            hidden.mul_(self.embed_scale)
        qk, turned, new = buffers.qk, buffers.turned, buffers.new_kv
        for layer, (both, keys, values) in zip(self.layers, buffers.layers, strict=True):
            self._normalise(buffers, layer.norm)
            for (weight, bias), into in zip(layer.qkv, buffers.q_k_v, strict=True):
                if bias is None:
                    torch.mm(normed, weight, out=into)
                else:
                    torch.addmm(bias, normed, weight, out=into)
            if layer.qk_norm is not None:
                self._norm_heads(qk, layer.qk_norm)
            torch.cat(buffers.swapped, dim=-1, out=turned)
            qk.mul_(cos).add_(turned.mul_(sin))
            both.index_copy_(3, slot, new)
            seen = functional.scaled_dot_product_attention(
                buffers.query, keys, values, buffers.mask, scale=self.scaling
            )
            self._add(hidden, seen.reshape(rows, -1), layer.out, layer.out_bias)
            self._normalise(buffers, layer.mlp_norm)
            torch.mm(normed, layer.gate, out=gate)
            torch.mm(normed, layer.up, out=up)
            self._add(hidden, self.act(gate).mul_(up), layer.down, None)
        slot.add_(1)
        self._normalise(buffers, self.norm)
        return project(normed, self.head, self.head_bias, allowed)

    def _normalise(self, buffers: LlamaBuffers, weight: Tensor) -> None:
        """`buffers.normed` from `buffers.hidden`."""
        hidden, normed = buffers.hidden, buffers.normed
        if self.quick:
            torch.baddbmm(self.norm_eps, buffers.row, buffers.column, out=buffers.square)
            buffers.square.rsqrt_()
            torch.mul(hidden, buffers.squares, out=normed).mul_(weight)
        elif self.from_one:
            wide = functional.rms_norm(hidden.float(), (self.width,), weight, self.eps)
            normed.copy_(wide)
        else:
            normed.copy_(functional.rms_norm(hidden, (self.width,), weight, self.eps))

    def _norm_heads(self, qk: Tensor, weight: Tensor) -> None:
        """In place, over the last axis, rounded where the module rounds."""
        wide = qk.float()
        scale = (wide * wide).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        if self.dtype == torch.float32:
            qk.mul_(scale).mul_(weight)
        else:
            qk.copy_(wide.mul(scale)).mul_(weight)

    def _add(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """x += y W (+ bias); in half precision rounded where the module rounds."""
        if bias is not None:
            x.add_(torch.addmm(bias, y, weight))
        elif self.dtype == torch.float32:
            x.addmm_(y, weight)
        else:
            x.add_(torch.mm(y, weight))
