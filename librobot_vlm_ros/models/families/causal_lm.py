"""Decoder-only VLMs: image vectors merged into the prompt, a language model that continues it."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import (
    ErrorCode,
    GenerationParams,
    ImageError,
    InferenceRequest,
    ModelAnswer,
    ModelError,
    Region,
    RequestError,
    clean_prompt,
    get_task,
)
from librobot_vlm_ros.models.answering import Job, again_in_safer_dtype
from librobot_vlm_ros.models.cache.image_features import (
    FrameEntry,
    ImageFeatures,
    concat_features,
    pad_features,
)
from librobot_vlm_ros.models.cache.prefix import PrefixCache
from librobot_vlm_ros.models.checkpoints.loading import LoadPlan, build_random
from librobot_vlm_ros.models.families.input_ids import IGNORED, token_rows
from librobot_vlm_ros.models.families.preprocess import as_pixels, normalise, to_views
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
from librobot_vlm_ros.models.generation.config import Generated, GenerationConfig, TokenConstraint
from librobot_vlm_ros.models.generation.constraints.box_syntax import BoxSyntax
from librobot_vlm_ros.models.generation.constraints.syntax_constraint import syntax_constraint
from librobot_vlm_ros.models.generation.decoder import Decoder
from librobot_vlm_ros.models.generation.fast.llama import FastCausalDecoder, FastLlama
from librobot_vlm_ros.models.generation.streaming import TokenSpans, geometric_mean
from librobot_vlm_ros.models.making import Making
from librobot_vlm_ros.models.placement import Placement
from librobot_vlm_ros.models.registry import models_with_task
from librobot_vlm_ros.models.tokenizer import CausalTokenizer

__all__ = [
    "CausalImages",
    "CausalParts",
    "CausalTensors",
    "CausalVLM",
    "CausalWords",
]


class CausalImages(Making):
    """The seeing half of `CausalTensors`."""

    images: Any
    #: Whether every image is brought to images.height x images.width.
    one_size = True

    # What a family fills in.

    @abstractmethod
    def _pixels(self, pixels: Any) -> Any:
        """uint8 [H, W, 3] of any size to the prepared form.

        Of a family of one size: uint8 [images.height, images.width, 3].
        """

    @property
    def image_tokens(self) -> int:
        """Vectors N that an image becomes, where all become as many."""
        raise NotImplementedError(f"{type(self).__name__} needs image_tokens or _count")

    def _count(self, prepared: Any) -> int:
        """Vectors N that a prepared image becomes."""
        return self.image_tokens

    def _shape(self, prepared: Any) -> Any:
        """What `_places` needs to know of a prepared image, see `ImageFeatures.shapes`."""
        return None

    def _see(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] to projected features [B, N, D], of a family of one size."""
        raise NotImplementedError(f"{type(self).__name__} needs _see or _see_all")

    def _see_all(self, prepared: Sequence[Any]) -> list[Tensor]:
        """Projected features [N_i, D] of each prepared image."""
        pixels = normalise(prepared, self.images, self.torch_device, self.torch_dtype)
        return list(self._see(pixels))

    def _look(self, prepared: Sequence[Any]) -> list[ImageFeatures]:
        """`_see_all` with what belongs to it; overridden where there are features a layer."""
        return [
            ImageFeatures(vectors, (len(vectors),), (self._shape(image),))
            for image, vectors in zip(prepared, self._see_all(prepared), strict=True)
        ]

    def _prepared(self, image: Tensor) -> Any:
        """A float image [3, H, W], normalised already, in the prepared form.

        Of a family of many sizes. Raises ImageError BAD_IMAGE for a size that it cannot take.
        """
        raise NotImplementedError(f"{type(self).__name__} needs _prepared")

    # What follows from it.

    def encode_image(self, images: Any) -> Tensor:
        """[B, N, D]; of several views the tokens stand one view after the other.

        Where images of a batch become different numbers of vectors, N is the largest, and the rows
        of others are padded with zeros at the end.
        """
        return pad_features(self._seen(images))

    def _seen(self, images: Any) -> list[ImageFeatures]:
        """What is seen in each row of anything that holds images (see `encode_image`)."""
        if not self.one_size:
            rows = self._prepared_rows(images)
            found = iter(self._look([image for row in rows for image in row]))
            return [concat_features([next(found) for _ in row]) for row in rows]
        views = to_views(self._fitted(images), self.images, self.torch_device, self.torch_dtype)
        height, width = views.shape[-2:]
        if (height, width) != (self.images.height, self.images.width):
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"normalised images are {height}x{width}",
                f"{self.name} takes {self.images.height}x{self.images.width}; uint8 images of any "
                "size are resized",
            )
        features = self._see(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return [
            concat_features([ImageFeatures(view, (len(view),), (None,)) for view in row])
            for row in features
        ]

    def _prepared_rows(self, images: Any) -> list[list[Any]]:
        """Prepared images, a list of views a row; each of its own size.

        Float tensors [3, H, W], [B, 3, H, W] or [B, views, 3, H, W] count as normalised. Raises
        ImageError BAD_IMAGE.
        """
        if _is_array(images) and images.ndim > 3:
            images = list(images)
        if not isinstance(images, (list, tuple)):
            images = [images]
        rows = []
        for row in images:
            several = isinstance(row, (list, tuple)) or (_is_array(row) and row.ndim == 4)
            rows.append([self._prepare_one(image) for image in (row if several else [row])])
        if not rows or not all(rows):
            raise ImageError(ErrorCode.BAD_IMAGE, "there is a row without an image")
        return rows

    def _prepare_one(self, image: Any) -> Any:
        if not isinstance(image, Tensor) or not image.is_floating_point():
            return self._pixels(as_pixels(image))
        if image.dim() != 3 or image.shape[0] != 3:
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"a float image is {list(image.shape)}",
                "expected [3, H, W], normalised",
            )
        return self._prepared(image)

    def _fitted(self, images: Any) -> Any:
        """The same lists of images, all of those in uint8 brought to the model's size."""
        if isinstance(images, Tensor) and images.is_floating_point():
            return images
        if (_is_array(images) and images.ndim > 3) or isinstance(images, (list, tuple)):
            return [self._fitted(image) for image in images]
        return self._pixels(as_pixels(images))


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


