"""Florence-2's text model as a `Decoder`: the encoder has run, the decoder goes step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.models.choices import columns

__all__ = ["FlorenceDecoder", "encode_prompts"]


def encode_prompts(
    module: Any, features: Sequence[Tensor] | None, embeddings: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Run the encoder over image tokens followed by words.

    `features`: [N, D] of each row's image or None; `embeddings`: [L, D] of each row's words.
    Gives the hidden states [B, T, D] and the mask int64 [B, T], None when no row is padded.
    """
    rows = (
        [torch.cat([image, words]) for image, words in zip(features, embeddings, strict=True)]
        if features is not None
        else list(embeddings)
    )
    mask = None
    if len({row.shape[0] for row in rows}) > 1:
        mask = pad_sequence(
            [torch.ones(row.shape[0], dtype=torch.int64, device=row.device) for row in rows],
            batch_first=True,
        )
    inputs = pad_sequence(rows, batch_first=True)
    encoder = module.model.language_model.encoder
    return encoder(inputs_embeds=inputs, attention_mask=mask).last_hidden_state, mask


class FlorenceDecoder:
    """A `decode.Decoder` over encoder states `hidden` [B, T, D], `mask` [B, T] or None."""

    def __init__(self, module: Any, hidden: Tensor, mask: Tensor | None, start_token: int) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self._decoder = module.model.language_model.decoder
        self._head = module.lm_head
        self._hidden = hidden
        self._mask = mask
        self._start = start_token
        self._begun = False
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        #: Which prompt each row belongs to.
        self._prompt = torch.arange(hidden.shape[0], device=hidden.device)

    def first(self) -> Tensor:
        """See `decode.Decoder`."""
        return self.extend(self._prompt.new_empty((len(self._prompt), 0)))

    def next(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `decode.Decoder`."""
        return self.extend(tokens[:, None], allowed)

    def extend(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `decode.ExtendingDecoder`."""
        if not self._begun:
            start = torch.full_like(self._prompt, self._start)
            tokens, self._begun = torch.cat([start[:, None], tokens], dim=1), True
        output = self._decoder(
            input_ids=tokens,
            encoder_hidden_states=self._hidden,
            encoder_attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = self._head(output.last_hidden_state[:, -1])
        return columns(logits, allowed)

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """See `decode.Decoder`."""
        self._cache.self_attention_cache.reorder_cache(rows)
        # Rows of one prompt see the same encoder states: there is nothing to move among them.
        if within or torch.equal(prompt := self._prompt[rows], self._prompt):
            return
        self._prompt = prompt
        self._cache.cross_attention_cache.reorder_cache(rows)
        self._hidden = self._hidden.index_select(0, rows)
        if self._mask is not None:
            self._mask = self._mask.index_select(0, rows)
