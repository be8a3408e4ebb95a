"""Decoder-only VLMs: image vectors merged into the prompt, a language model that continues it.

What all such families share. A family's processor (`CausalProcessor`) gives its pixels, its chat
and its notation; its model (`CausalLM`) its vision side, and how the two are merged where that is
not the plain way.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import ErrorCode, GenerationParams, ImageError, RequestError
from librobot_vlm_ros.models.cache.image_features import ImageFeatures, concat_features
from librobot_vlm_ros.models.checkpoints.loading import LoadPlan, build_random
from librobot_vlm_ros.models.generation.causal_decoder import (
    CausalDecoder,
    PromptBatch,
    deepstack_inputs,
    merge_embeddings,
    merge_order,
    pad_position_ids,
    pad_rows,
    prefix_prefill,
)
from librobot_vlm_ros.models.generation.config import GenerationConfig, TokenConstraint
from librobot_vlm_ros.models.generation.constraints.box_syntax import BoxSyntax
from librobot_vlm_ros.models.generation.constraints.syntax_constraint import syntax_constraint
from librobot_vlm_ros.models.generation.decoder import Decoder
from librobot_vlm_ros.models.generation.fast.llama import FastCausalDecoder, FastLlama
from librobot_vlm_ros.models.inputs.input_ids import IGNORED, token_rows
from librobot_vlm_ros.models.inputs.preprocess import as_pixels, image_rows, normalise, to_views
from librobot_vlm_ros.models.placement import Placement
from librobot_vlm_ros.models.processor import Box, Processor, Size
from librobot_vlm_ros.models.vlm import AbstractVLM, Parts, Prefixes


class CausalProcessor(Processor):
    """The processor of a decoder-only family."""

    #: How the family writes boxes as text; None where it has tokens for them, or writes none.
    box_syntax: ClassVar[BoxSyntax | None] = None
    #: Whether every image is brought to images.height x images.width.
    one_size: ClassVar[bool] = True

    # What a family fills in.

    @abstractmethod
    def question(self, task: str, text: str, region: Box | None, size: Size | None) -> str:
        """A task's words around the user's. Raises as `prompt` does."""

    @property
    def image_tokens(self) -> int:
        """Vectors N that an image becomes, where all become as many: one a patch."""
        vision = self.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def normalised(self, image: Tensor) -> Any:
        """A float image [3, H, W], normalised already, in the prepared form; of a family of many
        sizes. Raises ImageError BAD_IMAGE for a size that it cannot take.
        """
        raise NotImplementedError(f"{type(self).__name__} has images of one size")

    def images_json(self) -> dict[str, Any]:
        """preprocessor_config.json of the model's images."""
        settings: dict[str, Any] = self.images.to_json()
        return settings

    # What follows from it.

    def count(self, prepared: Any) -> int:
        """See `Processor`."""
        return self.image_tokens

    def prompt(
        self, task: str, text: str, region: Box | None, size: Size | None, views: int = 1
    ) -> list[int]:
        """See `Processor`."""
        return self.chat(self.question(task, text, region, size), views)

    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        eos = self.config.text_config.eos_token_id
        return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)

    def generation_config(self, params: GenerationParams) -> GenerationConfig:
        """Greedy, or what `params` asks for; sampling means one beam."""
        beams, wanted = self.asked(params, beams=1, tokens=self.default_new_tokens)
        ends, pad = self.ends(), self.config.text_config.pad_token_id
        return GenerationConfig(
            eos=ends,
            pad=ends[0] if pad is None else pad,
            max_new_tokens=wanted,
            num_beams=beams,
            temperature=params.temperature,
            top_p=params.top_p,
            suppressed=tuple(self.suppressed()),
            coordinates=self.coordinates(),
        )

    def constraint(self, task: str) -> TokenConstraint | None:
        """Whole boxes, where the family writes them as text."""
        if self.box_syntax is None or not self.writes_regions(task):
            return None
        return syntax_constraint(self.tokenizer, self.box_syntax, self.ends())

    def save(self, folder: Path) -> None:
        """See `Processor`."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        text = json.dumps(self.images_json(), indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def refuse_too_long(self, image: int, prompt: int, answer: int) -> None:
        """See `Processor`; one token of the prompt stands for the image."""
        length, room = image + prompt - 1 + answer, self.config.text_config.max_position_embeddings
        if length > room:
            raise RequestError(
                ErrorCode.PROMPT_TOO_LONG,
                f"image, prompt and answer may take {length} tokens, {self.name} has {room}",
                "shorten the prompt, or ask for fewer tokens (max_new_tokens)",
            )

    def ids(
        self, text: Any, attention_mask: Tensor | None, views: Sequence[int] | None
    ) -> list[list[int]]:
        """Rows of ids: strings as questions in the family's chat, ids without padding.

        `views`: images of each row; None for words alone, whose chat has no place for an image.
        """
        if isinstance(text, str):
            text = [text]
        if text is None or len(text) == 0:
            raise RequestError(ErrorCode.EMPTY_PROMPT, "neither text nor input_ids were given")
        if isinstance(text[0], str):
            counts = [0] * len(text) if views is None else views
            if len(counts) != len(text):
                raise RequestError(
                    ErrorCode.BAD_PARAMETER, f"{len(counts)} images for {len(text)} prompts"
                )
            return [
                self.chat(self.clean(row, True), count)
                for row, count in zip(text, counts, strict=True)
            ]
        return self.kept_ids(text, attention_mask)

    def kept_ids(
        self, rows: Any, attention_mask: Tensor | None, also: tuple[int, ...] = ()
    ) -> list[list[int]]:
        """Token ids from a caller, checked, without padding; those of `also` may stand there, too.

        Raises RequestError BAD_PARAMETER.
        """
        size, image = int(self.config.text_config.vocab_size), int(self.config.image_token_id)
        return token_rows(rows, attention_mask, size, (image, *also))


class CausalLM(AbstractVLM):
    """A decoder-only VLM.

    The transformers model has `.model.language_model`, `.model.vision_tower` and `.lm_head`.
    """

    processor: CausalProcessor
    #: Number of the first position.
    first_position: ClassVar[int] = 0
    #: Whether every place of a prompt sees all of it, and only the answer is read in order.
    prefix_attention: ClassVar[bool] = False
    #: Whether the image stands in front of the begin token, too.
    image_leads: ClassVar[bool] = False

    # What a family fills in.

    @staticmethod
    @abstractmethod
    def plan(config: Any) -> LoadPlan:
        """How the family's model is built from transformers' configuration."""

    @classmethod
    @abstractmethod
    def default_processor(cls, name: str, config: Any) -> CausalProcessor:
        """A processor where a folder states nothing, for transformers' configuration `config`."""

    def see(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] to projected features [B, N, D], of a family of one size."""
        features = self.loaded().model.get_image_features(pixels).pooler_output
        # One tensor an image in newer versions of transformers, one for all in older ones.
        return features if isinstance(features, Tensor) else torch.stack(list(features))

    def image_features(self, prepared: Sequence[Any]) -> list[ImageFeatures]:
        """See `AbstractVLM`."""
        images = self.processor.images
        pixels = normalise(prepared, images, self.torch_device, self.torch_dtype)
        return [ImageFeatures(vectors, (len(vectors),), (None,)) for vectors in self.see(pixels)]

    def merge_order(self, row: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Where each place of a row with its images merged comes from (see `merge_order`)."""
        text = self.config.text_config
        begin = None if self.image_leads else getattr(text, "bos_token_id", None)
        return merge_order(row, counts, self.config.image_token_id, begin)

    def position_ids(self, order: Sequence[int], features: ImageFeatures | None) -> Tensor | None:
        """Positions of a row's places, int64 [T, A] on A axes; None counts 0, 1, 2 ...

        The answer goes on from the highest.
        """
        return None

    @property
    def reader(self) -> Any:
        """What takes rows of vectors and gives their last states."""
        return self.language_model

    # What follows from it.

    @classmethod
    def build(cls, config: Any, name: str, where: Placement) -> Parts:
        """See `AbstractVLM`."""
        module = build_random(cls.plan(config.to_transformers()), where)
        return Parts(module, cls.default_processor(name, module.config))

    def freeze_language(self) -> None:
        """Keep the language model and its output layer as they are."""
        super().freeze_language()
        self.loaded().lm_head.requires_grad_(False)

    def native_key(self, key: str) -> str:
        """See `AbstractVLM`."""
        names = [name for name, _ in self.plan(self.config).convert(key, torch.empty(0))]
        return names[0] if len(names) == 1 else key

    # Images.

    def look(self, images: Any) -> list[ImageFeatures]:
        """See `AbstractVLM`."""
        if not self.processor.one_size:
            rows = [[self._prepared(image) for image in row] for row in image_rows(images)]
            found = iter(self.image_features([image for row in rows for image in row]))
            return [concat_features([next(found) for _ in row]) for row in rows]
        settings = self.processor.images
        views = to_views(images, settings, self.torch_device, self.torch_dtype, self.pixels)
        height, width = views.shape[-2:]
        if (height, width) != (settings.height, settings.width):
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"normalised images are {height}x{width}",
                f"{self.name} takes {settings.height}x{settings.width}; uint8 images of any "
                "size are resized",
            )
        features = self.see(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return [
            concat_features([ImageFeatures(view, (len(view),), (None,)) for view in row])
            for row in features
        ]

    def _prepared(self, image: Any) -> Any:
        """One image in the prepared form; a float tensor [3, H, W] counts as normalised."""
        if not isinstance(image, Tensor) or not image.is_floating_point():
            return self.pixels(as_pixels(image))
        if image.dim() != 3 or image.shape[0] != 3:
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"a float image is {list(image.shape)}",
                "expected [3, H, W], normalised",
            )
        return self.processor.normalised(image)

    # Tokens in, tokens out.

    def prompt_rows(
        self,
        words: Any,
        task: str | None,
        attention_mask: Tensor | None,
        features: Sequence[ImageFeatures] | None,
    ) -> list[list[int]]:
        """See `AbstractVLM`."""
        views = None if features is None else [len(row.counts) for row in features]
        if task is not None:
            return self.processor.task_ids(task, words, views or [1])
        return self.processor.ids(words, attention_mask, views)

    def start(
        self,
        features: Sequence[ImageFeatures] | None,
        prompts: Sequence[Sequence[int]],
        new_tokens: int = 0,
        prefixes: Prefixes | None = None,
    ) -> tuple[Decoder, Tensor]:
        """See `AbstractVLM`."""
        vectors, orders = self._merged(features, prompts)
        history = torch.zeros((len(prompts), 0), dtype=torch.int64, device=self.torch_device)
        length = max(map(len, vectors)) + new_tokens
        pool = self.generator.steps(FastLlama, self.language_model, self.module.lm_head, length)
        positions = self._positions(orders, features)
        # A module that is not plain may have adapters that come and go: nothing of it is kept.
        if prefixes is None or pool is None or self.prefix_attention:
            deep = deepstack_inputs(orders, features, "left", self.torch_device)
            decoder = self._read(vectors, position_ids=positions, extra=deep)
        else:
            assert features is not None
            cache, frames = prefixes
            asked = PromptBatch(vectors, orders, prompts, features, frames, positions)
            decoder = prefix_prefill(cache, asked, self._read)
        return decoder if pool is None else FastCausalDecoder(pool, decoder), history

    def encode_text(self, text: Any) -> Tensor:
        """The language model's last states of words alone, [B, T, D], padded at the end."""
        hidden, _ = self._states(None, self.processor.ids(text, None, None))
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
        if text is not None and labels is not None:
            raise RequestError(ErrorCode.BAD_PARAMETER, "labels go with input_ids, not with text")
        if labels is not None and (input_ids is None or labels.shape != input_ids.shape):
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"labels are {list(labels.shape)}, expected the shape of input_ids",
            )
        features = self.look(images) if images is not None else None
        words = text if text is not None else input_ids
        rows = self.prompt_rows(words, None, attention_mask, features)
        learnt = None
        if labels is not None:
            learnt = self.processor.kept_ids(labels, attention_mask, (IGNORED,))
        hidden, orders = self._states(features, rows, learnt)
        logits = self.loaded().lm_head(hidden)
        result = {"embeddings": hidden, "logits": logits}
        if learnt is not None:
            targets = [
                torch.tensor([row[i] if i >= 0 else IGNORED for i in order])
                for row, order in zip(learnt, orders, strict=True)
            ]
            wanted = pad_sequence(targets, batch_first=True, padding_value=IGNORED)[:, 1:]
            result["loss"] = self.token_loss(logits[:, :-1], wanted)
        return result

    # Inside.

    def _merged(
        self, features: Sequence[ImageFeatures] | None, rows: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[list[int]]]:
        """Vectors [T, D] of each row, and where each comes from (see `merge_order`)."""
        if features is not None and len(features) != len(rows):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, f"{len(features)} images for {len(rows)} prompts"
            )
        table = self.loaded().get_input_embeddings()
        found = [None] * len(rows) if features is None else [*features]
        orders = [
            self.merge_order(row, () if one is None else one.counts)
            for row, one in zip(rows, found, strict=True)
        ]
        if not all(orders):
            raise RequestError(
                ErrorCode.EMPTY_PROMPT, "there is a row with neither words nor an image"
            )
        vectors = [
            merge_embeddings(table, row, order, None if one is None else one.vectors)
            for row, order, one in zip(rows, orders, found, strict=True)
        ]
        return vectors, orders

    def _positions(
        self, orders: Sequence[Sequence[int]], features: Sequence[ImageFeatures] | None
    ) -> list[Tensor] | None:
        """`position_ids` of every row."""
        found = [None] * len(orders) if features is None else features
        rows = [self.position_ids(order, one) for order, one in zip(orders, found, strict=True)]
        known = [row.to(self.torch_device) for row in rows if row is not None]
        return known if len(known) == len(rows) else None

    def _states(
        self,
        features: Sequence[ImageFeatures] | None,
        rows: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, list[list[int]]]:
        """Last states [B, T, D], padded at the end, and where each place comes from."""
        vectors, orders = self._merged(features, rows)
        inputs, mask = pad_rows(vectors, "right")
        types: dict[str, Any] = deepstack_inputs(orders, features, "right", mask.device)
        positions = self._positions(orders, features)
        if positions is not None:
            types["position_ids"] = pad_position_ids(positions, "right")
        if self.prefix_attention:
            # 0 is read as a whole, 1 in order: from the first label on, or a model would see it.
            kinds = torch.zeros_like(mask)
            for row, (given, order) in enumerate(zip(labels or [], orders, strict=bool(labels))):
                learnt = [place for place, i in enumerate(order) if i >= 0 and given[i] != IGNORED]
                kinds[row, min(learnt, default=len(order)) :] = 1
            types["token_type_ids"] = kinds
        output = self.reader(inputs_embeds=inputs, attention_mask=mask, use_cache=False, **types)
        return output.last_hidden_state, orders

    def _read(self, vectors: Sequence[Tensor], **options: Any) -> CausalDecoder:
        return CausalDecoder(
            self.reader,
            self.module.lm_head,
            vectors,
            first_position=self.first_position,
            prefix_attention=self.prefix_attention,
            **options,
        )
