"""The embedded model's dimensions, vocabulary and files: Florence-2's architecture, made small.

DaViT stages at strides 8 and 16 (the one at stride 4 is its convolution alone) over a 192-pixel
square give 144 visual tokens and one mean token; a BART of two encoder and three decoder layers
reads them. Words are whole tokens, and boxes are Florence-2's thousand location tokens a side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.tabletop.labels import LABELS

if TYPE_CHECKING:
    import torch
    from transformers import Florence2ForConditionalGeneration, PreTrainedTokenizerFast

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


def model_config(vocabulary: int) -> Any:
    """The transformers configuration of the embedded model for a vocabulary of that many tokens."""
    from transformers import BartConfig, Florence2Config
    from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

    vision = Florence2VisionConfig(
        depths=(0, 1, 3), patch_size=(7, 3, 3), patch_stride=(4, 2, 2), patch_padding=(3, 1, 1),
        patch_prenorm=(False, True, True), embed_dim=(48, 112, 224), num_heads=(3, 7, 14),
        num_groups=(3, 7, 14), window_size=12, drop_path_rate=0.0, projection_dim=256,
        max_position_embeddings=24,
    )  # fmt: skip
    text = BartConfig(
        vocab_size=vocabulary, d_model=256, encoder_layers=2, decoder_layers=3,
        encoder_ffn_dim=512, decoder_ffn_dim=768, encoder_attention_heads=8,
        decoder_attention_heads=8, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        max_position_embeddings=256, bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS,
        decoder_start_token_id=EOS, forced_bos_token_id=None, forced_eos_token_id=EOS,
        scale_embedding=False, activation_function="gelu",
    )  # fmt: skip
    return Florence2Config(
        text_config=text, vision_config=vision, image_token_id=vocabulary - 1,
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, tie_word_embeddings=True,
    )  # fmt: skip


def build_model(seed: int = 0, attention: str = "sdpa") -> Florence2ForConditionalGeneration:
    """A freshly initialised embedded model with the attention implementation named."""
    import torch
    from transformers import Florence2ForConditionalGeneration

    torch.manual_seed(seed)
    config = model_config(len(build_tokenizer()))
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

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model()
    model.load_state_dict(weights)
    model.to(torch.float16)
    model.generation_config.update(
        decoder_start_token_id=EOS, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        forced_eos_token_id=EOS, num_beams=1, max_length=128,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": False,
        "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
        "image_seq_length": CELLS * CELLS + 1,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    if notes is not None:
        (folder / "training.json").write_text(json.dumps(notes, indent=2) + "\n")
