"""Static KV caches in a few sizes, and on CUDA a graph of the decode step over each of them.

On a CPU a cache is made for each answer, as large as it asks for. On CUDA they come in powers of
two and are kept, with the graph that was captured over them: replaying it costs one launch where
the step costs hundreds. Where a capture fails, its reason is logged once and the step runs as it
is. (Written against torch 2.11's interface; it has not been run on a GPU yet.)
"""

from __future__ import annotations

import logging
import math
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from librobot_vlm_ros.models.generation.fast.weights import linear_weights, states, weight_of
from librobot_vlm_ros.models.generation.sampler import columns
from librobot_vlm_ros.models.placement import is_light

_log = logging.getLogger(__name__)

#: Caches that are kept on CUDA.
_KEPT = 4
#: Tokens that a cache has room for at least, on CUDA and elsewhere.
_CUDA_CAPACITY, _CAPACITY = 256, 64


class StaticCache:
    """Everything that a decode step writes: `rows` rows with room for `capacity` tokens each.

    Nothing of it is allocated anew during an answer, so that a CUDA graph can be replayed over it.
    """

    def __init__(
        self,
        model: FastModel,
        rows: int,
        capacity: int,
        kv_heads: int,
        prompts: int = 0,
        width: int = 0,
    ) -> None:
        options: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        self.rows, self.capacity, self.prompts, self.width = rows, capacity, prompts, width
        #: [layers, 2, rows, kv heads, capacity, D]; zero where nothing is, for 0 * NaN is NaN.
        self.kv = torch.zeros(
            (len(model.layers), 2, rows, kv_heads, capacity, model.head_dim), **options
        )
        #: Added to the attention scores: 0 where a row attends, else -inf.
        self.mask = torch.full((rows, 1, 1, capacity), -math.inf, **options)
        #: int64 [rows], the tokens to take in.
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=model.device)
        #: int64 [1], where in the cache they go.
        self.cache_position = torch.zeros(1, dtype=torch.int64, device=model.device)
        #: Of `GraphRunner`: a graph over this cache, the logits it writes, and who uses it now.
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.owner: Any = lambda: None

    def clear(self) -> None:
        """Make it as it was when new."""
        self.kv.zero_()
        self.mask.fill_(-math.inf)
        self.cache_position.zero_()


class FastModel(ABC):
    """A text model's decode step as plain arithmetic on its module's own weights.

    Holds views of them. Raises UnsupportedError, with the reason, for what it does not know:
    quantised and adapted layers, hooks, other layers than those of its family.
    """

    #: Tokens of prompt and answer together that it is right for; None means any number.
    longest: int | None = None
    layers: Sequence[Any]
    head_dim: int
    #: Weights of its largest matrix, but for the output layer.
    largest: int

    def __init__(self, text_model: Any, head: Any) -> None:
        self._modules = text_model, head
        self.embedding = weight_of(text_model.embed_tokens, nn.Embedding)
        self.head, self.head_bias = linear_weights(head)
        self.dtype, self.device = self.embedding.dtype, self.embedding.device

    @abstractmethod
    def new_cache(self, rows: int, capacity: int, prompts: int, width: int) -> Any:
        """A static cache; `prompts` x `width` encoder states, 0 x 0 without an encoder."""

    @abstractmethod
    def decode_one_token(self, cache: Any, allowed: range | Tensor | None = None) -> Tensor:
        """Take `cache.tokens` in, one a row; gives the logits [rows, V] of what follows.

        `allowed`: only those columns.
        """

    def weights(self) -> tuple[Any, ...]:
        """Where its weights lie and what they are; equal while a captured graph is valid."""
        return states(weight for module in self._modules for weight in module.parameters())


def bucket(number: int, smallest: int) -> int:
    """The power of two times `smallest` that holds `number`."""
    size = smallest
    while size < number:
        size *= 2
    return size


