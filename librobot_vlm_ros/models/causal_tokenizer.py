"""Words to ids and back for models that continue a text: from tokenizer.json or tokenizer.model.

Words of a user can never become a control token: what is encoded as words is checked, and refused
when one comes out. Each piece of a prompt is encoded on its own, as the original code of these
models encodes what stands before and behind an image.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from librobot_vlm_ros.core import ErrorCode, ModelError, RequestError

__all__ = ["CausalTokenizer"]

_FAST, _PIECES = "tokenizer.json", "tokenizer.model"


class CausalTokenizer:
    """One tokenizer file behind the five things that a model needs of it."""

    def __init__(
        self,
        source: Path,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        vocabulary: dict[str, int],
        control: Iterable[str],
        hidden: frozenset[int],
    ) -> None:
        self._source = source
        self._encode = encode
        self._decode = decode
        #: Number of tokens; ids from here on are padding of the model's tables.
        self.size = max(vocabulary.values()) + 1
        self.vocabulary = vocabulary
        #: Spellings that are tokens of their own; a user's text must hold none of them.
        self.control_tokens = tuple(sorted(control))
        self.control_ids = frozenset(
            vocabulary[token] for token in self.control_tokens if token in vocabulary
        )
        self._names = {vocabulary[t]: t for t in self.control_tokens if t in vocabulary}
        self._hidden = hidden

    @classmethod
    def from_folder(
        cls, folder: Path, *, hidden: Iterable[int], vocab_size: int, control: Iterable[str] = ()
    ) -> CausalTokenizer:
        """Read tokenizer.json, or the sentencepiece file tokenizer.model.

        `hidden`: ids that an answer is shown without (begin, end, pad). `control`: spellings that
        are no words even where the file does not know them, such as the image's. Raises ModelError
        TOKENIZER_MISMATCH, or MISSING_DEPENDENCY without sentencepiece.
        """
        source = next((folder / n for n in (_FAST, _PIECES) if (folder / n).is_file()), None)
        if source is None:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{folder} holds neither {_FAST} nor {_PIECES}",
                "copy it from the model's repository into the folder",
            )
        read = _read_fast if source.name == _FAST else _read_pieces
        encode, decode, vocabulary, own = read(source)
        new = cls(source, encode, decode, vocabulary, {*own, *control}, frozenset(hidden))
        strange = [token for token in new._hidden if token not in vocabulary.values()]
        if new.size > vocab_size or strange:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"{source.name} has {new.size} tokens for a model of {vocab_size}"
                + (f" and lacks token {strange[0]}" if strange else ""),
                "use the tokenizer that came with the weights",
            )
        return new

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
            text += self._decode(run) if run else ""
            run = []
            if token not in self._hidden:
                text += self._names.get(token, "")
        return text + (self._decode(run) if run else "")

    def save(self, folder: Path) -> None:
        """Copy the file that it was read from."""
        target = folder / self._source.name
        if target.resolve() != self._source.resolve():
            shutil.copyfile(self._source, target)


_Read = tuple[Callable[[str], list[int]], Callable[[list[int]], str], dict[str, int], set[str]]


def _read_fast(path: Path) -> _Read:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise ModelError(
            ErrorCode.TOKENIZER_MISMATCH, f"{path.name} cannot be read: {error}"
        ) from error
    control = {t.content for t in backend.get_added_tokens_decoder().values()} - {"<unk>"}
    return (
        lambda text: list(backend.encode(text, add_special_tokens=False).ids),
        lambda ids: str(backend.decode(ids, skip_special_tokens=False)),
        dict(backend.get_vocab()),
        control,
    )


def _read_pieces(path: Path) -> _Read:
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
    return (
        lambda text: list(pieces.encode(text)),
        lambda ids: str(pieces.decode(ids)),
        vocabulary,
        control,
    )
