"""What the tiny checkpoints of several families, and their original arithmetic, have alike.

Plain formulas on tensors by their published names; nothing here knows of transformers or of the
package's own models. T is the length of a row, d the size of a head.
"""

from __future__ import annotations

import io
import json
import math
import string
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

#: What the tokenizers of single letters can write.
LETTERS = "▁\n" + string.ascii_letters + string.digits + string.punctuation
#: Tensors by their published names.
State = dict[str, Tensor]


class RandomWeights:
    """Makes tensors one after the other, the same ones at each run."""

    def __init__(self, seed: int, scale: float = 0.2) -> None:
        self.state: State = {}
        self._random, self._scale = torch.Generator().manual_seed(seed), scale

    def normal(self, *size: int) -> Tensor:
        """Normally distributed values."""
        return torch.randn(size, generator=self._random) * self._scale

    def add(self, name: str, *size: int, scale: float = 1.0) -> None:
        """A tensor by itself."""
        self.state[name] = self.normal(*size) * scale

    def linear(self, name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        """Weight [rows, columns] and bias [rows]."""
        self.add(f"{name}.weight", rows, columns)
        if bias:
            self.add(f"{name}.bias", rows)

    def norm(self, name: str, size: int, *, bias: bool = True, around: float = 1.0) -> None:
        """Scale and shift of a norm; `around` 0 where the formula adds 1 to the scale."""
        self.state[f"{name}.weight"] = around + self.normal(size)
        if bias:
            self.add(f"{name}.bias", size)

    def encoder_layer(self, at: str, width: int, inner: int) -> None:
        """A layer of CLIP or SigLIP, see `encoder_layer`."""
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.linear(f"{at}self_attn.{name}", width, width)
        self.linear(f"{at}mlp.fc1", inner, width)
        self.linear(f"{at}mlp.fc2", width, inner)
        self.norm(f"{at}layer_norm1", width)
        self.norm(f"{at}layer_norm2", width)

    def decoder_layer(
        self,
        at: str,
        hidden: int,
        inner: int,
        queries: int,
        keys: int,
        *,
        bias: bool = False,
        around: float = 1.0,
    ) -> None:
        """A layer of Llama, Gemma or Qwen, see `decoder_layer`; `queries` and `keys` are rows."""
        self.linear(f"{at}self_attn.q_proj", queries, hidden, bias=bias)
        self.linear(f"{at}self_attn.k_proj", keys, hidden, bias=bias)
        self.linear(f"{at}self_attn.v_proj", keys, hidden, bias=bias)
        self.linear(f"{at}self_attn.o_proj", hidden, queries, bias=False)
        self.linear(f"{at}mlp.gate_proj", inner, hidden, bias=False)
        self.linear(f"{at}mlp.up_proj", inner, hidden, bias=False)
        self.linear(f"{at}mlp.down_proj", hidden, inner, bias=False)
        self.norm(f"{at}input_layernorm", hidden, bias=False, around=around)
        self.norm(f"{at}post_attention_layernorm", hidden, bias=False, around=around)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """x W^T + b, where there is a b."""
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def layer_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    """Mean 0 and spread 1 along the last axis, then the learnt scale and shift."""
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def rms_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    """Root mean square 1 along the last axis, then the learnt scale."""
    return F.rms_norm(x, x.shape[-1:], state[f"{name}.weight"], eps)


gelu: Callable[[Tensor], Tensor] = F.gelu
gelu_tanh: Callable[[Tensor], Tensor] = partial(F.gelu, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of `gelu` by a sigmoid."""
    return x * torch.sigmoid(1.702 * x)


def heads(x: Tensor, count: int) -> Tensor:
    """[..., T, count * d] to [..., count, T, d]."""
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


def causal_mask(length: int) -> Tensor:
    """[T, T] to add to scores: minus infinity where a place would see a later one."""
    return torch.full((length, length), -math.inf).triu(1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[..., heads, T, d] to [..., T, heads * d]; groups of queries may share a key and a value."""
    k, v = (part.repeat_interleave(q.shape[-3] // part.shape[-3], dim=-3) for part in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def rotary_angles(length: int, size: int, theta: float = 10000.0) -> Tensor:
    """Angles [T, d / 2] of positions 0, 1, ..."""
    return torch.arange(length)[:, None] * theta ** (-torch.arange(0, size, 2) / size)


def rotary(x: Tensor, angles: Tensor) -> Tensor:
    """[heads, T, d] turned by `angles` [T, d / 2]: pairs (i, i + d / 2) as complex numbers."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def patches(image: Tensor, kernel: Tensor) -> Tensor:
    """[3, H, W] and a convolution's kernel [D, 3, side, side] to vectors [N, D], row by row."""
    cells = F.conv2d(image[None], kernel, stride=kernel.shape[-1])
    return cells[0].flatten(1).T


def encoder_layer(
    state: State,
    at: str,
    x: Tensor,
    count: int,
    eps: float,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """A layer of CLIP (Radford et al. 2021) or SigLIP (Zhai et al. 2023) on [T, D]."""
    y = layer_norm(state, f"{at}layer_norm1", x, eps)
    q, k, v = (heads(linear(state, f"{at}self_attn.{n}_proj", y), count) for n in "qkv")
    x = x + linear(state, f"{at}self_attn.out_proj", attention(q, k, v))
    y = layer_norm(state, f"{at}layer_norm2", x, eps)
    return x + linear(state, f"{at}mlp.fc2", activation(linear(state, f"{at}mlp.fc1", y)))


def decoder_layer(
    state: State,
    at: str,
    x: Tensor,
    angles: Tensor,
    mask: Tensor,
    norm: Callable[[State, str, Tensor], Tensor],
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """A layer of Llama (Touvron et al. 2023), Gemma or Qwen on [T, D]."""
    y, size = norm(state, f"{at}input_layernorm", x), 2 * angles.shape[-1]
    q, k, v = (linear(state, f"{at}self_attn.{n}_proj", y) for n in "qkv")
    q, k, v = (heads(part, part.shape[-1] // size) for part in (q, k, v))
    if f"{at}self_attn.q_norm.weight" in state:
        q = norm(state, f"{at}self_attn.q_norm", q)
        k = norm(state, f"{at}self_attn.k_norm", k)
    mixed = attention(rotary(q, angles), rotary(k, angles), v, mask)
    x = x + linear(state, f"{at}self_attn.o_proj", mixed)
    y = norm(state, f"{at}post_attention_layernorm", x)
    gate = activation(linear(state, f"{at}mlp.gate_proj", y))
    return x + linear(state, f"{at}mlp.down_proj", gate * linear(state, f"{at}mlp.up_proj", y))


def letter_tokenizer(first: Sequence[str], special: Iterable[str]) -> Any:
    """A `tokenizers.Tokenizer` of the tokens `first`, single letters, and `special` behind them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    names = [*first, *LETTERS]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, [], unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return made


def pieces(sentences: Sequence[str], size: int, **options: Any) -> bytes:
    """A sentencepiece file like Llama's: a few merges, bytes for the rest."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
        **options,
    )
    return model.getvalue()


def official_config(name: str) -> dict[str, Any]:
    """``configs/<name>.json``: a published config.json with small numbers in it, without what
    follows from the tokenizer.
    """
    path = Path(__file__).parent / "configs" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_json(folder: Path, **files: Any) -> None:
    """Write each as a file of that name with .json behind it."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def write_shards(
    folder: Path, state: State, names: Sequence[str], save: Callable[[State, Path], None]
) -> dict[str, Any]:
    """Deal the tensors out to files of these names; gives the content of their index."""
    keys = sorted(state)
    shards = {name: keys[place :: len(names)] for place, name in enumerate(names)}
    for name, part in shards.items():
        save({key: state[key] for key in part}, folder / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    return {"metadata": {}, "weight_map": weight_map}


def reference_pixels(processor: Any, image: npt.NDArray[np.uint8]) -> Tensor:
    """What a processor of transformers makes of an image [H, W, 3]."""
    from PIL import Image

    found = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    return torch.as_tensor(found)
