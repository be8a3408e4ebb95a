"""What the tabletop world contains: its kinds of object, its colours and the labels made of both.

One source for the vocabulary: scenes, training targets, tokenizer, evaluation and the model
card in docs/embedded-model.md all read these tuples.
"""

from __future__ import annotations

#: RGB in 0..1; hues about 60 degrees apart so that no light of the generator turns one into
#: another.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.12, 0.70, 0.15),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.12, 0.20, 0.90),
    "purple": (0.65, 0.12, 0.75),
}

#: Kinds that come in every colour; the label is "<colour> <kind>".
COLOURED_KINDS = ("cube", "ball", "cylinder", "lego brick")
#: Kinds with one look of their own; the label is the kind.
PLAIN_KINDS = ("mug", "duck", "teddy bear", "soccer ball", "jenga block", "domino")
KINDS = COLOURED_KINDS + PLAIN_KINDS


def label_of(kind: str, colour: str | None = None) -> str:
    """The label of an object: ``"red cube"``, ``"lego brick"`` with its colour, or a plain
    ``"duck"``.

    Raises ValueError for a kind without its colour, a plain kind with one, or unknown words.
    """
    if kind in COLOURED_KINDS and colour in COLOURS:
        return f"{colour} {kind}"
    if kind in PLAIN_KINDS and colour is None:
        return kind
    raise ValueError(
        f"no such object: kind {kind!r} with colour {colour!r}; coloured kinds are "
        f"{COLOURED_KINDS} in {tuple(COLOURS)}, plain ones {PLAIN_KINDS}"
    )


#: Every label of the world, 30 of them.
LABELS: tuple[str, ...] = tuple(
    [label_of(kind, colour) for kind in COLOURED_KINDS for colour in COLOURS] + list(PLAIN_KINDS)
)
