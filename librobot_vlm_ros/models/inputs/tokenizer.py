"""Words to token ids and back, from tokenizer.json or a sentencepiece tokenizer.model.

A user's words can never become a control token: what is encoded as words is checked, and refused
when one comes out. Each piece of a prompt is encoded on its own, as the original code of these
models encodes what stands before and after an image.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError, RequestError
from librobot_vlm_ros.models.checkpoints.shards import read_json
from librobot_vlm_ros.models.configuration import check_token


def read_fast(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a file. Raises ModelError TOKENIZER_MISMATCH.

    Prompts are neither padded nor truncated: what the file says of that is how somebody once
    trained, and transformers does not follow it either.
    """
    from tokenizers import Tokenizer

    try:
        backend = unbroken(Tokenizer.from_file, str(path))
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH, f"{path.name} cannot be read: {error}"
        ) from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def unbroken(call: Callable[..., Any], *words: Any, **options: Any) -> Any:
    """`call(...)` of the library tokenizers, whose panics are no `Exception` and would end the
    thread. Raises ModelError TOKENIZER_MISMATCH for them.
    """
    try:
        return call(*words, **options)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH,
            f"tokenizer.json makes the library tokenizers break off: {error}",
            "use the tokenizer that came with the weights",
        ) from None


#: Words, figures and signs, of more than one script.
_PROBE = "Where is the red cup? 12 \u00e4\u5b57\u2603 qzxj."
_FAST, _PIECES, _ADDED = "tokenizer.json", "tokenizer.model", "added_tokens.json"


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens and ids beside a sentencepiece file, from added_tokens.json and tokenizer_config.json.

    Raises ModelError TOKENIZER_MISMATCH for files that cannot be read, or state two ids for a
    token.
    """
    settings, listed = folder / "tokenizer_config.json", folder / _ADDED
    found: dict[str, int] = {}
    try:
        decoder = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
        stated = [(str(token["content"]), int(i)) for i, token in (decoder or {}).items()]
        if listed.is_file():
            stated += [(str(token), int(i)) for token, i in read_json(listed).items()]
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH,
            f"the added tokens of {folder} cannot be read: {type(error).__name__} {error}",
        ) from error
    for token, number in stated:
        if found.setdefault(token, number) != number:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{token} is {found[token]} by {settings.name}, {number} by {listed.name}",
                "use the files that came with the weights",
            )
    return found


def check_words(name: str, encode: Callable[[str], list[int]]) -> None:
    """Encode words that no vocabulary holds, so that one without an unknown token fails now.

    Raises ModelError TOKENIZER_MISMATCH.
    """
    try:
        encode(_PROBE)
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH,
            f"{name} cannot encode words: {error}",
            "use the tokenizer that came with the weights",
        ) from error


class CausalTokenizer:
    """A folder's tokenizer.json, or its sentencepiece file tokenizer.model, as a model needs it.

    `hidden`: ids that an answer is shown without (begin, end, pad). `control`: spellings that are
    no words even where the file does not know them, such as the image's. `added`: tokens beside a
    sentencepiece file, which replace pieces of the same id (tokenizer.json holds its own). Raises
    ModelError TOKENIZER_MISMATCH, or MISSING_DEPENDENCY without sentencepiece.
    """

    def __init__(
        self,
        folder: Path,
        *,
        hidden: Iterable[int],
        vocab_size: int,
        control: Iterable[str] = (),
        added: Mapping[str, int] | None = None,
    ) -> None:
        hidden = list(hidden)
        for token in hidden:
            check_token("config.json: a token of begin, end or pad", token, vocab_size)
        self._hidden = frozenset(hidden)
        source = next((folder / n for n in (_FAST, _PIECES) if (folder / n).is_file()), None)
        if source is None:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{folder} holds neither {_FAST} nor {_PIECES}",
                "copy it from the model's repository into the folder",
            )
        fast = source.name == _FAST
        self._source, self._added = source, {} if fast else dict(added or {})
        self._encode, self._decode, self.vocabulary, own = (
            _read_fast(source) if fast else _read_pieces(source, self._added)
        )
        #: Number of tokens; ids from here on are padding of the model's tables.
        self.size = max(self.vocabulary.values()) + 1
        #: Spellings that are tokens of their own; a user's text must hold none of them.
        self.control_tokens = tuple(sorted({*own, *control}))
        self._names = {self.vocabulary[t]: t for t in self.control_tokens if t in self.vocabulary}
        self.control_ids = frozenset(self._names)
        #: What `syntax_constraint` has found out about the tokens, by syntax.
        self.constraint_cache: dict[Any, Any] = {}
        strange = sorted(self._hidden.difference(self.vocabulary.values()))
        if self.size > vocab_size or strange:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{source.name} has {self.size} tokens for a model of {vocab_size}"
                + (f" and lacks token {strange[0]}" if strange else ""),
                "use the tokenizer that came with the weights",
            )
        check_words(source.name, self._encode)

    def hide(self, ids: Iterable[int]) -> None:
        """Show answers without these ids, too."""
        self._hidden |= frozenset(ids)
        self.constraint_cache.clear()

    def words(self, text: str) -> list[int]:
        """Ids of words. Raises RequestError CONTROL_TOKEN_IN_PROMPT when one is no word."""
        ids = self._encode(text)
        strange = [self._names[token] for token in ids if token in self._names]
        if strange:
            raise RequestError(
                ErrorCode.CONTROL_TOKEN_IN_PROMPT,
                f"the prompt holds control tokens of the model: {', '.join(strange[:3])}",
                "write it in words",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text with control tokens spelt out; begin, end, pad and unknown ids are left out."""
        text, run = "", []
        for token in ids:
            if token not in self.control_ids and token < self.size:
                run.append(token)
                continue
            if run:
                text, run = text + self._decode(run), []
            if token not in self._hidden:
                text += self._names.get(token, "")
        return text + (self._decode(run) if run else "")

    def save(self, folder: Path) -> None:
        """Copy the file that it was read from, and write the tokens beside it."""
        target = folder / self._source.name
        if target.resolve() != self._source.resolve():
            shutil.copyfile(self._source, target)
        if self._added:
            text = json.dumps(self._added, indent=2, ensure_ascii=False) + "\n"
            (folder / _ADDED).write_text(text, encoding="utf-8")


