"""DaViT's vision tower as plain arithmetic on its module's own weights, for a CPU.

The module carries each block's result from channels last to channels first and back, and adds what
a convolution could have added; here the channels stay last. The module remains the reference: it
trains, and sees where something is not known here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from librobot_vlm_ros.models.generation.fast.weights import (
    Norm,
    UnsupportedError,
    layer_norm,
    linear_weights,
    norm_weights,
)

_log = logging.getLogger(__name__)


class _Conv:
    """A convolution, its kernels channels last in memory.

    `plus_input`: of one kernel a channel; the block adds the convolution's input to its result,
    which the middle of each kernel does as well.
    """

    def __init__(self, layer: Any, *, plus_input: bool = False) -> None:
        if type(layer) is not nn.Conv2d or layer.dilation != (1, 1) or layer.bias is None:
            raise UnsupportedError(f"a {type(layer).__name__} stands in a convolution's place")
        weight = layer.weight.detach()
        if plus_input:
            weight = weight.clone()
            weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1.0
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.rest = layer.bias.detach(), layer.stride, layer.padding, 1, layer.groups

    def __call__(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to the same with other sizes."""
        found = functional.conv2d(x.permute(0, 3, 1, 2), self.weight, *self.rest)
        return found.permute(0, 2, 3, 1)


class _Linear:
    """x W + b."""

    def __init__(self, layer: Any) -> None:
        weight, self.bias = linear_weights(layer)
        self.weight = weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return functional.linear(x, self.weight, self.bias)


class _Half:
    """Half a block: a convolution, attention in windows or among channels, another, an MLP.

    `attend` takes this half, its normed input and its input, both [B, H, W, C], and gives the
    input plus the attention.
    """

    def __init__(
        self, block: Any, attention: Any, attend: Callable[[_Half, Tensor, Tensor], Tensor]
    ) -> None:
        self.attend = attend
        self.conv1 = _Conv(block.conv1, plus_input=True)
        self.norm = norm_weights(block.norm1)
        self.qkv, self.out = _Linear(attention.qkv), _Linear(attention.proj)
        self.conv2 = _Conv(block.conv2, plus_input=True)
        self.mlp_norm = norm_weights(block.norm2)
        self.fc1, self.fc2 = _Linear(block.ffn.fc1), _Linear(block.ffn.fc2)
        self.heads = int(
            attention.num_heads if hasattr(attention, "num_heads") else attention.groups
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to the same."""
        x = self.conv1(x)
        x = self.attend(self, layer_norm(x, self.norm), x)
        x = self.conv2(x)
        wide = functional.gelu(self.fc1(layer_norm(x, self.mlp_norm)))
        return self.fc2(wide).add_(x)


class FastDavit:
    """The tower [B, 3, H, W] to [B, D, h, w]; holds views of its matrices, copies of its kernels.

    Raises UnsupportedError, with the reason, for what it does not know.
    """

    def __init__(self, tower: Any) -> None:
        config = tower.config
        weights = list(tower.parameters())
        if any(w.device.type != "cpu" or w.dtype != torch.float32 for w in weights):
            raise UnsupportedError("it is for float32 on a CPU")
        if tower.training:
            raise UnsupportedError("it is in training mode")
        if config._attn_implementation != "sdpa" or config.activation_function != "gelu":
            raise UnsupportedError(f"{config._attn_implementation}, {config.activation_function}")
        self._modules = tuple(tower.modules())
        if self.hooked:
            raise UnsupportedError("a module of it has hooks")
        in_windows = partial(_in_windows, int(config.window_size))
        self._stages: list[tuple[Norm, bool, _Conv, list[_Half]]] = []
        for embed, blocks in zip(tower.convs, tower.blocks, strict=True):
            halves = []
            for block in blocks:
                spatial, channel = block.spatial_block, block.channel_block
                halves.append(_Half(spatial, spatial.window_attn, in_windows))
                halves.append(_Half(channel, channel.channel_attn, _among_channels))
            conv = _Conv(embed.conv)
            self._stages.append((norm_weights(embed.norm), bool(embed.pre_norm), conv, halves))

    @property
    def hooked(self) -> bool:
        """Whether a module of the tower has hooks, which are not called here."""
        return any(m._forward_hooks or m._forward_pre_hooks for m in self._modules)

    def __call__(self, pixels: Tensor) -> Tensor:
        """See the class."""
        x = pixels.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        for norm, first, conv, halves in self._stages:
            x = conv(layer_norm(x, norm)) if first else layer_norm(conv(x), norm)
            for half in halves:
                x = half(x)
        return x.permute(0, 3, 1, 2)


def make_fast_davit(tower: Any) -> FastDavit | None:
    """A `FastDavit` over the tower's weights; None where the module itself is to see."""
    try:
        return FastDavit(tower)
    except (UnsupportedError, AttributeError) as reason:
        _log.debug("%s sees through its module: %s", type(tower).__name__, reason)
        return None


def _in_windows(side: int, half: _Half, normed: Tensor, x: Tensor) -> Tensor:
    """x plus attention within each window, `side` long, of `normed`, both [B, H, W, C]."""
    batch, height, width, size = x.shape
    below, right = -height % side, -width % side
    if below or right:
        normed = functional.pad(normed, (0, 0, 0, right, 0, below))
    rows, columns = (height + below) // side, (width + right) // side
    tokens = normed.reshape(batch, rows, side, columns, side, size).transpose(2, 3)
    tokens = tokens.reshape(-1, side * side, size)
    qkv = half.qkv(tokens).view(*tokens.shape[:2], 3, half.heads, -1).permute(2, 0, 3, 1, 4)
    seen = functional.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2)
    seen = seen.reshape(tokens.shape)
    if rows == columns == 1 and not (below or right):  # the window is the whole image
        return half.out(seen).view(x.shape).add_(x)
    found = half.out(seen).view(batch, rows, columns, side, side, size).transpose(2, 3)
    found = found.reshape(batch, height + below, width + right, size)
    return x + found[:, :height, :width]


def _among_channels(half: _Half, normed: Tensor, x: Tensor) -> Tensor:
    """x plus attention among the channels of each group of `normed`, both [B, H, W, C]."""
    batch, height, width, size = x.shape
    count = height * width
    qkv = half.qkv(normed.reshape(batch, count, size)).view(batch, count, 3, half.heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # [B, groups, C / groups, H W]
    shares = torch.matmul(query * count**-0.5, key.transpose(2, 3)).softmax(-1)
    seen = torch.matmul(value.transpose(2, 3), shares.transpose(2, 3))
    seen = seen.transpose(1, 2).reshape(batch, count, size)
    return half.out(seen).view(x.shape).add_(x)
