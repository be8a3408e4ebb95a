"""The embedded model's dimensions, vocabulary and files: Florence-2's architecture, made small.

DaViT stages at strides 8 and 16 (the one at stride 4 is its convolution alone) over a 192-pixel
square give 144 visual tokens and one mean token; a BART of two encoder and three decoder layers
reads them. Words are whole tokens, and boxes are Florence-2's thousand location tokens a side.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.models.checkpoints.hub import shipped_folder
from librobot_vlm_ros.tabletop.labels import LABELS

if TYPE_CHECKING:
    import torch
    from transformers import Florence2ForConditionalGeneration, PreTrainedTokenizerFast

#: The finished model, whose settings a new one of the recipe shares.
SHIPPED = shipped_folder() / "florence_2_tabletop"
IMAGE_SIZE = 192
STRIDE = 16
CELLS = IMAGE_SIZE // STRIDE
LOC_BINS = 1000
#: Channels of the tower's output that it is taught to leave at zero: the position embeddings, which
#: are added to that output (columns in its first half, rows in its second), have them to
#: themselves.
QUIET_X, QUIET_Y = slice(24, 38), slice(136, 150)
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
BOS, PAD, EOS, UNK = range(4)

#: The three prompts the model is trained on, word for word Florence-2's own.
PROMPTS = {
    "caption": "What does the image describe?",
    "detect": "Locate the objects with category name in the image.",
    "ground": "Locate the phrases in the caption: {input}",
}

#: Instructions a robot may be given; ``{}`` takes one noun phrase, or two.
INSTRUCTIONS = (
    "{}", "the {}", "a {}", "pick up the {}", "grasp the {}", "find the {}", "push the {}",
    "where is the {}", "point at the {}", "look at the {}", "move the {}", "take the {}",
    "give me the {}", "lift the {} from the table", "bring the {} to me", "hand me the {}",
)  # fmt: skip
PAIRS = (
    "{} and {}", "the {} and the {}", "put the {} on the {}", "move the {} to the {}",
    "place the {} next to the {}", "push the {} towards the {}", "put the {} in the {}",
    "stack the {} on top of the {}", "a {} and a {}",
)  # fmt: skip


def to_bin(value: float, size: float) -> int:
    """The location bin 0..999 of a coordinate in an image ``size`` pixels wide or high."""
    return min(LOC_BINS - 1, max(0, int(value * LOC_BINS / size)))


def _words() -> list[str]:
    text = " ".join([*PROMPTS.values(), *INSTRUCTIONS, *PAIRS, *LABELS, "on the table"])
    text = text.lower().replace("{input}", " ").replace("{}", " ")
    for mark in "?.:,":
        text = text.replace(mark, f" {mark} ")
    return [*sorted({*text.split(), ",", "please", "object", "thing", "near", "left", "right"})]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: specials, words, ``<loc_0>`` … ``<loc_999>``, ``<image>``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import AddedToken, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *_words()])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>", model_max_length=256,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(f"<loc_{n}>", normalized=False) for n in range(LOC_BINS)])
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)])
    return tokenizer


def build_model(seed: int = 0, attention: str = "sdpa") -> Florence2ForConditionalGeneration:
    """A freshly initialised model of the shipped one's dimensions, with that attention."""
    import torch
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    torch.manual_seed(seed)
    config = Florence2Config.from_pretrained(SHIPPED, dtype=None)
    config._attn_implementation = attention
    return Florence2ForConditionalGeneration(config)


def save_folder(
    folder: Path, weights: dict[str, torch.Tensor], notes: dict[str, Any] | None = None
) -> None:
    """Write the model in transformers' native layout, fp16 safetensors, with its tokenizer.

    ``weights`` is the state dict of :func:`build_model`'s module; ``notes`` go into the
    safetensors header (recipe, seed, figures).
    """
    import torch
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model()
    model.load_state_dict(weights)
    model.to(torch.float16)
    model.generation_config = GenerationConfig.from_pretrained(SHIPPED)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(SHIPPED / "preprocessor_config.json", folder)
    if notes is not None:
        (folder / "training.json").write_text(json.dumps(notes, indent=2) + "\n")