_Read = tuple[Callable[[str], list[int]], Callable[[list[int]], str], dict[str, int], set[str]]


def _read_fast(path: Path) -> _Read:
    backend = read_fast(path)
    # Gemma's added tokens hold runs of line ends and of blanks, too: they are words like others.
    added = {t.content for t in backend.get_added_tokens_decoder().values()}
    control = {token for token in added if token.strip("\u2581 \t\r\n")} - {"<unk>"}
    return (
        lambda text: list(unbroken(backend.encode, text, add_special_tokens=False).ids),
        lambda ids: str(unbroken(backend.decode, ids, skip_special_tokens=False)),
        dict(backend.get_vocab()),
        control,
    )


def _read_pieces(path: Path, added: Mapping[str, int]) -> _Read:
    try:
        import sentencepiece
    except ImportError as error:
        raise ModelError(
            ErrorCode.MISSING_DEPENDENCY,
            f"{path.name} needs the package sentencepiece",
            "install it: pip install sentencepiece, or put a tokenizer.json beside it",
        ) from error
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH, f"{path.name} cannot be read: {error}"
        ) from error
    count = pieces.get_piece_size()
    vocabulary = {pieces.id_to_piece(number): number for number in range(count)}
    control = {name for name, number in vocabulary.items() if pieces.is_control(number)}
    # What a piece was called before an added token took its place is no word either.
    taken = set(added.values()) - {vocabulary.get(name) for name in added}
    control |= {name for name, number in vocabulary.items() if number in taken}
    words = {name: number for name, number in vocabulary.items() if number not in taken}
    return (
        lambda text: list(pieces.encode(text)),
        lambda ids: str(pieces.decode(ids)),
        {**words, **added},
        control | (set(added) - {"<unk>"}),
    )
