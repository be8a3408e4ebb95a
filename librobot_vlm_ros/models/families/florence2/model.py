"""Florence-2 (Xiao et al., 2023, arXiv:2311.06242) on transformers' own Florence-2 class.

One image, one sentence that names the task, one answer in words and location tokens. The
published base and large models and the tabletop model of this package are all this class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import (
    ErrorCode,
    GenerationParams,
    InferenceRequest,
    ModelAnswer,
    ModelError,
    RequestError,
    clean_prompt,
    get_task,
)
from librobot_vlm_ros.models.answering import Job, again_in_safer_dtype
from librobot_vlm_ros.models.cache.image_features import FrameEntry
from librobot_vlm_ros.models.checkpoints.loading import build_random
from librobot_vlm_ros.models.families.florence2.checkpoint import (
    PUBLISHED,
    FlorenceParts,
    FlorenceSettings,
    plan_for,
    read_folder,
    write_folder,
)
from librobot_vlm_ros.models.families.florence2.configuration import (
    FlorenceConfig,
    image_tokens,
)
from librobot_vlm_ros.models.families.florence2.processor import (
    BINS,
    FLORENCE_TASKS,
    FlorenceTokenizer,
    build_prompt,
    parse_answer,
    without_locations,
)
from librobot_vlm_ros.models.families.input_ids import IGNORED, token_rows
from librobot_vlm_ros.models.families.preprocess import ImageSettings, normalise, squash, to_views
from librobot_vlm_ros.models.generation.config import (
    CoordinateBins,
    Generated,
    GenerationConfig,
    TokenConstraint,
)
from librobot_vlm_ros.models.generation.constraints.location_tokens import (
    BoxConstraint,
    PolygonConstraint,
)
from librobot_vlm_ros.models.generation.decoder import Decoder
from librobot_vlm_ros.models.generation.fast.bart import FastBart, FastBartDecoder
from librobot_vlm_ros.models.generation.fast.davit import FastDavit, make_fast_davit
from librobot_vlm_ros.models.generation.sampler import columns
from librobot_vlm_ros.models.generation.streaming import TokenSpans, geometric_mean
from librobot_vlm_ros.models.making import Loading, Making
from librobot_vlm_ros.models.placement import Placement
from librobot_vlm_ros.models.registry import model_info, register_vlm

__all__ = ["FlorenceConfig", "FlorenceDecoder", "FlorenceTensors", "FlorenceVLM", "encode_prompts"]


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
    """A `Decoder` over encoder states `hidden` [B, T, D], `mask` [B, T] or None."""

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

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        return self.append(self._prompt.new_empty((len(self._prompt), 0)))

    def decode(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `Decoder`."""
        return self.append(tokens[:, None], allowed)

    def append(self, tokens: Tensor, allowed: range | Tensor | None = None) -> Tensor:
        """See `AppendingDecoder`."""
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
        """See `Decoder`."""
        self._cache.self_attention_cache.reorder_cache(rows)
        # Rows of one prompt see the same encoder states: there is nothing to move among them.
        if within or torch.equal(prompt := self._prompt[rows], self._prompt):
            return
        self._prompt = prompt
        self._cache.cross_attention_cache.reorder_cache(rows)
        self._hidden = self._hidden.index_select(0, rows)
        if self._mask is not None:
            self._mask = self._mask.index_select(0, rows)


