"""Models that continue a row of image vectors and words: made, loaded, and asked.

A family gives its configuration, its folders, its prompts, its images and its way of reading
answers; the rest is here and in `causal_tensors.py`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from librobot_vlm_ros.core import (
    ErrorCode,
    GenerationParams,
    InferenceRequest,
    ModelAnswer,
    Region,
    RequestError,
)
from librobot_vlm_ros.models.answering import Job
from librobot_vlm_ros.models.causal_images import Seen
from librobot_vlm_ros.models.causal_tensors import CausalParts, CausalTensors
from librobot_vlm_ros.models.checkpoint import LoadPlan, build_random
from librobot_vlm_ros.models.decode import Decoder, DecodeRules, Generated, Grammar
from librobot_vlm_ros.models.detokenize import TokenSpans, geometric_mean
from librobot_vlm_ros.models.frame_cache import FrameEntry
from librobot_vlm_ros.models.notation import Notation
from librobot_vlm_ros.models.notation_grammar import notation_grammar
from librobot_vlm_ros.models.placement import Placement

__all__ = ["CausalParts", "CausalVLM"]


class CausalVLM(CausalTensors):
    """Such a model of any family."""

    #: How the family writes boxes as text; None where it has tokens for them, or writes none.
    notation: ClassVar[Notation | None] = None

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

    def _look_at(self, jobs: Sequence[Job]) -> list[Seen]:
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

    def rules(self, params: GenerationParams) -> DecodeRules:
        """Greedy, or what `params` asks for; sampling means one beam."""
        text = self.config.text_config
        beams, wanted = self._asked(params, beams=1, tokens=self.default_new_tokens)
        ends = self._ends()
        return DecodeRules(
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

    def grammar(self, request: InferenceRequest) -> Grammar | None:
        """Whole boxes, where the family writes them as text."""
        if self.notation is None or self.tokenizer is None or request.spec.output == "text":
            return None
        return notation_grammar(self.tokenizer, self.notation, self._ends())

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
