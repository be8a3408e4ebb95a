"""What the generation loop asks of a family: a `Decoder`, a prefilled prompt with its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from librobot_vlm_ros.core import VlmError

#: PromptBatch before each token: why row r must stop, or None.
StopRow = Callable[[int], VlmError | None]
#: Told of new token ids of row r, in order, each once.
TellIds = Callable[[int, list[int]], None]


class Decoder(Protocol):
    """A batch of prompts inside a model. Rows are numbered from 0; logits are [rows, V].

    Logits are the caller's to overwrite, until it asks for the next ones. Where tokens are known
    before they are chosen, an `AppendingDecoder` takes them in together.
    """

    def prefill(self) -> Tensor:
        """Logits of the first token, one row a prompt."""

    def decode(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """Take one token a row (int64 [rows]) and give the logits of the one after it.

        `allowed`: only the logits of these tokens, [rows, len(allowed)]; int64 [n] where they do
        not stand in a row.
        """

    def reorder(self, rows: Tensor, within: bool = False) -> None:
        """Row r goes on from what was row rows[r]; there may be more rows than before, or fewer.

        `within`: as many as before, and each goes on from one of its own prompt. Then the device
        need not be asked about it.
        """


class AppendingDecoder(Decoder, Protocol):
    """One that takes in several tokens at less cost than one by one."""

    def append(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """Take int64 [rows, n] and give the logits behind the last. It may be the first call of
        all: then the tokens stand behind the prompts.
        """


def take_in(
    decoder: Decoder,
    tokens: Sequence[Tensor],
    allowed: range | Tensor | None = None,
    *,
    begun: bool,
) -> Tensor:
    """Logits behind tokens int64 [rows] each; behind the prompts where there are none.

    `begun`: whether the decoder has taken in the prompts.
    """
    if not tokens:
        return decoder.prefill()
    append = getattr(decoder, "append", None)
    if append is not None and (len(tokens) > 1 or not begun):
        logits: Tensor = append(torch.stack(list(tokens), dim=1), allowed)
        return logits
    if not begun:
        decoder.prefill()
    for known in tokens[:-1]:
        decoder.decode(known)
    return decoder.decode(tokens[-1]) if allowed is None else decoder.decode(tokens[-1], allowed)
