"""What the text model is asked and what it must answer, for one scene.

Answers are token numbers with, for location tokens, the exact coordinate beside them, so that the
loss can spread a target over neighbouring bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from librobot_vlm_ros.tabletop.labels import COLOURED_KINDS, LABELS
from librobot_vlm_ros.tabletop.network import (
    EOS,
    INSTRUCTIONS,
    PAIRS,
    PROMPTS,
    build_tokenizer,
    to_bin,
)
from librobot_vlm_ros.tabletop.samples import Sample


@dataclass
class Question:
    """Prompt token numbers, answer token numbers (ending in </s>), and for each answer token the
    location 0..1 it stands for, or -1 for a word."""

    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    place: list[float] = field(default_factory=list)

    def words(self, text: str) -> None:
        """Append words to the answer."""
        tokens = _tokens(text)
        self.answer += tokens
        self.place += [-1.0] * len(tokens)

    def box(self, box: Sequence[float]) -> None:
        """Append the four location tokens of a box in 0..1."""
        first = _loc_0()
        for value in box:
            self.answer.append(first + to_bin(value, 1.0))
            self.place.append(float(value))

    def end(self) -> Question:
        """Append </s>."""
        self.answer.append(EOS)
        self.place.append(-1.0)
        return self


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return build_tokenizer()


@lru_cache(maxsize=1)
def _loc_0() -> int:
    return int(_tokenizer().convert_tokens_to_ids("<loc_0>"))


@lru_cache(maxsize=4096)
def _tokens(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer()(text, add_special_tokens=False).input_ids)


def caption_of(labels: Sequence[str]) -> str:
    """``"a red cube, a duck and a blue ball on the table"``: the objects, left to right."""
    named = [f"a {label}" for label in labels]  # none starts with a vowel
    listed = ", ".join(named[:-1]) + " and " + named[-1] if len(named) > 1 else named[0]
    return f"{listed} on the table"


def caption_question(labels: Sequence[str]) -> Question:
    """<CAPTION>."""
    question = Question([*_tokens(PROMPTS["caption"])])
    question.words(caption_of(labels))
    return question.end()


def detect_question(labels: Sequence[str], boxes: np.ndarray) -> Question:
    """<OD>: every object with its box, left to right."""
    question = Question([*_tokens(PROMPTS["detect"])])
    for label, box in zip(labels, boxes, strict=True):
        question.words(label)
        question.box(box)
    return question.end()


def _phrase(labels: Sequence[str], number: int, rng: np.random.Generator) -> str:
    """How to name an object: its label, or its kind alone where there is only one of that kind."""
    label = labels[number]
    kind = label.partition(" ")[2] if label.partition(" ")[2] in COLOURED_KINDS else label
    alone = sum(other.endswith(kind) for other in labels) == 1
    if kind != label and alone and rng.random() < 0.15:
        return kind
    return label


def ground_question(
    labels: Sequence[str], boxes: np.ndarray, rng: np.random.Generator, absent: float = 0.12
) -> Question:
    """<CAPTION_TO_PHRASE_GROUNDING>: one or two phrases; an absent one has no box."""
    count = 2 if rng.random() < 0.3 and len(labels) > 1 else 1
    picks = [int(i) for i in rng.permutation(len(labels))[:count]]
    phrases = [(_phrase(labels, pick, rng), pick) for pick in picks]
    if rng.random() < absent:
        missing = [label for label in LABELS if label not in labels]
        phrases[0] = (str(rng.choice(missing)), -1)
    if count == 1:
        form = INSTRUCTIONS[int(rng.integers(len(INSTRUCTIONS))) if rng.random() < 0.6 else 0]
    else:
        form = PAIRS[int(rng.integers(len(PAIRS)))]
    text = form.format(*(phrase for phrase, _ in phrases))
    question = Question([*_tokens(PROMPTS["ground"].format(input="")), *_tokens(text)])
    for phrase, pick in phrases:
        if pick >= 0:
            question.words(phrase)
            question.box(boxes[pick])
    return question.end()


def questions_of(sample: Sample, rng: np.random.Generator) -> list[Question]:
    """Three questions on a frame: detection, a grounding, and a caption or another grounding."""
    third = (
        caption_question(sample.labels) if rng.random() < 0.6
        else ground_question(sample.labels, sample.boxes, rng)
    )  # fmt: skip
    return [
        detect_question(sample.labels, sample.boxes),
        ground_question(sample.labels, sample.boxes, rng),
        third,
    ]