class FlorenceTensors(Making):
    """The learner's side of Florence-2; `FlorenceVLM` adds the robot's."""

    family = "florence-2"

    def _take(self, parts: FlorenceParts) -> None:
        self.module = parts.module
        self._runner = self._tower = None
        # Its blocks go over to channels last and back: convolutions that have them so save 7 %.
        self.module.model.vision_tower.to(memory_format=torch.channels_last)
        self.images = parts.images
        self.settings = parts.settings
        self.tokenizer = parts.tokenizer
        self.config = parts.module.config
        # Fails now, not at the first frame, when images of that size don't fit.
        self.image_tokens = image_tokens(
            self.config.vision_config, self.images.height, self.images.width
        )

    def encode_image(self, images: Any) -> Tensor:
        """[B, N, D]; of several views the tokens stand one view after the other."""
        views = to_views(images, self.images, self.torch_device, self.torch_dtype)
        image_tokens(self.config.vision_config, *views.shape[-2:])
        features = self._see(views.flatten(0, 1))
        return features.unflatten(0, views.shape[:2]).flatten(1, 2)

    def encode_text(self, text: Any) -> Tensor:
        """The encoder's view of words alone, [B, T, D]; shorter rows are padded at the end."""
        rows = self._ids(text, None)
        return self._encode(None, rows)[0]

    def forward(
        self,
        images: Any = None,
        text: Sequence[str] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """Encoder over image and words, decoder over the labels.

        `text`: full prompts; or `input_ids` int64 [B, L] with `attention_mask`, without image
        tokens. `labels` int64 [B, T]: the answer, -100 is not learnt. Without labels and
        `decoder_input_ids` the logits are those of the first answer token, [B, 1, V]. The loss
        leaves out the image token, which is no word.
        """
        module = self._loaded()
        rows = self._ids(text if text is not None else input_ids, attention_mask)
        features = list(self.encode_image(images)) if images is not None else None
        hidden, mask = self._encode(features, rows)
        if decoder_input_ids is None:
            decoder_input_ids = self._decoder_input(labels, len(rows))
        output = module.model.language_model.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=hidden,
            encoder_attention_mask=mask,
            use_cache=False,
        )
        logits = module.lm_head(output.last_hidden_state)
        result = {"embeddings": hidden, "logits": logits}
        if labels is not None:
            words = logits.float()
            lowest = torch.finfo(words.dtype).min
            words = words.index_fill(2, self._suppressed(words.device), lowest)
            result["loss"] = functional.cross_entropy(
                words.flatten(0, 1), labels.to(words.device).flatten(), ignore_index=-100
            )
        return result

    @again_in_safer_dtype
    def generate(
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

        `input_ids` (tensor [B, L] or strings) or `text` is the prompt. With a `task` its sentence
        is the prompt, and what is given as ids or text stands in the sentence's place for input,
        or behind a sentence that has none.
        """
        rules = self.rules(GenerationParams(max_new_tokens, num_beams, temperature, top_p, seed))
        words = text if text is not None else input_ids
        with self._answering():
            features = list(self.encode_image(images)) if images is not None else None
            if task is None:
                rows = self._ids(words, attention_mask)
            else:
                count = len(features) if features is not None else len(words)
                rows = self._task_ids(task, words, attention_mask, count)
            decoder, history = self._start(features, rows)
            return self._written(decoder, history, rules, seed)

    def get_embedding_dim(self) -> int:
        """D of image features and text features alike."""
        return int(self.config.text_config.d_model)

    @property
    def vision_encoder(self) -> nn.Module:
        """The DaViT tower, without the projection."""
        tower: nn.Module = self._loaded().model.vision_tower
        return tower

    @property
    def language_model(self) -> nn.Module:
        """BART's encoder and decoder; the output layer is tied to its word embeddings."""
        bart: nn.Module = self._loaded().model.language_model
        return bart

    # Inside.

    def _words(self) -> FlorenceTokenizer:
        if self.tokenizer is None:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{self.name} was built from a config and has no tokenizer",
                "pass token ids, or load it from a folder with a tokenizer.json",
            )
        return self.tokenizer

    def _see(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] to projected features [B, N, D]."""
        model = self._loaded().model
        if self._answers_now and (tower := self._pass()) is not None:
            found: Tensor = model.multi_modal_projector(tower(pixels))
            return found
        features: Tensor = model.get_image_features(pixels).pooler_output
        return features

    def _pass(self) -> FastDavit | None:
        """The tower as arithmetic, over the weights as they are now; None where it cannot be."""
        if self.decoder == "module" or self.torch_device.type != "cpu":
            return None
        if self._tower is None or self._tower[0] is not self._weights:
            self._tower = self._weights, make_fast_davit(self.vision_encoder)
        found: FastDavit | None = self._tower[1]
        return None if found is None or found.hooked else found

    def _start(
        self, features: Sequence[Tensor] | None, rows: Sequence[Sequence[int]]
    ) -> tuple[Decoder, Tensor]:
        hidden, mask = self._encode(features, rows)
        start = self.config.text_config.decoder_start_token_id
        history = torch.full((len(rows), 1), start, dtype=torch.int64, device=self.torch_device)
        text = self.language_model.decoder
        pool = self._graph_runner(FastBart, text, self.module.lm_head)
        if pool is not None:
            return FastBartDecoder(pool, hidden, mask, start), history
        return FlorenceDecoder(self.module, hidden, mask, start), history

    def _encode(
        self, features: Sequence[Tensor] | None, rows: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor | None]:
        """The encoder's states and mask of images and prompts, one of each a row."""
        if features is not None and len(features) != len(rows):
            raise RequestError(
                ErrorCode.BAD_PARAMETER, f"{len(features)} images for {len(rows)} prompts"
            )
        module = self._loaded()
        for number, row in enumerate(rows):
            self._check_length(len(row) + (len(features[number]) if features is not None else 0))
            if not row and features is None:
                raise RequestError(
                    ErrorCode.EMPTY_PROMPT, "there is a row with neither words nor an image"
                )
        table = module.get_input_embeddings()
        words = [
            table(torch.tensor(row, dtype=torch.int64, device=self.torch_device)) for row in rows
        ]
        return encode_prompts(module, features, words)

    def _ids(self, text: Any, attention_mask: Tensor | None) -> list[list[int]]:
        """Prompts as lists of ids: strings between begin and end, ids without image and padding."""
        if isinstance(text, str):
            text = [text]
        if text is None or len(text) == 0:
            raise RequestError(ErrorCode.EMPTY_PROMPT, "neither text nor input_ids were given")
        if isinstance(text[0], str):
            return [self._words().prompt([self._clean(row)]) for row in text]
        image = self.config.image_token_id
        size = int(self.config.text_config.vocab_size)
        rows = token_rows(text, attention_mask, size, (image,))
        return [[token for token in row if token != image] for row in rows]

    def _task_ids(
        self, task: str, words: Any, attention_mask: Tensor | None, count: int
    ) -> list[list[int]]:
        """The task's prompt for each row, with what was given in it."""
        name = get_task(task).name
        if name not in FLORENCE_TASKS or name not in self.tasks:
            raise RequestError(
                ErrorCode.TASK_NOT_SUPPORTED,
                f"{self.name} cannot {task!r} here, it can: {', '.join(sorted(self.tasks))}",
            )
        spec = FLORENCE_TASKS[name]
        tokenizer = self._words()
        if words is None or isinstance(words, str):
            words = [words or ""] * count
        if isinstance(words[0], str):
            return [
                tokenizer.prompt(build_prompt(spec, self._clean(row), None, 1, 1)) for row in words
            ]
        before, _, after = spec.sentence.partition("{input}")
        if spec.takes != "region":
            before = before.rstrip()  # a word's id holds the space before it, a location's does not
        outer = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
        rows = [[t for t in row if t not in outer] for row in self._ids(words, attention_mask)]
        return [
            [tokenizer.bos, *tokenizer.words(before), *row, *tokenizer.words(after), tokenizer.eos]
            for row in rows
        ]

    def _clean(self, text: str) -> str:
        return clean_prompt(
            text,
            required=False,
            limits=self.limits,
            control_tokens=self._words().control_tokens,
        )

    def _check_length(self, length: int) -> None:
        room = self.config.text_config.max_position_embeddings
        if length > room:
            raise RequestError(
                ErrorCode.PROMPT_TOO_LONG,
                f"image and prompt take {length} tokens, {self.name} has room for {room}",
                "shorten the prompt",
            )

    def _suppressed(self, device: torch.device) -> Tensor:
        """Rows of the vocabulary that are no words: the image token, and padding behind it."""
        size = self.config.text_config.vocab_size
        first = size if self.tokenizer is None else min(size, self.tokenizer.size)
        ids = {self.config.image_token_id, *range(first, size)}
        return torch.tensor(sorted(ids), device=device)

    def _decoder_input(self, labels: Tensor | None, rows: int) -> Tensor:
        """The start token, and behind it the labels without their last one."""
        text = self.config.text_config
        start = torch.full((rows, 1), text.decoder_start_token_id, device=self.torch_device)
        if labels is None:
            return start
        token_rows(labels, None, int(text.vocab_size), (IGNORED,))
        shifted = labels[:, :-1].to(self.torch_device)
        return torch.cat([start, shifted.masked_fill(shifted == -100, text.pad_token_id)], dim=1)


