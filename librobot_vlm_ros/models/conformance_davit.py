"""The original arithmetic of Florence-2 at tiny size, written from its sources.

`original_logits` follows modeling_florence2.py of microsoft/Florence-2-large (DaViT as in Ding et
al. 2022, BART as in Lewis et al. 2019): it reads tensors by their official names and knows nothing
of transformers or of our key table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Weights", "original_logits"]

Weights = dict[str, Tensor]

DEPTHS, DIMS, HEADS, WINDOW = (1, 2), (8, 16), (2, 4), 3
D_MODEL, LAYERS, TEXT_HEADS = 24, 2, 3


def _layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _depthwise(w: Weights, name: str, x: Tensor, side: int) -> Tensor:
    batch, _, dim = x.shape
    image = x.transpose(1, 2).reshape(batch, dim, side, side)
    image = F.conv2d(image, w[f"{name}.weight"], w[f"{name}.bias"], padding=1, groups=dim)
    return x + image.flatten(2).transpose(1, 2)


def _window_attention(w: Weights, name: str, x: Tensor, side: int, heads: int) -> Tensor:
    batch, _, dim = x.shape
    x = x.view(batch, side, side, dim)
    rest = (WINDOW - side % WINDOW) % WINDOW
    x = F.pad(x, (0, 0, 0, rest, 0, rest))
    out = torch.zeros_like(x)
    for top in range(0, side + rest, WINDOW):
        for left in range(0, side + rest, WINDOW):
            part = x[:, top : top + WINDOW, left : left + WINDOW].reshape(batch, -1, dim)
            q, k, v = _linear(w, f"{name}.qkv", part).chunk(3, dim=-1)
            pieces = []
            for head in range(heads):
                at = slice(head * dim // heads, (head + 1) * dim // heads)
                scores = q[..., at] @ k[..., at].transpose(1, 2) * (dim // heads) ** -0.5
                pieces.append(scores.softmax(-1) @ v[..., at])
            seen = _linear(w, f"{name}.proj", torch.cat(pieces, -1))
            out[:, top : top + WINDOW, left : left + WINDOW] = seen.view(batch, WINDOW, WINDOW, dim)
    return out[:, :side, :side].reshape(batch, -1, dim)


def _channel_attention(w: Weights, name: str, x: Tensor, groups: int) -> Tensor:
    _, tokens, dim = x.shape
    q, k, v = _linear(w, f"{name}.qkv", x).chunk(3, dim=-1)
    pieces = []
    for group in range(groups):
        at = slice(group * dim // groups, (group + 1) * dim // groups)
        scores = (q[..., at] * tokens**-0.5).transpose(1, 2) @ k[..., at]
        pieces.append((scores.softmax(-1) @ v[..., at].transpose(1, 2)).transpose(1, 2))
    return _linear(w, f"{name}.proj", torch.cat(pieces, -1))


def _davit(w: Weights, pixels: Tensor) -> Tensor:
    x, side = pixels, pixels.shape[-1]
    for stage in range(len(DIMS)):
        conv = f"vision_tower.convs.{stage}"
        if stage > 0:  # prenorm
            x = _layer_norm(w, f"{conv}.norm", x).transpose(1, 2).reshape(len(x), -1, side, side)
        stride, padding = (4, 3) if stage == 0 else (2, 1)
        x = F.conv2d(x, w[f"{conv}.proj.weight"], w[f"{conv}.proj.bias"], stride, padding)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        if stage == 0:
            x = _layer_norm(w, f"{conv}.norm", x)
        for depth in range(DEPTHS[stage]):
            for kind in ("spatial_block", "channel_block"):
                base = f"vision_tower.blocks.{stage}.{depth}.{kind}"
                x = _depthwise(w, f"{base}.conv1.fn.dw", x, side)
                if kind == "spatial_block":
                    seen = _layer_norm(w, f"{base}.window_attn.norm", x)
                    x = x + _window_attention(w, f"{base}.window_attn.fn", seen, side, HEADS[stage])
                else:
                    seen = _layer_norm(w, f"{base}.channel_attn.norm", x)
                    x = x + _channel_attention(w, f"{base}.channel_attn.fn", seen, HEADS[stage])
                x = _depthwise(w, f"{base}.conv2.fn.dw", x, side)
                seen = _layer_norm(w, f"{base}.ffn.norm", x)
                wide = F.gelu(_linear(w, f"{base}.ffn.fn.net.fc1", seen))
                x = x + _linear(w, f"{base}.ffn.fn.net.fc2", wide)
    return x


def _image_features(w: Weights, pixels: Tensor) -> Tensor:
    x = _davit(w, pixels)
    side = math.isqrt(x.shape[1])
    columns = w["image_pos_embed.column_embeddings.weight"][:side]
    rows = w["image_pos_embed.row_embeddings.weight"][:side]
    position = torch.cat(
        [columns[None].expand(side, -1, -1), rows[:, None].expand(-1, side, -1)], dim=-1
    )
    x = x + position.reshape(side * side, -1)
    x = x + w["visual_temporal_embed.pos_idx_to_embed"][0]  # one frame in time
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
    return _layer_norm(w, "image_proj_norm", x @ w["image_projection"])


def _bart_attention(w: Weights, name: str, x: Tensor, seen: Tensor, *, causal: bool) -> Tensor:
    q = _linear(w, f"{name}.q_proj", x) * (D_MODEL // TEXT_HEADS) ** -0.5
    k, v = _linear(w, f"{name}.k_proj", seen), _linear(w, f"{name}.v_proj", seen)
    pieces = []
    for head in range(TEXT_HEADS):
        at = slice(head * D_MODEL // TEXT_HEADS, (head + 1) * D_MODEL // TEXT_HEADS)
        scores = q[..., at] @ k[..., at].transpose(1, 2)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        pieces.append(scores.softmax(-1) @ v[..., at])
    return _linear(w, f"{name}.out_proj", torch.cat(pieces, -1))


def _bart_side(w: Weights, side: str, x: Tensor, memory: Tensor | None) -> Tensor:
    base = f"language_model.model.{side}"
    # BART's table of positions begins with two rows that are never used.
    x = x + w[f"{base}.embed_positions.weight"][2 : 2 + x.shape[1]]
    x = _layer_norm(w, f"{base}.layernorm_embedding", x)
    for layer in range(LAYERS):
        name = f"{base}.layers.{layer}"
        seen = _bart_attention(w, f"{name}.self_attn", x, x, causal=memory is not None)
        x = _layer_norm(w, f"{name}.self_attn_layer_norm", x + seen)
        if memory is not None:
            seen = _bart_attention(w, f"{name}.encoder_attn", x, memory, causal=False)
            x = _layer_norm(w, f"{name}.encoder_attn_layer_norm", x + seen)
        wide = F.gelu(_linear(w, f"{name}.fc1", x))
        x = _layer_norm(w, f"{name}.final_layer_norm", x + _linear(w, f"{name}.fc2", wide))
    return x


def original_logits(w: Weights, pixels: Tensor, words: Tensor, answer: Tensor) -> Tensor:
    """Logits [B, L, V] of `answer` [B, L] for pixels [B, 3, H, W] and `words` [B, T]."""
    table = w["language_model.model.shared.weight"]
    memory = _bart_side(
        w, "encoder", torch.cat([_image_features(w, pixels), table[words]], dim=1), None
    )
    hidden = _bart_side(w, "decoder", table[answer], memory)
    return hidden @ table.T + w["language_model.final_logits_bias"]
