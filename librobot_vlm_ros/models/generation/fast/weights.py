"""What the fast path takes from a module: weights as they are, or a refusal that says why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from librobot_vlm_ros.models.configuration import bad_config

_log = logging.getLogger(__name__)

#: "module" takes each step through transformers' module, "functional" through our arithmetic.
DECODERS = ("auto", "module", "functional")

Activation = Callable[[Tensor], Tensor]
#: Weight, bias and epsilon of a LayerNorm.
Norm = tuple[Tensor, Tensor, float]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class UnsupportedError(Exception):
    """The module does something that the fast path does not know; the text says what."""


def make_fast(kind: type[Any], model: Any, head: Any, wanted: str, length: int = 0) -> Any:
    """A `FastLlama` or `FastBart` over a text model's weights; None where its module decodes.

    `wanted`: one of DECODERS. `length`: tokens of the longest prompt and its answer together.
    Raises ModelError BAD_CONFIG when "functional" cannot be.
    """
    if wanted == "module":
        return None
    try:
        if model.training:
            raise UnsupportedError("it is in training mode")
        fast = kind(model, head)
        if fast.longest is not None and length > fast.longest:
            raise UnsupportedError(
                f"its rotary embedding depends on the length beyond {fast.longest} places, "
                f"prompt and answer may take {length}"
            )
        return fast
    except (UnsupportedError, AttributeError) as reason:
        if wanted == "functional":
            raise bad_config(
                f"decoder is 'functional', but {type(model).__name__} cannot be: {reason}",
                "use decoder 'auto' or 'module'",
            ) from reason
        _log.debug("%s decodes through its module: %s", type(model).__name__, reason)
        return None


def weight_of(layer: Any, kind: type[nn.Module] | None) -> Tensor:
    """The weight of a layer without hooks: of this class, of an embedding also a scaled one.

    None: of an RMSNorm, which each family has a class of its own for.
    """
    name = type(layer).__name__
    scaled = isinstance(layer, nn.Embedding) and name.endswith("ScaledWordEmbedding")
    if kind is None and not name.endswith("RMSNorm"):
        raise UnsupportedError(f"a {name} stands in a norm's place")
    if kind is not None and type(layer) is not kind and not (kind is nn.Embedding and scaled):
        raise UnsupportedError(f"a {name} stands in a {kind.__name__}'s place")
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise UnsupportedError(f"a {name} has hooks")
    weight: Tensor = layer.weight.detach()
    if not weight.is_floating_point():
        raise UnsupportedError(f"a {name} is quantised")
    return weight


def linear_weights(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The weight [in, out], as a view, and the bias of a linear layer that is nothing more."""
    weight = weight_of(layer, nn.Linear)
    return weight.t(), None if layer.bias is None else layer.bias.detach()


def norm_weights(layer: Any) -> Norm:
    """Those of a LayerNorm."""
    if type(layer) is not nn.LayerNorm:
        raise UnsupportedError(f"a {type(layer).__name__} stands in a norm's place")
    return layer.weight.detach(), layer.bias.detach(), float(layer.eps)


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm over the last axis."""
    return torch.layer_norm(x, x.shape[-1:], *norm)


def activation(config: Any, field: str) -> Activation:
    """The function that config.json names under `field`."""
    name = getattr(config, field)
    if name not in _ACTIVATIONS:
        raise UnsupportedError(f"activation {name!r} is not known")
    return _ACTIVATIONS[name]


def project(
    hidden: Tensor, head: Tensor, bias: Tensor | None, allowed: range | Tensor | None
) -> Tensor:
    """Logits [rows, V] of `hidden` [rows, D], or of the tokens `allowed` alone."""
    if isinstance(allowed, Tensor):
        # The head is a view: the weights of a token lie side by side.
        head = head.t().index_select(0, allowed).t()
        bias = None if bias is None else bias.index_select(0, allowed)
    elif allowed is not None:
        head = head[:, allowed.start : allowed.stop]
        bias = None if bias is None else bias[allowed.start : allowed.stop]
    return torch.mm(hidden, head) if bias is None else torch.addmm(bias, hidden, head)


def states(weights: Iterable[Tensor]) -> tuple[Any, ...]:
    """Where weights lie, what they are, and how often they were changed.

    What is written through ``.data`` does not count as a change.
    """
    return tuple((w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights)
