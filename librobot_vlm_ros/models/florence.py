"""Florence-2 (Xiao et al., 2023, arXiv:2311.06242) on transformers' own Florence-2 class.

One image, one sentence that names the task, one answer in words and location tokens. The
published base and large models and the tabletop model of this package are all this class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from librobot_vlm_ros.core import (
    GenerationParams,
    InferenceRequest,
    ModelAnswer,
    clean_prompt,
)
from librobot_vlm_ros.models.answering import Job
from librobot_vlm_ros.models.checkpoint import build_random
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
from librobot_vlm_ros.models.making import Loading
from librobot_vlm_ros.models.placement import Placement
from librobot_vlm_ros.models.preprocess import ImageSettings, normalise, squash
from librobot_vlm_ros.models.registry import model_info, register_vlm

__all__ = ["FlorenceConfig", "FlorenceVLM"]


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
        if isinstance(config, FlorenceConfig) or name in variants():
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

    def rules(self, params: GenerationParams) -> DecodeRules:
        """Published settings, and what `params` asks for; sampling means one beam."""
        settings, text = self.settings, self.config.text_config
        beams, wanted = self._asked(
            params,
            beams=1 if params.temperature > 0 else settings.num_beams,
            tokens=settings.max_new_tokens,
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
