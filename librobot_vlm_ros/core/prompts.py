"""Text from people made fit for a tokenizer: bounded, printable, and never a control token.

Tokenizers turn `<image>`, `<|im_end|>` or `<loc_12>` into single tokens wherever they stand. Text
from a topic or a service must stay words, so such tokens lose their brackets and keep their words:
`<loc_12>` becomes `loc_12`, `<|im_start|>` becomes `im_start`. The same text always gives the same
prompt.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

from librobot_vlm_ros.core.errors import ErrorCode, RequestError, bad_parameter
from librobot_vlm_ros.core.limits import DEFAULT_LIMITS, Limits
from librobot_vlm_ros.core.logtext import shortened

# What the families use, and what looks like it. Control tokens hold no white space, so that
# "a < b and c > d" is left alone.
_TOKEN_LIKE = re.compile(
    r"<{1,2}[^<>\s]{0,128}>{1,2}"  # <image>, </s>, <loc_12>, <OD>, <|im_end|>, <<SYS>>, <0x0A>
    r"|\[/?@?(?:INST|SYS|BOS|EOS|CLS|SEP|PAD|UNK|MASK|IMG|UNUSED_TOKEN_[0-9]{1,6})@?\]"
)

# Some normalisers (NFKC) read full-width characters as ASCII ones; ours has to see what they see.
_TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0xFE64: ord("<"),
    0xFE65: ord(">"),
}

_JOINERS = "\u200c\u200d"  # of use in Persian, Indic scripts and emoji, never next to ASCII
_PUNCTUATION = re.compile(r"[^\w\u0080-\U0010ffff]")
_MAX_ROUNDS = 8


def clean_prompt(
    text: object,
    *,
    required: bool,
    limits: Limits = DEFAULT_LIMITS,
    control_tokens: Iterable[object] = (),
) -> str:
    """`text` on one line, in Unicode normal form C, without control characters and control tokens.

    White space is collapsed; control and format characters and lone surrogates are removed; tokens
    that look like those of any family, and each of `control_tokens` (the model's own; strings, or
    objects whose `str()` is the token), are reduced to their words. Cleaning a cleaned prompt
    changes nothing.

    Raises `RequestError`: BAD_PARAMETER (not a string), PROMPT_TOO_LONG (before anything else is
    looked at), EMPTY_PROMPT (`required` and nothing is left), CONTROL_TOKEN_IN_PROMPT for a control
    token that is nothing but a word, so that no harmless spelling of it is left.
    """
    if not isinstance(text, str):
        raise bad_parameter(f"prompt is of type {type(text).__name__}, expected a string")
    _check_length(text, limits)
    # Twice: singletons such as the Kelvin sign become ASCII first, and what was apart may compose.
    cleaned = _without_control_characters(unicodedata.normalize("NFC", text))
    cleaned = unicodedata.normalize("NFC", cleaned)
    _check_length(cleaned, limits)
    cleaned = _neutralised(_collapsed(cleaned), _odd(tuple(map(str, control_tokens))))
    if required and not cleaned:
        raise RequestError(
            ErrorCode.EMPTY_PROMPT,
            "prompt is empty" if not text.strip() else "prompt has no readable character",
            "Send what to look for, or the question, as the prompt.",
        )
    return cleaned


def _check_length(text: str, limits: Limits) -> None:
    if len(text) > limits.max_prompt_chars:
        raise RequestError(
            ErrorCode.PROMPT_TOO_LONG,
            f"prompt has {len(text)} characters, allowed are {limits.max_prompt_chars}",
            "Shorten it.",
        )


def _without_control_characters(text: str) -> str:
    if text.isprintable():
        return text
    kept = []
    for index, character in enumerate(text):
        if character.isprintable():
            kept.append(character)
        elif character.isspace():
            kept.append(" ")
        elif (character in _JOINERS and _between_letters(text, index)) or unicodedata.category(
            character
        ) in ("Co", "Cn"):
            kept.append(character)
    return "".join(kept)


def _between_letters(text: str, index: int) -> bool:
    """Whether both neighbours are beyond ASCII, full-width forms being ASCII here."""
    around = text[index - 1 : index] + text[index + 1 : index + 2]
    folded = around.translate(_TO_ASCII)
    return len(folded) == 2 and all(
        not character.isascii() and character.isprintable() for character in folded
    )


def _words(token: str) -> str:
    """`token` with blanks for its punctuation and around it.

    The blanks keep what stands outside from joining into a new token.
    """
    kept = (
        " " if _PUNCTUATION.match(folded) else character
        for character, folded in zip(token, token.translate(_TO_ASCII), strict=True)
    )
    return f" {''.join(kept)} "


@functools.lru_cache(maxsize=8)
def _odd(control_tokens: tuple[str, ...]) -> list[str]:
    """Those that don't look like control tokens, sorted; a model's are the same every time."""
    odd = {token for token in control_tokens if token.strip() and not _TOKEN_LIKE.fullmatch(token)}
    return sorted(odd)


def _neutralised(text: str, tokens: list[str]) -> str:
    for _ in range(_MAX_ROUNDS):
        changed = _replaced(text, _TOKEN_LIKE)
        folded = changed.translate(_TO_ASCII)
        for token in tokens:
            if token in folded:
                changed = _replaced(changed, re.compile(re.escape(token)))
        changed = _collapsed(changed)
        if changed == text:
            break
        text = changed
    folded = text.translate(_TO_ASCII)
    for token in tokens:
        if token in folded:
            raise RequestError(
                ErrorCode.CONTROL_TOKEN_IN_PROMPT,
                f"prompt holds '{shortened(token)}', which is a control token of the model",
                "Use another word.",
            )
    return text


def _replaced(text: str, pattern: re.Pattern[str]) -> str:
    """Every match of `pattern` reduced to its words; full-width forms match as ASCII ones."""
    pieces, last = [], 0
    for match in pattern.finditer(text.translate(_TO_ASCII)):  # same length, so same positions
        pieces += [text[last : match.start()], _words(text[match.start() : match.end()])]
        last = match.end()
    return "".join(pieces) + text[last:]


def _collapsed(text: str) -> str:
    return " ".join(text.split())
