"""Tiny Florence-2 checkpoints with random weights, for tests and for checking an installation.

They have the files and the layout of real ones, but 100,000 parameters and a vocabulary of a few
dozen words: what they say means nothing, how it is computed is what counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from librobot_vlm_ros.models.florence_config import FlorenceConfig
from librobot_vlm_ros.models.florence_folder import FlorenceParts, FlorenceSettings, write_folder
from librobot_vlm_ros.models.florence_tokenizer import ADDED_TOKENS, FlorenceTokenizer
from librobot_vlm_ros.models.preprocess import ImageSettings

__all__ = ["TINY_TEXT", "TINY_VISION", "WORDS", "tiny_florence_folder", "word_tokenizer"]

TINY_VISION: dict[str, Any] = {
    "depths": [1, 1, 2, 1],
    "embed_dim": [8, 16, 24, 32],
    "num_heads": [1, 2, 3, 4],
    "num_groups": [1, 2, 3, 4],
    "patch_stride": [4, 2, 2, 1],
    "window_size": 4,
    "projection_dim": 32,
    "drop_path_rate": 0.0,
    "max_position_embeddings": 16,
    "max_temporal_embeddings": 10,
}
TINY_TEXT: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    # Wide, so that answers vary: a freshly initialised model repeats the token it was fed.
    "init_std": 1.0,
}
WORDS = [
    "what",
    "does",
    "the",
    "image",
    "describe",
    "locate",
    "objects",
    "with",
    "category",
    "name",
    "in",
    "phrases",
    "caption",
    "a",
    "an",
    "and",
    "red",
    "green",
    "blue",
    "yellow",
    "cube",
    "ball",
    "duck",
    "mug",
    "table",
    "robot",
    "arm",
    "text",
    "region",
    "is",
    "it",
    "of",
    "mask",
    "detail",
    "describe",
    "shown",
    "paragraph",
    "their",
    "descriptions",
    "proposals",
    "regions",
    "polygon",
]
_PUNCTUATION = (",", ".", "?", ":")


def word_tokenizer(words: Sequence[str] = WORDS, added: Sequence[str] = ADDED_TOKENS) -> Any:
    """A `tokenizers.Tokenizer` of whole words, begin 0, pad 1, end 2, unknown 3.

    A word carries the space before it, so that decoding gives back "a red cube, a ball".
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = ["<s>", "<pad>", "</s>", "<unk>", *_PUNCTUATION]
    tokens += [f"▁{word}" for word in dict.fromkeys(words)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<s>", "<pad>", "</s>", "<unk>", *added]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def tiny_florence_folder(
    folder: str | Path,
    *,
    seed: int = 0,
    image_size: int = 64,
    settings: FlorenceSettings | None = None,
    **text: Any,
) -> Path:
    """Write a folder laid out as models/weights/florence_2_tabletop is; gives its path.

    `settings` default to greedy decoding of 24 tokens; `text` overrides `TINY_TEXT`.
    """
    from transformers import Florence2ForConditionalGeneration, PreTrainedTokenizerFast

    folder = Path(folder)
    backend = word_tokenizer()
    size = backend.get_vocab_size()
    words = {**TINY_TEXT, **text, "vocab_size": size + 1}
    config = FlorenceConfig(
        image_size=image_size,
        vision_config={**TINY_VISION, "projection_dim": words["d_model"]},
        text_config=words,
    ).to_transformers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Florence2ForConditionalGeneration(config).eval()
        module.get_input_embeddings().weight.data.normal_(std=0.5)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    parts = FlorenceParts(
        module,
        ImageSettings(image_size, image_size),
        settings or FlorenceSettings(max_new_tokens=24),
        FlorenceTokenizer(fast, config),
    )
    write_folder(folder, parts)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")
