"""Florence-2's prompts, tokens and answers.

A task is an English sentence, a region four location tokens; sentences as published with the model
(microsoft/Florence-2-large, processing_florence2.py, MIT). Answers are text with location tokens:
``red cube<loc_10><loc_20><loc_300><loc_400>`` is a label with a box in thousandths of the image.
Coordinates are given as the centre of their bin, (bin + 0.5) * size / 1000, as floats. What can't
be read as a region is counted, never guessed: a box that lacks a coordinate or is inside out, a
label without a box, a polygon of fewer than three points.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from librobot_vlm_ros.core import (
    ErrorCode,
    GenerationParams,
    InferenceRequest,
    ModelError,
    Region,
    RequestError,
)
from librobot_vlm_ros.core.requests import MAX_BEAMS
from librobot_vlm_ros.models.configuration import (
    bad_value,
    check_integer,
    check_number,
    check_token,
)
from librobot_vlm_ros.models.families.florence2.configuration import image_tokens
from librobot_vlm_ros.models.generation.config import (
    CoordinateBins,
    GenerationConfig,
    TokenConstraint,
)
from librobot_vlm_ros.models.generation.constraints.location_tokens import (
    BoxConstraint,
    PolygonConstraint,
)
from librobot_vlm_ros.models.generation.scores import AnswerText, Score, unknown
from librobot_vlm_ros.models.inputs.input_ids import token_rows
from librobot_vlm_ros.models.inputs.preprocess import ImageSettings, Resizing, squash
from librobot_vlm_ros.models.inputs.tokenizer import check_words, read_fast, unbroken
from librobot_vlm_ros.models.processor import Box, Processor, Size
from librobot_vlm_ros.models.registry import model_info

#: Coordinates are written in thousandths of the image's width and height.
BINS = 1000

Answer = Literal[
    "text", "boxes", "grounding", "proposals", "quads", "polygons", "boxes_or_polygons"
]


@dataclass(frozen=True)
class FlorenceTask:
    """One task: its own name, the sentence that asks for it, and what the answer looks like."""

    native: str
    sentence: str
    answer: Answer
    #: "text" or "region" where `{input}` in the sentence stands for one.
    takes: Literal["", "text", "region"] = ""


FLORENCE_TASKS: Mapping[str, FlorenceTask] = {
    "caption": FlorenceTask("<CAPTION>", "What does the image describe?", "text"),
    "detailed_caption": FlorenceTask(
        "<DETAILED_CAPTION>", "Describe in detail what is shown in the image.", "text"
    ),
    "more_detailed_caption": FlorenceTask(
        "<MORE_DETAILED_CAPTION>",
        "Describe with a paragraph what is shown in the image.",
        "text",
    ),
    "detect": FlorenceTask("<OD>", "Locate the objects with category name in the image.", "boxes"),
    "dense_region_caption": FlorenceTask(
        "<DENSE_REGION_CAPTION>",
        "Locate the objects in the image, with their descriptions.",
        "boxes",
    ),
    "region_proposal": FlorenceTask(
        "<REGION_PROPOSAL>", "Locate the region proposals in the image.", "proposals"
    ),
    "ocr": FlorenceTask("<OCR>", "What is the text in the image?", "text"),
    "ocr_with_region": FlorenceTask(
        "<OCR_WITH_REGION>", "What is the text in the image, with regions?", "quads"
    ),
    "ground": FlorenceTask(
        "<CAPTION_TO_PHRASE_GROUNDING>",
        "Locate the phrases in the caption: {input}",
        "grounding",
        "text",
    ),
    "open_vocabulary_detect": FlorenceTask(
        "<OPEN_VOCABULARY_DETECTION>",
        "Locate {input} in the image.",
        "boxes_or_polygons",
        "text",
    ),
    "segment": FlorenceTask(
        "<REFERRING_EXPRESSION_SEGMENTATION>",
        "Locate {input} in the image with mask",
        "polygons",
        "text",
    ),
    "region_segment": FlorenceTask(
        "<REGION_TO_SEGMENTATION>",
        "What is the polygon mask of region {input}",
        "polygons",
        "region",
    ),
    "region_category": FlorenceTask(
        "<REGION_TO_CATEGORY>", "What is the region {input}?", "text", "region"
    ),
    "region_caption": FlorenceTask(
        "<REGION_TO_DESCRIPTION>", "What does the region {input} describe?", "text", "region"
    ),
    "region_ocr": FlorenceTask(
        "<REGION_TO_OCR>", "What text is in the region {input}?", "text", "region"
    ),
}


def build_prompt(
    task: FlorenceTask, text: str, region: Box | None, width: int, height: int
) -> list[str | tuple[int, ...]]:
    """The prompt as pieces: a string is words, a tuple of ints is location bins.

    The pieces keep apart what we put in from what a user wrote: location tokens come from a
    region only, never from text. `region` is (x_min, y_min, x_max, y_max) in pixels.
    Raises RequestError EMPTY_PROMPT, BAD_REGION, or BAD_PARAMETER for text that nobody would read.
    """
    before, hole, after = task.sentence.partition("{input}")
    if task.takes == "text":
        if not text.strip():
            raise RequestError(
                ErrorCode.EMPTY_PROMPT, f"{task.native} needs a text: what to look for"
            )
        return [before + text.strip() + after]
    if text.strip():
        raise RequestError(
            ErrorCode.BAD_PARAMETER,
            f"{task.native} takes no text, but got {text.strip()[:80]!r}",
            "leave the prompt empty, or use a task that takes one, such as ground",
        )
    if not hole:
        return [before]
    if region is None:
        raise RequestError(
            ErrorCode.BAD_REGION, f"{task.native} needs a region: x_min, y_min, x_max, y_max"
        )
    return [before, location_bins(region, width, height), after]


def location_bins(region: Box, width: int, height: int) -> tuple[int, ...]:
    """Pixels to bins 0 to 999, x and y in turn: the bin that the pixel coordinate falls into."""
    sizes = (width, height)
    return tuple(
        min(BINS - 1, max(0, int(value * BINS // sizes[place % 2])))
        for place, value in enumerate(region)
    )


_LOCATIONS = tuple(f"<loc_{number}>" for number in range(BINS))
#: What the official processor adds to BART's vocabulary, in this order.
ADDED_TOKENS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *_LOCATIONS,
    *("<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>"),
    *("<grounding>", "</grounding>", "<seg>", "</seg>", "<sep>"),
    *("<region_cap>", "</region_cap>"),
    *("<region_to_desciption>", "</region_to_desciption>"),  # spelt so in the original
    *("<proposal>", "</proposal>", "<poly>", "</poly>", "<and>"),
)
_IMAGE = "<image>"


class FlorenceTokenizer:
    """Words to ids and back, for one Florence-2 configuration.

    Raises ModelError TOKENIZER_MISMATCH when the tokens do not fit the configuration.
    """

    def __init__(self, tokenizer: Any, config: Any) -> None:
        self.tokenizer = tokenizer
        text = config.text_config
        self.bos, self.eos, self.pad = text.bos_token_id, text.eos_token_id, text.pad_token_id
        vocabulary = tokenizer.get_vocab()
        self._check(vocabulary, text.vocab_size, config.image_token_id)
        #: Number of tokens; ids from here on are padding of the model's tables.
        self.size = max(vocabulary.values()) + 1
        #: Id of <loc_0>.
        self.first_location = vocabulary[_LOCATIONS[0]]
        unknown = tokenizer.unk_token_id
        added = {*tokenizer.get_added_vocab(), *ADDED_TOKENS, _IMAGE}
        #: Spellings that are tokens of their own; a user's text must hold none of them.
        self.control_tokens = tuple(sorted(added & {*vocabulary, _IMAGE}))
        ids = {vocabulary[token] for token in self.control_tokens if token in vocabulary}
        self.control_ids = frozenset(ids | {self.bos, self.eos, self.pad}) - {unknown}

    @classmethod
    def from_folder(cls, folder: Path, config: Any) -> FlorenceTokenizer:
        """Read tokenizer.json, adding the location and task tokens where it has none."""
        from tokenizers import AddedToken
        from transformers import PreTrainedTokenizerFast

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{folder} holds no tokenizer.json",
                "copy it from the model's repository into the folder",
            )
        backend = read_fast(path)
        if backend.token_to_id(_LOCATIONS[0]) is None:
            backend.add_special_tokens(
                [AddedToken(token, special=True, normalized=False) for token in ADDED_TOKENS]
            )
        text = config.text_config
        named = {
            name: backend.id_to_token(number)
            for name, number in (
                ("bos_token", text.bos_token_id),
                ("eos_token", text.eos_token_id),
                ("pad_token", text.pad_token_id),
            )
        }
        unknown = next((t for t in ("<unk>", "[UNK]") if backend.token_to_id(t) is not None), None)
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, **named)
        new = cls(fast, config)
        check_words(path.name, new.words)
        return new

    def words(self, text: str) -> list[int]:
        """Ids of words. Raises RequestError CONTROL_TOKEN_IN_PROMPT when one is no word."""
        ids = unbroken(self.tokenizer, text, add_special_tokens=False)["input_ids"]
        strange = [token for token in ids if token in self.control_ids]
        if strange:
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(strange[:3]))
            raise RequestError(
                ErrorCode.CONTROL_TOKEN_IN_PROMPT,
                f"the prompt holds control tokens of the model: {names}",
                "write it in words; give a region as numbers in the request",
            )
        return list(ids)

    def prompt(self, pieces: Sequence[str | tuple[int, ...]]) -> list[int]:
        """`<s>` pieces `</s>`: strings as words, tuples as location bins."""
        ids = [self.bos]
        for piece in pieces:
            if isinstance(piece, str):
                ids += self.words(piece)
            else:
                ids += [self.first_location + number for number in piece]
        return [*ids, self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        """Text with its location tokens; begin, end and pad are left out.

        Nothing stands between a control token and the words next to it, as in training data.
        """
        text, run = "", []
        for token in ids:
            if token not in self.control_ids:
                run.append(token)
                continue
            text += self._decode_words(run)
            run = []
            if token not in (self.bos, self.eos, self.pad):
                text += self.tokenizer.convert_ids_to_tokens(token) or ""
        return text + self._decode_words(run)

    def _decode_words(self, ids: list[int]) -> str:
        if not ids:
            return ""
        text: str = unbroken(
            self.tokenizer.decode,
            ids,
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return text

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        self.tokenizer.save_pretrained(str(folder))

    def _check(self, vocabulary: dict[str, int], size: int, image_token: int) -> None:
        first = vocabulary.get(_LOCATIONS[0], -1)
        if [vocabulary.get(token) for token in _LOCATIONS] != list(range(first, first + BINS)):
            self._refuse("it has no <loc_0> to <loc_999> in a row")
        if max(vocabulary.values()) >= size:
            self._refuse(f"it has {max(vocabulary.values()) + 1} tokens, the model {size}")
        names = {number: token for token, number in vocabulary.items()}
        if names.get(image_token, _IMAGE) != _IMAGE:
            self._refuse(f"token {image_token} marks the image but is {names[image_token]!r} in it")
        for what, number in (("begin", self.bos), ("end", self.eos), ("pad", self.pad)):
            if number not in names:
                self._refuse(f"the {what} token {number} is not in it")

    @staticmethod
    def _refuse(what: str) -> None:
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH,
            f"the tokenizer does not fit config.json: {what}",
            "use the tokenizer.json that came with the weights",
        )


_TOKEN = re.compile(
    r"<loc_(?P<loc>\d{1,6})>|<(?P<mark>/?poly|sep)>"
    r"|<(?:/?s|pad|unk|/?od|/?ocr|/?cap|/?ncap|/?dcap|/?grounding|/?seg|/?region_cap"
    r"|/?region_to_desciption|/?proposal|and|ground|obj)>"
    r"|(?P<text>[^<]+|<)"
)
_LOCATION_RUN = re.compile(r"\s*(?:<loc_\d+>)+\s*")

#: Words that the published post-processing does not take for objects when grounding a caption.
NOT_GROUNDED = frozenset(
    """
    I a all an another any anybody anyone anything each everybody everyone everything few he her
    hers herself him himself his image images it its itself lots many me mine myself nobody none
    one oneself our ours ourselves several she some somebody someone something that the their
    theirs them themselves these they this those us we what which who whom whose you your yours
    yourself yourselves
    """.split()  # noqa: SIM905 (one word a line would be seventy)
) | {"other objects", "the image", "one another", "each other", "a set", "a group"}


@dataclass
class _Piece:
    """A label and the runs of locations behind it; each run is a list of (bin, begin, end)."""

    words: str = ""
    span: tuple[int, int] = (0, 0)
    runs: list[list[tuple[int, int, int]]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.words.strip()


def parse_answer(
    text: str,
    answer: Answer,
    width: int,
    height: int,
    *,
    score: Score = unknown,
    default_label: str = "",
) -> tuple[tuple[Region, ...], int]:
    """Regions in pixels of a width x height image, and how many pieces could not be read.

    `default_label` names polygons, which the model writes without a label.
    """
    if answer == "text":
        return (), 0
    polygons = answer == "polygons" or (answer == "boxes_or_polygons" and "<poly>" in text)
    reader = _Reader(width, height, score)
    for piece in _pieces(text):
        if polygons:
            reader.polygons(piece, piece.label or default_label)
        elif answer == "quads":
            reader.quad(piece)
        elif answer == "grounding" and piece.label in NOT_GROUNDED:
            continue
        else:
            reader.boxes(piece, label_needed=answer != "proposals")
    return tuple(reader.regions), reader.malformed


def without_locations(text: str) -> str:
    """The words of an answer, location tokens left out."""
    return _LOCATION_RUN.sub(" ", text).strip()


def _pieces(text: str) -> Iterator[_Piece]:
    piece = _Piece()
    broken = True  # whether the next location begins a run of its own
    for match in _TOKEN.finditer(text):
        if (location := match["loc"]) is not None:
            if broken:
                piece.runs.append([])
                broken = False
            piece.runs[-1].append((int(location), match.start(), match.end()))
        elif (words := match["text"]) is not None:
            if not words.strip():
                continue
            if piece.runs:
                yield piece
                piece = _Piece()
            piece.span = (piece.span[0] if piece.words else match.start(), match.end())
            piece.words += words
            broken = True
        elif match["mark"]:
            broken = True
    if piece.label or piece.runs:
        yield piece


class _Reader:
    """Collects regions and counts what is none."""

    def __init__(self, width: int, height: int, score: Score) -> None:
        self.regions: list[Region] = []
        self.malformed = 0
        self._scale = (width / BINS, height / BINS)
        self._score = score

    def boxes(self, piece: _Piece, *, label_needed: bool) -> None:
        """Every four locations are a box of the label."""
        locations = [location for run in piece.runs for location in run]
        self._count_rest(locations, 4)
        for begin in range(0, len(locations) - 3, 4):
            corners = locations[begin : begin + 4]
            points = self._points(corners)
            if (label_needed and not piece.label) or not points or not _is_box(points):
                self.malformed += 1
                continue
            self._add(piece, piece.label, points, corners, outlined=False)

    def quad(self, piece: _Piece) -> None:
        """Eight locations behind a text are the corners of where it is written."""
        locations = [location for run in piece.runs for location in run]
        corners = locations[:8]
        self._count_rest(locations, 8)
        self.malformed += max(0, len(locations) // 8 - 1)  # a text is written in one place
        if len(corners) < 8:
            return
        points = self._points(corners)
        if not piece.label or not points:
            self.malformed += 1
            return
        self._add(piece, piece.label, points, corners, outlined=True)

    def polygons(self, piece: _Piece, label: str) -> None:
        """Every run of locations is a polygon."""
        if not piece.runs:
            self.malformed += 1
        for run in piece.runs:
            points = self._points(run[: len(run) // 2 * 2])
            if len(points) < 3:
                self.malformed += 1
                continue
            self.malformed += len(run) % 2  # half a point is left over
            self._add(piece, label, points, run, outlined=True)

    def _count_rest(self, locations: Sequence[object], size: int) -> None:
        """A label without locations, and locations that make no whole shape, count as one each."""
        self.malformed += 1 if not locations or len(locations) % size else 0

    def _points(self, locations: Sequence[tuple[int, int, int]]) -> list[tuple[float, float]]:
        """Pixels of pairs of bins; nothing when a bin does not exist."""
        if any(location[0] >= BINS for location in locations):
            return []
        values = [
            (location[0] + 0.5) * self._scale[place % 2] for place, location in enumerate(locations)
        ]
        return list(zip(values[::2], values[1::2], strict=True))

    def _add(
        self,
        piece: _Piece,
        label: str,
        points: Sequence[tuple[float, float]],
        locations: Sequence[tuple[int, int, int]],
        *,
        outlined: bool,
    ) -> None:
        written = [(begin, end) for _, begin, end in locations]
        self.regions.append(
            Region(
                label=label,
                score=self._score(piece.span if piece.label else None, written),
                x_min=min(x for x, _ in points),
                y_min=min(y for _, y in points),
                x_max=max(x for x, _ in points),
                y_max=max(y for _, y in points),
                polygon=tuple(points) if outlined else (),
            )
        )


def _is_box(points: Sequence[tuple[float, float]]) -> bool:
    (x_min, y_min), (x_max, y_max) = points
    return x_min <= x_max and y_min <= y_max


_FILE = "generation_config.json"
#: Integers, from and to; beams as a request may ask for them.
_BOUNDS: dict[str, tuple[int, int | None]] = {
    "num_beams": (1, MAX_BEAMS),
    "max_new_tokens": (1, None),
    "no_repeat_ngram_size": (0, 1024),
    "forced_bos_token_id": (0, None),
    "forced_eos_token_id": (0, None),
}
#: An answer's length to a power beyond it is no number.
_MAX_PENALTY = 10.0


@dataclass(frozen=True)
class FlorenceSettings:
    """How a checkpoint is meant to be decoded."""

    num_beams: int = 1
    no_repeat_ngram_size: int = 0
    #: Token that stands first, and the one that stands last when the room is used up.
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    early_stopping: bool = False
    length_penalty: float = 1.0
    max_new_tokens: int = 1024

    def overlaid(self, found: Mapping[str, Any], file: str = _FILE) -> FlorenceSettings:
        """These settings with those that `found` (the content of `file`) states."""
        stated = {k: v for k, v in found.items() if k in vars(self) and v is not None}
        if "max_new_tokens" not in stated and found.get("max_length"):
            check_integer(f"{file}: max_length", found["max_length"], 2)
            stated["max_new_tokens"] = found["max_length"] - 1  # the start token counts there
        for name, value in stated.items():
            _check(file, name, value)
        return dataclasses.replace(self, **stated)

    def check_vocabulary(self, size: int) -> None:
        """Raises ModelError BAD_CONFIG for a token that a model of this vocabulary has not."""
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            if (token := getattr(self, name)) is not None:
                check_token(f"{_FILE} or config.json: {name}", token, size)


def _check(file: str, name: str, value: Any) -> None:
    """Raises ModelError BAD_CONFIG for a value that no answer can be decoded by."""
    field = f"{file}: {name}"
    if name in _BOUNDS:
        check_integer(field, value, *_BOUNDS[name])
    elif name == "length_penalty":
        check_number(field, value, -_MAX_PENALTY, _MAX_PENALTY)
    elif not isinstance(value, bool):
        raise bad_value(field, value, "true or false")


#: Settings published with microsoft/Florence-2-base and -large. Conversions to transformers' layout
#: lose the forced first token, the n-gram rule and the beams, so they stand here.
PUBLISHED = FlorenceSettings(
    num_beams=3,
    no_repeat_ngram_size=3,
    forced_bos_token_id=0,
    forced_eos_token_id=2,
    early_stopping=True,
)


class FlorenceProcessor(Processor):
    """Florence-2's processor. Raises ImageError where images of that size don't fit the tower."""

    def __init__(
        self,
        name: str,
        config: Any,
        images: ImageSettings,
        tokenizer: FlorenceTokenizer | None = None,
        settings: FlorenceSettings | None = None,
    ) -> None:
        super().__init__(name, config, images, tokenizer)
        self.settings = published_settings(name) if settings is None else settings
        # Fails now, not at the first frame.
        self.image_tokens = image_tokens(config.vision_config, images.height, images.width)

    # Pixels.

    def pixels(self, image: Any, how: Resizing) -> Any:
        """See `Processor`."""
        return squash(image, self.images, how)

    def input_size(self, width: int, height: int) -> Size | None:
        """The same for all images."""
        return self.images.width, self.images.height

    def count(self, prepared: Any) -> int:
        """See `Processor`."""
        return self.image_tokens

    def refuse_too_long(self, image: int, prompt: int, answer: int) -> None:
        """See `Processor`; the answer is the decoder's and has room of its own."""
        room = self.config.text_config.max_position_embeddings
        if image + prompt > room:
            raise RequestError(
                ErrorCode.PROMPT_TOO_LONG,
                f"image and prompt take {image + prompt} tokens, {self.name} has room for {room}",
                "shorten the prompt",
            )

    # Prompts.

    def chat(self, words: str, views: int = 1) -> list[int]:
        """See `Processor`; the words as they are, between begin and end."""
        return list(self.words().prompt([words]))

    def prompt(
        self, task: str, text: str, region: Box | None, size: Size | None, views: int = 1
    ) -> list[int]:
        """See `Processor`."""
        pieces = build_prompt(FLORENCE_TASKS[task], text, region, *(size or (1, 1)))
        return list(self.words().prompt(pieces))

    def ids(self, text: Any, attention_mask: Tensor | None) -> list[list[int]]:
        """Prompts as lists of ids: strings between begin and end, ids without image and padding."""
        if isinstance(text, str):
            text = [text]
        if text is None or len(text) == 0:
            raise RequestError(ErrorCode.EMPTY_PROMPT, "neither text nor input_ids were given")
        if isinstance(text[0], str):
            return [self.chat(self.clean(row, False)) for row in text]
        image, size = self.config.image_token_id, int(self.config.text_config.vocab_size)
        rows = token_rows(text, attention_mask, size, (image,))
        return [[token for token in row if token != image] for row in rows]

    def ids_in_sentence(
        self, task: str, ids: Any, attention_mask: Tensor | None
    ) -> list[list[int]]:
        """The task's sentence with token ids in the place of its input, or behind it."""
        self.refuse_unable(task)
        spec, tokenizer = FLORENCE_TASKS[task], self.words()
        before, _, after = spec.sentence.partition("{input}")
        if spec.takes != "region":
            before = before.rstrip()  # a word's id holds the space before it, a location's does not
        outer = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
        head, tail = tokenizer.words(before), tokenizer.words(after)
        return [
            [tokenizer.bos, *head, *(t for t in row if t not in outer), *tail, tokenizer.eos]
            for row in self.ids(ids, attention_mask)
        ]

    # Answers.

    def coordinates(self) -> CoordinateBins | None:
        """Locations count as right when they are within 1 % of the image's side."""
        if self.tokenizer is None:
            return None
        return CoordinateBins(self.tokenizer.first_location, BINS, radius=BINS // 100)

    def generation_config(self, params: GenerationParams) -> GenerationConfig:
        """Published settings, and what `params` asks for; sampling means one beam."""
        settings, text = self.settings, self.config.text_config
        beams, wanted = self.asked(
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
            suppressed=tuple(self.suppressed()),
            length_penalty=settings.length_penalty,
            early_stopping=settings.early_stopping,
            coordinates=self.coordinates(),
        )

    def constraint(self, task: str) -> TokenConstraint | None:
        """Whole boxes, quadrangles and polygons, as the task writes them."""
        if not self.writes_regions(task):
            return None
        first, answer = self.tokenizer.first_location, FLORENCE_TASKS[task].answer
        if answer == "polygons":
            return PolygonConstraint(first, BINS)
        if answer == "quads":
            return BoxConstraint(first, BINS, size=8, ordered=False)
        # The n-gram rule may forbid what little an order leaves.
        ordered = not self.settings.no_repeat_ngram_size
        ids = self.tokenizer.tokenizer.convert_tokens_to_ids
        poly = ids("<poly>") if answer == "boxes_or_polygons" else None
        return BoxConstraint(first, BINS, ordered=ordered, unless=poly)

    def regions(
        self, request: InferenceRequest, answer: AnswerText
    ) -> tuple[tuple[Region, ...], int]:
        """See `Processor`."""
        task, frame = FLORENCE_TASKS[request.task], request.frame
        return parse_answer(
            answer.text,
            task.answer,
            frame.width,
            frame.height,
            score=answer.region,
            default_label=request.prompt if task.takes == "text" else "",
        )

    def plain_text(self, text: str) -> str:
        """See `Processor`."""
        return without_locations(text)

    def save(self, folder: Path) -> None:
        """See `Processor`."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        text = self.config.text_config
        generation = {
            **{k: v for k, v in dataclasses.asdict(self.settings).items() if v is not None},
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": text.pad_token_id,
            "decoder_start_token_id": text.decoder_start_token_id,
        }
        for file, content in (
            (_FILE, generation),
            ("preprocessor_config.json", self.images.to_json()),
        ):
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def published_settings(name: str) -> FlorenceSettings:
    """What holds where a folder states nothing: the published models have published settings."""
    return PUBLISHED if model_info(name).default_pretrained else FlorenceSettings()
