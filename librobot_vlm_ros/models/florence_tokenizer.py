"""Florence-2's tokens: words, begin and end, and a thousand locations.

The official folders hold BART's tokenizer alone; their processor adds the location and task tokens
behind it, in the order below. Words of a user can never become one of those: what is encoded as
words is checked, and refused when a control token comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError, RequestError
from librobot_vlm_ros.models.causal_tokenizer import check_words
from librobot_vlm_ros.models.fast_tokenizer import read_fast, unbroken
from librobot_vlm_ros.models.florence_prompts import BINS

__all__ = ["ADDED_TOKENS", "FlorenceTokenizer"]

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
