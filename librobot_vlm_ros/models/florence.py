"""Florence-2 (Xiao et al., 2023, arXiv:2311.06242) on transformers' own Florence-2 class.

One image, one sentence that names the task, one answer in words and location tokens. The
published base and large models and the tabletop model of this package are all this class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.core import (
    ErrorCode,
    GenerationParams,
    InferenceRequest,
    ModelAnswer,
    ModelError,
    RequestError,
    clean_prompt,
)
from librobot_vlm_ros.models.adapting import quantization_for
from librobot_vlm_ros.models.answering import Job
from librobot_vlm_ros.models.checkpoint import build_random
from librobot_vlm_ros.models.checksum import check_sha256
from librobot_vlm_ros.models.decode import Decoder, DecodeRules, Generated, Grammar, Scale
from librobot_vlm_ros.models.detokenize import TokenSpans, geometric_mean
from librobot_vlm_ros.models.florence_config import FlorenceConfig, variants
from librobot_vlm_ros.models.florence_convert import plan_for
from librobot_vlm_ros.models.florence_folder import (
    PUBLISHED,
    FlorenceParts,
    FlorenceSettings,
    read_folder,
    write_folder,
)
from librobot_vlm_ros.models.florence_parse import parse_answer, without_locations
from librobot_vlm_ros.models.florence_prompts import BINS, FLORENCE_TASKS, build_prompt
from librobot_vlm_ros.models.florence_tensors import FlorenceTensors
from librobot_vlm_ros.models.frame_cache import FrameEntry
from librobot_vlm_ros.models.grammar import BoxGrammar, OutlineGrammar
from librobot_vlm_ros.models.placement import place
from librobot_vlm_ros.models.preprocess import ImageSettings, normalise, squash
from librobot_vlm_ros.models.registry import model_info, register_vlm
from librobot_vlm_ros.models.weights import find_weights

__all__ = ["FlorenceConfig", "FlorenceVLM"]


@register_vlm("florence-2-base", "florence-2-large", "florence-2-tabletop")
class FlorenceVLM(FlorenceTensors):
    """Florence-2 of any size. `FlorenceVLM(config)` has random weights; see `create_vlm`."""

    def __init__(
        self,
        config: FlorenceConfig | Mapping[str, Any] | None = None,
        *,
        name: str = "florence-2-base",
        parts: FlorenceParts | None = None,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        quantization: str = "none",
        freeze_vision: bool = False,
        freeze_language: bool = False,
        adapter: str | Path | None = None,
        **options: Any,
    ) -> None:
        config = _checked_config(config, name)
        if parts is None:
            quantization_for(config, quantization)  # refused before the work, not after it
            where = place(device, dtype, attention)
            module = build_random(plan_for(config.to_transformers()), where)
            images = ImageSettings(config.image_size, config.image_size)
            parts = FlorenceParts(module, images, _settings(name))
        super().__init__(parts.module, name=name, **options)
        self._take(parts)
        self._finish(
            config,
            quantization=quantization,
            freeze_vision=freeze_vision,
            freeze_language=freeze_language,
            adapter=adapter,
        )

    @classmethod
    def create(
        cls,
        name: str,
        *,
        config: FlorenceConfig | Mapping[str, Any] | None = None,
        pretrained: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        quantization: str = "none",
        should_cancel: Callable[[], bool] | None = None,
        revision: str | None = None,
        weights_sha256: Sequence[str] = (),
        **options: Any,
    ) -> FlorenceVLM:
        """See `registry.create_vlm`. `revision`: hub commit or branch."""
        checked = _checked_config(config, name)
        quantization_for(checked, quantization)
        options |= {"name": name, "quantization": quantization}
        if config is not None and pretrained is None:
            return cls(checked, device=device, dtype=dtype, attention=attention, **options)
        if checked.vision_config or checked.text_config:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                "config changes the architecture, but the weights decide it",
                "leave out vision_config and text_config, or leave out pretrained",
            )
        weights = find_weights(model_info(name), pretrained, revision)
        check_sha256(weights.folder, weights_sha256, should_cancel)
        parts = read_folder(
            weights.folder,
            _settings(name),
            device=device,
            dtype=dtype,
            attention=attention,
            should_cancel=should_cancel or (lambda: False),
        )
        return cls(checked, parts=parts, revision=weights.revision, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in transformers' native layout that `create_vlm` loads again."""
        parts = FlorenceParts(self._whole_module(), self.images, self.settings, self.tokenizer)
        write_folder(Path(folder), parts)

    def load_pretrained(self, source: str, **options: Any) -> None:
        """Replace weights, configuration and tokenizer; device and dtype stay.

        An adapter goes with the weights that it was made for, and the new ones are not quantised.
        """
        weights = find_weights(model_info(self.name), source, options.pop("revision", None))
        parts = read_folder(
            weights.folder,
            _settings(self.name),
            device=self.device,
            dtype=self.dtype,
            attention=options.pop("attention", "auto"),
            should_cancel=options.pop("should_cancel", lambda: False),
        )
        self.revision = weights.revision
        self.frames.clear()
        self._take(parts)
        self.module.train(self.training)

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

    def rules(self, params: GenerationParams) -> DecodeRules:
        """Published settings, and what `params` asks for; sampling means one beam."""
        settings, text = self.settings, self.config.text_config
        sampling = params.temperature > 0
        beams = params.num_beams or (1 if sampling else settings.num_beams)
        if sampling and beams > 1:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"temperature {params.temperature} and num_beams {beams} exclude each other",
                "sample with num_beams 1, or search with temperature 0",
            )
        room = min(text.max_position_embeddings, self.limits.max_new_tokens)
        wanted = params.max_new_tokens or min(settings.max_new_tokens, room)
        if wanted > room:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"max_new_tokens is {wanted}, {self.name} has room for {room}",
            )
        return DecodeRules(
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

    def grammar(self, request: InferenceRequest) -> Grammar | None:
        """Whole boxes, quadrangles and polygons, as the task writes them."""
        task = FLORENCE_TASKS[request.task]
        if self.tokenizer is None or task.answer == "text":
            return None
        first = self.tokenizer.first_location
        if task.answer == "polygons":
            return OutlineGrammar(first, BINS)
        if task.answer == "quads":
            return BoxGrammar(first, BINS, size=8, ordered=False)
        # The n-gram rule may forbid what little an order leaves.
        ordered = not self.settings.no_repeat_ngram_size
        ids = self.tokenizer.tokenizer.convert_tokens_to_ids
        poly = ids("<poly>") if task.answer == "boxes_or_polygons" else None
        return BoxGrammar(first, BINS, ordered=ordered, unless=poly)

    def _scale(self) -> Scale | None:
        """Locations count as right when they are within 1 % of the image's side."""
        if self.tokenizer is None:
            return None
        return Scale(self.tokenizer.first_location, BINS, radius=BINS // 100)

    def decode_text(self, ids: Sequence[int]) -> str:
        """Text with its location tokens; begin, end and pad are left out."""
        return self._words().decode(ids)


def _settings(name: str) -> FlorenceSettings:
    """What holds where a folder states nothing: the published models have published settings."""
    return PUBLISHED if model_info(name).default_pretrained else FlorenceSettings()


def _checked_config(config: FlorenceConfig | Mapping[str, Any] | None, name: str) -> FlorenceConfig:
    """Our config from what was given. Raises ModelError BAD_CONFIG."""
    if isinstance(config, FlorenceConfig):
        return config
    known = {field.name for field in dataclasses.fields(FlorenceConfig)}
    given = dict(config or {})
    if strange := sorted(set(given) - known):
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            f"a Florence-2 config has no {', '.join(map(repr, strange))}",
            f"fields: {', '.join(sorted(known))}",
        )
    if name in variants():
        given.setdefault("variant", name)
    return FlorenceConfig(**given)