class GraphRunner:
    """Static caches for a model, and the way to run its decode step over them."""

    def __init__(self, model: FastModel) -> None:
        self.model = model
        self.cuda = model.device.type == "cuda"
        self.light = is_light(model)
        self._kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        #: Why the step is not run as a graph; "" while it is.
        self.refused = "" if self.cuda else "there is no CUDA device"

    def fits(self, model: FastModel) -> bool:
        """Whether graphs captured for this runner's model may be replayed in place of `model`."""
        return self.cuda and model.weights() == self.model.weights()

    def static_cache(
        self, owner: Any, rows: int, capacity: int, prompts: int = 0, width: int = 0
    ) -> Any:
        """A cleared cache for at least that many rows and tokens, `owner`'s alone while it lives.

        `prompts`, `width`: of encoder states; rows are padded only where there are none.
        """
        if not self.cuda:
            room = -(-(capacity + capacity // 4) // _CAPACITY) * _CAPACITY
            return self.model.new_cache(rows, room, prompts, width)
        rows = rows if prompts else bucket(rows, 1)
        key = rows, bucket(capacity, _CUDA_CAPACITY), prompts, -(-width // _CAPACITY) * _CAPACITY
        cache = self._kept.pop(key, None)
        if cache is None or cache.owner() is not None:  # in use, perhaps by the owner itself
            cache = self.model.new_cache(*key)
            self._capture(cache)
        cache.owner = weakref.ref(owner)
        self._kept[key] = cache
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        cache.clear()
        return cache

    def decode_one_token(self, cache: Any, allowed: range | Tensor | None = None) -> Tensor:
        """See `FastModel`."""
        if cache.graph is None:
            return self.model.decode_one_token(cache, allowed)
        cache.graph.replay()
        return columns(cache.logits, allowed)

    def _capture(self, cache: Any) -> None:
        """Record a graph of one step; what it writes meanwhile is cleared after."""
        if self.refused:
            return
        try:
            # Libraries set themselves up in the first runs, which must not be part of the graph.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.model.decode_one_token(cache)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Another thread may bring the next frame to the device meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                cache.logits = self.model.decode_one_token(cache)
            cache.graph = graph
        except Exception as problem:
            self.refused = f"{type(problem).__name__}: {problem}"
            _log.warning("decode steps run without a CUDA graph: %s", self.refused)


class FastDecoder(ABC):
    """An `AppendingDecoder` over a static cache: what the decoders of `llama` and `bart` share."""

    def __init__(self, runner: GraphRunner, rows: int) -> None:
        self._runner = runner
        self._cache: Any = None
        #: Rows of the cache that are in use, and the prompt that each belongs to.
        self._rows = rows
        self._prompt = torch.arange(rows, device=runner.model.device)
        #: Tokens in the cache; the first `_common` of them are the same in all rows of a prompt.
        self._length = self._common = 0

    @property
    def light(self) -> bool:
        """See `placement.threads_for`."""
        return self._runner.light

    def decode(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `Decoder`."""
        if self._cache is None or self._length == self._cache.capacity:
            self._move(None)
        self._cache.tokens[: self._rows].copy_(tokens)
        logits = self._runner.decode_one_token(self._cache, allowed)
        self._length += 1
        return logits[: self._rows]

    def append(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `AppendingDecoder`. One step a token, all but the last without the output layer."""
        if self._length == 0:
            self._prefill_cache()
        for known in tokens[:, :-1].unbind(dim=1):
            self.decode(known, range(0))
        return self.decode(tokens[:, -1], allowed)

    @abstractmethod
    def _prefill_cache(self) -> None:
        """Prefill without logits."""

    @abstractmethod
    def _move(self, rows: Tensor | None) -> None:
        """Move to a new cache with room for one token more; row r goes on from rows[r]."""

    def _reordered_in_place(self, rows: Tensor, within: bool) -> bool:
        """Reorder what was written among the rows of each prompt; False where that won't do."""
        if self._cache is None or len(rows) != self._rows:
            return False
        if not within and not torch.equal(self._prompt[rows], self._prompt):
            return False
        kv = self._cache.kv[..., self._common : self._length, :]
        kv[:, :, : self._rows].copy_(kv.index_select(2, rows))
        return True
