"""Runs a model's decode steps: through transformers' module, or through arithmetic of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.generation.config import Generated, GenerationConfig
from librobot_vlm_ros.models.generation.decoder import Decoder
from librobot_vlm_ros.models.generation.fast.graph_runner import GraphRunner
from librobot_vlm_ros.models.generation.fast.weights import DECODERS, make_fast
from librobot_vlm_ros.models.generation.loop import generate


class Generator:
    """What a model decodes with.

    `kind`: "module" takes each step of an answer through transformers' module, "functional" through
    the functional steps over its weights (`fast`), "auto" through those where they can. Raises
    ModelError BAD_CONFIG for another.
    """

    def __init__(self, kind: str = "auto") -> None:
        if kind not in DECODERS:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"there is no decoder {kind!r}",
                f"use one of: {', '.join(DECODERS)}",
            )
        self.kind = kind
        #: On CUDA: buffers and graphs that are kept from answer to answer.
        self.pool: GraphRunner | None = None

    def steps(self, kind: type[Any], text_model: Any, head: Any, length: int = 0) -> Any:
        """Steps over the weights as they are now; None where the module is to take them.

        `length`: places of the longest prompt and its answer together. On CUDA graphs over buffers
        are kept from answer to answer, as long as the weights stay in place.
        """
        step = make_fast(kind, text_model, head, self.kind, length)
        if step is None:
            return None
        if self.pool is None or not self.pool.fits(step):
            pool = GraphRunner(step)
            self.pool = pool if pool.cuda else None
            return pool
        return self.pool

    def clear(self) -> None:
        """Give back what is only kept to be quick."""
        self.pool = None

    def token_ids(
        self, decoder: Decoder, config: GenerationConfig, history: Tensor, seed: int | None
    ) -> Tensor:
        """Token ids int64 [B, L] of the answers, padded at the end; each row samples from a seed of
        its own. Raises InferenceError NAN_LOGITS.
        """
        seeds = [None if seed is None else seed + row for row in range(len(history))]
        generated: Sequence[Any] = generate(decoder, config, history, seeds=seeds)
        ids = [torch.tensor(row.ids) for row in generated if isinstance(row, Generated)]
        padded: Tensor = pad_sequence(ids, batch_first=True, padding_value=config.pad)
        return padded.to(history.device)