@register_vlm("florence-2-base", "florence-2-large", "florence-2-tabletop")
class FlorenceVLM(FlorenceTensors):
    """Florence-2 of any size. `FlorenceVLM(config)` has random weights; see `create_vlm`."""

    config_class = FlorenceConfig
    default_name = "florence-2-base"

    @classmethod
    def _random_parts(cls, config: FlorenceConfig, name: str, where: Placement) -> FlorenceParts:
        module = build_random(plan_for(config.to_transformers()), where)
        images = ImageSettings(config.image_size, config.image_size)
        return FlorenceParts(module, images, _settings(name))

    @classmethod
    def _read_folder(cls, folder: Path, name: str, loading: Loading) -> FlorenceParts:
        return read_folder(folder, _settings(name), loading)

    @classmethod
    def _checked_config(cls, config: Any, name: str) -> Any:
        if isinstance(config, FlorenceConfig) or name in FlorenceConfig.variants:
            return super()._checked_config(config, name)
        # Registered under a name of one's own: of the size that the class has by default.
        return super()._checked_config({"variant": cls.default_name, **(config or {})}, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in transformers' native layout that `create_vlm` loads again."""
        parts = FlorenceParts(self._whole_module(), self.images, self.settings, self.tokenizer)
        write_folder(Path(folder), parts)

    # For the robot.

    def prepare(self, request: InferenceRequest) -> tuple[FrameEntry, tuple[int, ...]]:
        """See `AbstractVLM.prepare`."""
        prompt: tuple[int, ...] = ()
        if request.task != "embed":
            tokenizer = self._words()
            text = clean_prompt(
                request.prompt,
                required=request.spec.needs_text,
                limits=self.limits,
                control_tokens=tokenizer.control_tokens,
            )
            size = request.frame.width, request.frame.height
            pieces = build_prompt(FLORENCE_TASKS[request.task], text, request.region, *size)
            prompt = tuple(tokenizer.prompt(pieces))
            self._check_length(self.image_tokens + len(prompt))
        entry = self.frames.entry(request.frame, self.torch_dtype)
        if not entry.has_features(self.torch_dtype):
            entry.ready(self._pixels)
        return entry, prompt

    def start(self, jobs: Sequence[Job]) -> tuple[Decoder, Tensor]:
        """See `AbstractVLM.start`."""
        return self._start(self.embed(jobs), [list(job.prompt) for job in jobs])

    def embed(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Projected vision features [N, D] of each job's frame, computed once a frame."""
        dtype = self.torch_dtype
        new = {id(job.frame): job.frame for job in jobs if not job.frame.has_features(dtype)}
        if new:
            arrays = [entry.ready(self._pixels) for entry in new.values()]
            pixels = normalise(arrays, self.images, self.torch_device, self.torch_dtype)
            for entry, features in zip(new.values(), self._see(pixels), strict=True):
                entry.features, entry.pixels = features, None
        return [job.frame.features for job in jobs]

    def input_size(self, width: int, height: int) -> tuple[int, int] | None:
        """The same for all images."""
        return self.images.width, self.images.height

    def _pixels(self, pixels: Any) -> Any:
        return squash(pixels, self.images, self.resizing)

    def rules(self, params: GenerationParams) -> GenerationConfig:
        """Published settings, and what `params` asks for; sampling means one beam."""
        settings, text = self.settings, self.config.text_config
        beams, wanted = self._asked(
            params,
            beams=1 if params.temperature > 0 else settings.num_beams,
            tokens=settings.max_new_tokens,
        )
        return GenerationConfig(
            eos=(text.eos_token_id,),
            pad=text.pad_token_id,
            max_new_tokens=wanted,
            num_beams=beams,
            temperature=params.temperature,
            top_p=params.top_p,
            no_repeat_ngram=settings.no_repeat_ngram_size,
            forced_first=settings.forced_bos_token_id,
            forced_last=settings.forced_eos_token_id,
            suppressed=tuple(self._suppressed(torch.device("cpu")).tolist()),
            length_penalty=settings.length_penalty,
            early_stopping=settings.early_stopping,
            scale=self._scale(),
        )

    def read(self, request: InferenceRequest, generated: Generated) -> ModelAnswer:
        """Text, or regions; scores are geometric means of token probabilities.

        A region's is over its label and coordinates: the words' own probability, and for each
        coordinate the probability of lying within 1 % of the image's side of what was written.
        """
        task = FLORENCE_TASKS[request.task]
        whole = geometric_mean(generated.log_probs)
        if task.answer == "text":
            text = without_locations(self.decode_text(generated.ids))
            return ModelAnswer(text=text, score=whole)
        tokenizer = self._words()
        spans = TokenSpans(
            generated.ids, generated.log_probs, tokenizer.decode, tokenizer.control_ids
        )
        regions, malformed = parse_answer(
            spans.text,
            task.answer,
            request.frame.width,
            request.frame.height,
            score=spans.score,
            default_label=request.prompt if task.takes == "text" else "",
        )
        return ModelAnswer(text=spans.text, score=whole, regions=regions, malformed=malformed)

    def grammar(self, request: InferenceRequest) -> TokenConstraint | None:
        """Whole boxes, quadrangles and polygons, as the task writes them."""
        task = FLORENCE_TASKS[request.task]
        if self.tokenizer is None or task.answer == "text":
            return None
        first = self.tokenizer.first_location
        if task.answer == "polygons":
            return PolygonConstraint(first, BINS)
        if task.answer == "quads":
            return BoxConstraint(first, BINS, size=8, ordered=False)
        # The n-gram rule may forbid what little an order leaves.
        ordered = not self.settings.no_repeat_ngram_size
        ids = self.tokenizer.tokenizer.convert_tokens_to_ids
        poly = ids("<poly>") if task.answer == "boxes_or_polygons" else None
        return BoxConstraint(first, BINS, ordered=ordered, unless=poly)

    def _scale(self) -> CoordinateBins | None:
        """Locations count as right when they are within 1 % of the image's side."""
        if self.tokenizer is None:
            return None
        return CoordinateBins(self.tokenizer.first_location, BINS, radius=BINS // 100)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Text with its location tokens; begin, end and pad are left out."""
        return self._words().decode(ids)


def _settings(name: str) -> FlorenceSettings:
    """What holds where a folder states nothing: the published models have published settings."""
    return PUBLISHED if model_info(name).default_pretrained else FlorenceSettings()