class CausalWords(CausalImages):
    """The half of `CausalTensors` that deals with words."""

    config: Any
    tokenizer: CausalTokenizer | None

    # What a family fills in.

    @abstractmethod
    def _question(self, task: str, text: str, request: InferenceRequest | None) -> str:
        """A task's words around the user's. `request` has the region and the frame's size."""

    @abstractmethod
    def _prompt(self, words: str) -> list[int]:
        """Ids of a whole prompt, one token standing for the image."""

    def _prompt_of(self, words: str, views: int) -> list[int]:
        """Ids of a whole prompt about so many images; one token may stand for all of them."""
        prompt, marks = self._prompt(words), set() if views else self._image_marks()
        return [token for token in prompt if token not in marks]

    # What follows from it.

    def _words(self) -> CausalTokenizer:
        if self.tokenizer is None:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{self.name} was built from a config and has no tokenizer",
                "pass token ids, or load it from a folder with a tokenizer",
            )
        return self.tokenizer

    def _suppressed(self) -> list[int]:
        """Rows of the vocabulary that are no words: the image token, and padding behind it."""
        size = int(self.config.text_config.vocab_size)
        image = int(self.config.image_token_id)
        first = size if self.tokenizer is None else min(size, self.tokenizer.size)
        return sorted({image, *range(first, size)})

    def _image_marks(self) -> set[int]:
        """Tokens of a prompt that make no sense without an image."""
        return {int(self.config.image_token_id)}

    def _clean(self, text: str, required: bool) -> str:
        control = self._words().control_tokens
        return clean_prompt(text, required=required, limits=self.limits, control_tokens=control)

    def _kept(
        self, rows: Any, attention_mask: Tensor | None, also: tuple[int, ...] = ()
    ) -> list[list[int]]:
        size, image = int(self.config.text_config.vocab_size), int(self.config.image_token_id)
        return token_rows(rows, attention_mask, size, (image, *also))

    def _ids(
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
                self._prompt_of(self._clean(row, True), count)
                for row, count in zip(text, counts, strict=True)
            ]
        return self._kept(text, attention_mask)

    def _task_ids(self, task: str, words: Any, views: Sequence[int]) -> list[list[int]]:
        name = get_task(task).name
        if name not in self.tasks:
            able = models_with_task(name)
            raise RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"{self.name} cannot {task!r}, it can: {', '.join(sorted(self.tasks))}",
                f"models that can: {', '.join(able) or 'none of the registered ones'}",
            )
        if name == "embed" or get_task(name).needs_region:
            raise RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"{self.name} cannot {task!r} here",
                "use encode_image for embeddings, and a request with a region for such tasks",
            )
        alike = words is None or isinstance(words, str)
        texts = [words or ""] * len(views) if alike else list(words)
        if not all(isinstance(row, str) for row in texts):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, "with a task the prompts are strings, not ids"
            )
        if len(texts) != len(views):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, f"{len(views)} images for {len(texts)} prompts"
            )
        asked = [self._question(name, self._clean(row, False), None) for row in texts]
        return [self._prompt_of(row, count) for row, count in zip(asked, views, strict=True)]


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
    first_position = 0
    #: Whether every place of a prompt sees all of it, and only the answer is read in order.
    prefix_attention = False
    #: Whether the image stands in front of the begin token, too.
    image_leads = False

    def _take(self, parts: CausalParts) -> None:
        self.module, self._runner = parts.module, None
        self.images = parts.images
        self.tokenizer = parts.tokenizer
        self.config = parts.module.config
        self.prefixes = PrefixCache()

    # What a family fills in.

    def _order(self, row: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Where each place of a row comes from (see `merge_order`)."""
        text = self.config.text_config
        begin = None if self.image_leads else getattr(text, "bos_token_id", None)
        return merge_order(row, counts, self.config.image_token_id, begin)

    def _places(self, order: Sequence[int], seen: ImageFeatures | None) -> Tensor | None:
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
        self, seen: Sequence[ImageFeatures] | None, rows: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], list[list[int]]]:
        """Vectors [T, D] of each row, and where each comes from (see `merge_order`)."""
        if seen is not None and len(seen) != len(rows):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, f"{len(seen)} images for {len(rows)} prompts"
            )
        table = self._loaded().get_input_embeddings()
        found: list[ImageFeatures | None] = [None] * len(rows) if seen is None else [*seen]
        orders = [
            self._order(row, () if one is None else one.counts)
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

    def _numbered(
        self, orders: Sequence[Sequence[int]], seen: Sequence[ImageFeatures] | None
    ) -> list[Tensor] | None:
        """`_places` of every row."""
        found: Sequence[ImageFeatures | None] = [None] * len(orders) if seen is None else seen
        places = [self._places(order, one) for order, one in zip(orders, found, strict=True)]
        known = [row.to(self.torch_device) for row in places if row is not None]
        return known if len(known) == len(places) else None

    def _read_rows(
        self,
        seen: Sequence[ImageFeatures] | None,
        rows: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, list[list[int]]]:
        """Last states [B, T, D], padded at the end, and where each place comes from."""
        vectors, orders = self._rows(seen, rows)
        inputs, mask = pad_rows(vectors, "right")
        types: dict[str, Any] = deepstack_inputs(orders, seen, "right", mask.device)
        places = self._numbered(orders, seen)
        if places is not None:
            types["position_ids"] = pad_position_ids(places, "right")
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
        seen: Sequence[ImageFeatures] | None,
        rows: Sequence[Sequence[int]],
        frames: Sequence[FrameEntry] | None = None,
        new_tokens: int = 0,
    ) -> tuple[Decoder, Tensor]:
        """`frames`: those that `seen` is of, where what is read of them may be kept."""
        vectors, orders = self._rows(seen, rows)
        history = torch.zeros((len(rows), 0), dtype=torch.int64, device=self.torch_device)
        length = max(map(len, vectors)) + new_tokens
        pool = self._graph_runner(FastLlama, self.language_model, self.module.lm_head, length)
        numbers = self._numbered(orders, seen)
        # A module that is not plain may have adapters that come and go: nothing of it is kept.
        if frames is None or pool is None or self.prefix_attention:
            deep = deepstack_inputs(orders, seen, "left", self.torch_device)
            decoder = self._read(vectors, position_ids=numbers, extra=deep)
        else:
            assert seen is not None
            asked = PromptBatch(vectors, orders, rows, seen, frames, numbers)
            decoder = prefix_prefill(self.prefixes, asked, self._read)
        return decoder if pool is None else FastCausalDecoder(pool, decoder), history

    def _read(self, vectors: Sequence[Tensor], **options: Any) -> CausalDecoder:
        return CausalDecoder(
            self._reader,
            self.module.lm_head,
            vectors,
            first_position=self.first_position,
            prefix_attention=self.prefix_attention,
            **options,
        )

    @property
    def _reader(self) -> Any:
        """What takes rows of vectors and gives their last states."""
        return self.language_model


def _views(seen: Sequence[ImageFeatures] | None) -> list[int] | None:
    """Images of each row."""
    return None if seen is None else [len(row.counts) for row in seen]


class CausalVLM(CausalTensors):
    """Such a model of any family."""

    #: How the family writes boxes as text; None where it has tokens for them, or writes none.
    box_syntax: ClassVar[BoxSyntax | None] = None

    # What a family fills in.

    @staticmethod
    @abstractmethod
    def _plan(config: Any) -> LoadPlan:
        """How the family's model is built from transformers' configuration."""

    @staticmethod
    @abstractmethod
    def _default_images(config: Any) -> Any:
        """Image settings where a folder states none."""

    @abstractmethod
    def _regions(
        self, request: InferenceRequest, spans: TokenSpans
    ) -> tuple[tuple[Region, ...], int]:
        """The answer's regions in source pixels, and how many could not be read."""

    # Making and saving.

    @classmethod
    def _random_parts(cls, config: Any, name: str, where: Placement) -> CausalParts:
        module = build_random(cls._plan(config.to_transformers()), where)
        return CausalParts(module, cls._default_images(module.config))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in transformers' native layout that `create_vlm` loads again."""
        folder = Path(folder)
        self._whole_module().save_pretrained(str(folder))
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        text = json.dumps(self._images_json(), indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")

    # Answering.

    def prepare(self, request: InferenceRequest) -> tuple[FrameEntry, tuple[int, ...]]:
        """See `AbstractVLM.prepare`; one token of the prompt stands for the image."""
        prompt: list[int] = []
        answer = 0
        if request.task != "embed":
            text = self._clean(request.prompt, request.spec.needs_text)
            prompt = self._prompt(self._question(request.task, text, request))
            answer = self.rules(request.params).max_new_tokens
        entry = self.frames.entry(request.frame, self.torch_dtype)
        pixels = None if entry.has_features(self.torch_dtype) else entry.ready(self._pixels)
        if prompt:
            image = len(entry.features) if pixels is None else self._count(pixels)
            length = image + len(prompt) - 1 + answer
            room = self.config.text_config.max_position_embeddings
            if length > room:
                raise RequestError(
                    ErrorCode.PROMPT_TOO_LONG,
                    f"image, prompt and answer may take {length} tokens, {self.name} has {room}",
                    "shorten the prompt, or ask for fewer tokens (max_new_tokens)",
                )
        return entry, tuple(prompt)

    def start(self, jobs: Sequence[Job]) -> tuple[Decoder, Tensor]:
        """See `AbstractVLM.start`."""
        seen = self._look_at(jobs)
        prompts, frames = [job.prompt for job in jobs], [job.frame for job in jobs]
        new_tokens = self.rules(jobs[0].request.params).max_new_tokens
        return self._start(seen, prompts, frames, new_tokens)

    def embed(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Projected vision features [N, D] of each job's frame, computed once a frame."""
        return [seen.vectors for seen in self._look_at(jobs)]

    def _look_at(self, jobs: Sequence[Job]) -> list[ImageFeatures]:
        new = {
            id(job.frame): job.frame
            for job in jobs
            if not job.frame.has_features(self.torch_dtype) or job.frame.seen is None
        }
        if new:
            prepared = [entry.ready(self._pixels) for entry in new.values()]
            for entry, seen in zip(new.values(), self._look(prepared), strict=True):
                entry.seen, entry.features, entry.pixels = seen, seen.vectors, None
        return [job.frame.seen for job in jobs]

    def rules(self, params: GenerationParams) -> GenerationConfig:
        """Greedy, or what `params` asks for; sampling means one beam."""
        text = self.config.text_config
        beams, wanted = self._asked(params, beams=1, tokens=self.default_new_tokens)
        ends = self._ends()
        return GenerationConfig(
            eos=ends,
            pad=ends[0] if text.pad_token_id is None else text.pad_token_id,
            max_new_tokens=wanted,
            num_beams=beams,
            temperature=params.temperature,
            top_p=params.top_p,
            suppressed=tuple(self._suppressed()),
        )

    def read(self, request: InferenceRequest, generated: Generated) -> ModelAnswer:
        """Text; for boxes and masks, regions scored by their tokens' probabilities."""
        whole = geometric_mean(generated.log_probs)
        if request.spec.output == "text":
            return ModelAnswer(text=self.decode_text(generated.ids).strip(), score=whole)
        words = self._words()
        spans = TokenSpans(generated.ids, generated.log_probs, words.decode, words.control_ids)
        regions, malformed = self._regions(request, spans)
        return ModelAnswer(text=spans.text, score=whole, regions=regions, malformed=malformed)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Text; begin, end and pad are left out."""
        return self._words().decode(ids)

    def grammar(self, request: InferenceRequest) -> TokenConstraint | None:
        """Whole boxes, where the family writes them as text."""
        if self.box_syntax is None or self.tokenizer is None or request.spec.output == "text":
            return None
        return syntax_constraint(self.tokenizer, self.box_syntax, self._ends())

    # Inside.

    def _ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        eos = self.config.text_config.eos_token_id
        return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)

    def _images_json(self) -> dict[str, Any]:
        """preprocessor_config.json of the model's images."""
        settings: dict[str, Any] = self.images.to_json()
        return settings

    def _native_key(self, key: str) -> str:
        names = [name for name, _ in self._plan(self.config).convert(key, torch.empty(0))]
        return names[0] if len(names) == 1 else key
