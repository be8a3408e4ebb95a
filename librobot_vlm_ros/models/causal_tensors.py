"""Models that continue a row of image vectors and words, as tensors in and tensors out.

Encoding, forward with a loss, generate: what is the same for all such families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import (
    ErrorCode,
    GenerationParams,
    RequestError,
)
from librobot_vlm_ros.models.answering import again_in_safer_dtype
from librobot_vlm_ros.models.causal_decoder import (
    CausalDecoder,
    deep_inputs,
    embed_row,
    pad_places,
    pad_rows,
    weave,
)
from librobot_vlm_ros.models.causal_images import Seen
from librobot_vlm_ros.models.causal_tokenizer import CausalTokenizer
from librobot_vlm_ros.models.causal_words import CausalWords
from librobot_vlm_ros.models.decode import Decoder
from librobot_vlm_ros.models.frame_cache import FrameEntry
from librobot_vlm_ros.models.prefix_cache import PrefixCache
from librobot_vlm_ros.models.prefix_reading import Asked, read_behind
from librobot_vlm_ros.models.step_decoder import CausalStepDecoder
from librobot_vlm_ros.models.step_llama import LlamaStep
from librobot_vlm_ros.models.token_rows import IGNORED

__all__ = ["CausalParts", "CausalTensors"]


@dataclass(frozen=True)
class CausalParts:
    """Everything that such a model is made of."""

    module: Any
    #: How an image is prepared: `ImageSettings`, or a class of the family's own.
    images: Any
    tokenizer: CausalTokenizer | None = None


class CausalTensors(CausalWords):
    """The learner's side of such a model; `CausalVLM` adds the robot's.

    The transformers model has `.model.language_model`, `.model.vision_tower` and `.lm_head`.
    """

    #: Tokens of an answer where a request does not say.
    default_new_tokens = 512
    #: Number of the first position.
    first_place = 0
    #: Whether every place of a prompt sees all of it, and only the answer is read in order.
    prefix_attention = False
    #: Whether the image stands in front of the begin token, too.
    image_leads = False

    def _take(self, parts: CausalParts) -> None:
        self.module, self._pool = parts.module, None
        self.images = parts.images
        self.tokenizer = parts.tokenizer
        self.config = parts.module.config
        self.prefixes = PrefixCache()

    # What a family fills in.

    def _order(self, row: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Where each place of a row comes from (see `weave`)."""
        text = self.config.text_config
        begin = None if self.image_leads else getattr(text, "bos_token_id", None)
        return weave(row, counts, self.config.image_token_id, begin)

    def _places(self, order: Sequence[int], seen: Seen | None) -> Tensor | None:
        """Numbers of a row's places, int64 [T, A] for A axes; None counts 0, 1, 2 ...

        The answer goes on from the highest.
        """
        return None

    # The learner's side.

    def encode_text(self, text: Any) -> Tensor:
        """The language model's last states of words alone, [B, T, D], padded at the end."""
        hidden, _ = self._read_rows(None, self._ids(text, None, None))
        return hidden

    def forward(
        self,
        images: Any = None,
        text: Sequence[str] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """The language model over image and words; T is the length with the image's vectors.

        `text`: questions; or `input_ids` int64 [B, L] with `attention_mask`. The image stands where
        the ids have its token, or in front. `labels` int64 [B, L]: the ids to learn, each predicted
        from those before it; -100 is not learnt, and the image never is. Tokens that are no words
        have no part in the loss.
        """
        source = text if text is not None else input_ids
        if text is not None and labels is not None:
            raise RequestError(ErrorCode.BAD_PARAMETER, "labels go with input_ids, not with text")
        if labels is not None and (input_ids is None or labels.shape != input_ids.shape):
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"labels are {list(labels.shape)}, expected the shape of input_ids",
            )
        seen = self._seen(images) if images is not None else None
        rows = self._ids(source, attention_mask, _views(seen))
        learnt = None if labels is None else self._kept(labels, attention_mask, (IGNORED,))
        hidden, orders = self._read_rows(seen, rows, learnt)
        logits = self._loaded().lm_head(hidden)
        result = {"embeddings": hidden, "logits": logits}
        if learnt is not None:
            targets = [
                torch.tensor([row[i] if i >= 0 else -100 for i in order])
                for row, order in zip(learnt, orders, strict=True)
            ]
            wanted = pad_sequence(targets, batch_first=True, padding_value=-100)[:, 1:]
            words = logits[:, :-1].float()
            unused = torch.tensor(self._suppressed(), device=words.device)
            words = words.index_fill(2, unused, torch.finfo(words.dtype).min)
            result["loss"] = functional.cross_entropy(
                words.flatten(0, 1), wanted.flatten().to(words.device), ignore_index=-100
            )
        return result

    @again_in_safer_dtype
    def generate(  # type: ignore[override]
        self,
        images: Any = None,
        input_ids: Any = None,
        *,
        text: Any = None,
        task: str | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Answers as token ids int64 [B, L], padded at the end; `decode_text` makes words of them.

        `input_ids` (tensor [B, L] taken as it is, or strings) or `text`: strings are questions, put
        into the family's chat; with a `task` into its sentence.
        """
        rules = self.rules(GenerationParams(max_new_tokens, num_beams, temperature, top_p, seed))
        words = text if text is not None else input_ids
        with self._answering():
            seen = self._seen(images) if images is not None else None
            if task is not None:
                rows = self._task_ids(task, words, _views(seen) or [1])
            else:
                rows = self._ids(words, attention_mask, _views(seen))
            decoder, history = self._start(seen, rows, new_tokens=rules.max_new_tokens)
            return self._written(decoder, history, rules, seed)

    def get_embedding_dim(self) -> int:
        """D of image features and text features alike."""
        return int(self.config.text_config.hidden_size)

    @property
    def vision_encoder(self) -> nn.Module:
        """The tower, without the projection."""
        tower: nn.Module = self._loaded().model.vision_tower
        return tower

    @property
    def language_model(self) -> nn.Module:
        """The layers that read and write; the output layer stands beside it."""
        model: nn.Module = self._loaded().model.language_model
        return model

    def freeze_language(self) -> None:
        """Keep the language model and its output layer as they are."""
        super().freeze_language()
        self._loaded().lm_head.requires_grad_(False)

    # Inside.

    def _rows(
        self, seen: Sequence[Seen] | None, rows: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[list[int]]]:
        """Vectors [T, D] of each row, and where each comes from (see `weave`)."""
        if seen is not None and len(seen) != len(rows):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, f"{len(seen)} images for {len(rows)} prompts"
            )
        table = self._loaded().get_input_embeddings()
        found: list[Seen | None] = [None] * len(rows) if seen is None else [*seen]
        orders = [
            self._order(row, () if one is None else one.counts)
            for row, one in zip(rows, found, strict=True)
        ]
        if not all(orders):
            raise RequestError(
                ErrorCode.EMPTY_PROMPT, "there is a row with neither words nor an image"
            )
        vectors = [
            embed_row(table, row, order, None if one is None else one.vectors)
            for row, order, one in zip(rows, orders, found, strict=True)
        ]
        return vectors, orders

    def _numbered(
        self, orders: Sequence[Sequence[int]], seen: Sequence[Seen] | None
    ) -> list[Tensor] | None:
        """`_places` of every row."""
        found: Sequence[Seen | None] = [None] * len(orders) if seen is None else seen
        places = [self._places(order, one) for order, one in zip(orders, found, strict=True)]
        known = [row.to(self.torch_device) for row in places if row is not None]
        return known if len(known) == len(places) else None

    def _read_rows(
        self,
        seen: Sequence[Seen] | None,
        rows: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, list[list[int]]]:
        """Last states [B, T, D], padded at the end, and where each place comes from."""
        vectors, orders = self._rows(seen, rows)
        inputs, mask = pad_rows(vectors, "right")
        types: dict[str, Any] = deep_inputs(orders, seen, "right", mask.device)
        places = self._numbered(orders, seen)
        if places is not None:
            types["position_ids"] = pad_places(places, "right")
        if self.prefix_attention:
            # 0 is read as a whole, 1 in order: from the first label on, or a model would see it.
            kinds = torch.zeros_like(mask)
            for row, (given, order) in enumerate(zip(labels or [], orders, strict=bool(labels))):
                learnt = [place for place, i in enumerate(order) if i >= 0 and given[i] != -100]
                kinds[row, min(learnt, default=len(order)) :] = 1
            types["token_type_ids"] = kinds
        output = self._reader(inputs_embeds=inputs, attention_mask=mask, use_cache=False, **types)
        return output.last_hidden_state, orders

    def _start(
        self,
        seen: Sequence[Seen] | None,
        rows: Sequence[Sequence[int]],
        frames: Sequence[FrameEntry] | None = None,
        new_tokens: int = 0,
    ) -> tuple[Decoder, Tensor]:
        """`frames`: those that `seen` is of, where what is read of them may be kept."""
        vectors, orders = self._rows(seen, rows)
        history = torch.zeros((len(rows), 0), dtype=torch.int64, device=self.torch_device)
        length = max(map(len, vectors)) + new_tokens
        pool = self._step_pool(LlamaStep, self.language_model, self.module.lm_head, length)
        numbers = self._numbered(orders, seen)
        # A module that is not plain may have adapters that come and go: nothing of it is kept.
        if frames is None or pool is None or self.prefix_attention:
            deep = deep_inputs(orders, seen, "left", self.torch_device)
            decoder = self._read(vectors, places=numbers, extra=deep)
        else:
            assert seen is not None
            asked = Asked(vectors, orders, rows, seen, frames, numbers)
            decoder = read_behind(self.prefixes, asked, self._read)
        return decoder if pool is None else CausalStepDecoder(pool, decoder), history

    def _read(self, vectors: Sequence[Tensor], **options: Any) -> CausalDecoder:
        return CausalDecoder(
            self._reader,
            self.module.lm_head,
            vectors,
            first_place=self.first_place,
            prefix=self.prefix_attention,
            **options,
        )

    @property
    def _reader(self) -> Any:
        """What takes rows of vectors and gives their last states."""
        return self.language_model


def _views(seen: Sequence[Seen] | None) -> list[int] | None:
    """Images of each row."""
    return None if seen is None else [len(row.counts) for row in seen]
