"""Tiny checkpoints of Qwen2-VL and Qwen3-VL, laid out and named as the vendor's."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["IDS", "SECOND", "THIRD", "Tiny", "tokenizer", "write_official"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>")
SPECIAL += ("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|vision_start|>")
SPECIAL += ("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
LETTERS = "▁\n" + string.ascii_letters + string.digits + string.punctuation
FIRST = len(LETTERS) + 1
#: Ids by name, as `tokenizer` gives them.
IDS = {token: FIRST + place for place, token in enumerate(SPECIAL)}
VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = FIRST + len(SPECIAL) + 4, 32, 48, 3, 4, 2
WIDTH, DEPTH, VISION_HEADS, VISION_INNER, MERGE = 32, 3, 2, 64, 2
DEEP, SIDE, EPS, THETA = (0, 1), 6, 1e-6, 10000.0


@dataclass(frozen=True)
class Tiny:
    """What the generations differ in."""

    third: bool
    patch: int
    head_dim: int
    #: Pairs of a head that turn with time, row and column.
    sections: tuple[int, int, int]


SECOND = Tiny(third=False, patch=14, head_dim=8, sections=(2, 1, 1))
THIRD = Tiny(third=True, patch=16, head_dim=16, sections=(4, 2, 2))


def tokenizer() -> Any:
    """Letters for words, and the tokens of the notation."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    names = ["<unk>", *LETTERS]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, [], unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return made


def _config(tiny: Tiny) -> dict[str, Any]:
    text: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "bos_token_id": IDS["<|endoftext|>"],
        "eos_token_id": IDS["<|im_end|>"],
    }
    vision: dict[str, Any] = {"depth": DEPTH, "num_heads": VISION_HEADS, "patch_size": tiny.patch}
    vision |= {"spatial_merge_size": MERGE, "temporal_patch_size": 2}
    marks = {
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
    }
    sections = list(tiny.sections)
    if not tiny.third:  # the text model's fields stand at the top, as published
        vision |= {"embed_dim": WIDTH, "hidden_size": HIDDEN, "mlp_ratio": VISION_INNER // WIDTH}
        rope = {"type": "mrope", "mrope_section": sections}
        own = {"model_type": "qwen2_vl", "tie_word_embeddings": True, "rope_scaling": rope}
        return {**text, **own, **marks, "vision_config": {**vision, "in_chans": 3}}
    text |= {"head_dim": tiny.head_dim, "model_type": "qwen3_vl_text"}
    text["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": sections}
    text["rope_scaling"]["rope_type"] = "default"
    vision |= {"hidden_size": WIDTH, "intermediate_size": VISION_INNER, "out_hidden_size": HIDDEN}
    vision |= {"deepstack_visual_indexes": list(DEEP), "num_position_embeddings": SIDE**2}
    vision["model_type"] = "qwen3_vl"
    own = {"model_type": "qwen3_vl", "tie_word_embeddings": False}
    return {**own, **marks, "text_config": text, "vision_config": vision}


def _weights(tiny: Tiny) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(11)
    state: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=random) * 0.2
        if bias:
            state[f"{name}.bias"] = torch.randn(rows, generator=random) * 0.2

    def norm(name: str, size: int, *, bias: bool = True) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(size, generator=random) * 0.2
        if bias:
            state[f"{name}.bias"] = torch.randn(size, generator=random) * 0.2

    see, read = ("model.visual.", "model.language_model.") if tiny.third else ("visual.", "model.")
    first, second = ("linear_fc1", "linear_fc2") if tiny.third else ("fc1", "fc2")
    linear(f"{see}patch_embed.proj", WIDTH, 3 * 2 * tiny.patch**2, bias=tiny.third)
    name = f"{see}patch_embed.proj.weight"
    state[name] = (state[name] * 0.3).view(WIDTH, 3, 2, tiny.patch, tiny.patch)
    for layer in range(DEPTH):
        at = f"{see}blocks.{layer}."
        norm(f"{at}norm1", WIDTH)
        norm(f"{at}norm2", WIDTH)
        linear(f"{at}attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{at}attn.proj", WIDTH, WIDTH)
        linear(f"{at}mlp.{first}", VISION_INNER, WIDTH)
        linear(f"{at}mlp.{second}", WIDTH, VISION_INNER)
    wide = WIDTH * MERGE**2
    if tiny.third:
        state[f"{see}pos_embed.weight"] = torch.randn(SIDE**2, WIDTH, generator=random)
        norm(f"{see}merger.norm", WIDTH)
        for place in range(len(DEEP)):
            norm(f"{see}deepstack_merger_list.{place}.norm", wide)
        mergers = [f"{see}merger", *(f"{see}deepstack_merger_list.{i}" for i in range(len(DEEP)))]
        for at in mergers:
            linear(f"{at}.linear_fc1", wide, wide)
            linear(f"{at}.linear_fc2", HIDDEN, wide)
    else:
        norm(f"{see}merger.ln_q", WIDTH)
        linear(f"{see}merger.mlp.0", wide, wide)
        linear(f"{see}merger.mlp.2", HIDDEN, wide)
    # Wide, so that answers vary: a freshly initialised model repeats the token it was fed.
    linear(f"{read}embed_tokens", VOCABULARY, HIDDEN, bias=False)
    norm(f"{read}norm", HIDDEN, bias=False)
    if tiny.third:
        linear("lm_head", VOCABULARY, HIDDEN, bias=False)
    for layer in range(LAYERS):
        at = f"{read}layers.{layer}."
        linear(f"{at}self_attn.q_proj", HEADS * tiny.head_dim, HIDDEN, bias=not tiny.third)
        linear(f"{at}self_attn.k_proj", KV_HEADS * tiny.head_dim, HIDDEN, bias=not tiny.third)
        linear(f"{at}self_attn.v_proj", KV_HEADS * tiny.head_dim, HIDDEN, bias=not tiny.third)
        linear(f"{at}self_attn.o_proj", HIDDEN, HEADS * tiny.head_dim, bias=False)
        linear(f"{at}mlp.gate_proj", INNER, HIDDEN, bias=False)
        linear(f"{at}mlp.up_proj", INNER, HIDDEN, bias=False)
        linear(f"{at}mlp.down_proj", HIDDEN, INNER, bias=False)
        norm(f"{at}input_layernorm", HIDDEN, bias=False)
        norm(f"{at}post_attention_layernorm", HIDDEN, bias=False)
        if tiny.third:
            norm(f"{at}self_attn.q_norm", tiny.head_dim, bias=False)
            norm(f"{at}self_attn.k_norm", tiny.head_dim, bias=False)
    return state


def write_official(folder: Path, tiny: Tiny) -> None:
    """A folder laid out as the vendor's, its sampling settings with it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    ends = [IDS["<|im_end|>"], IDS["<|endoftext|>"]]
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "eos_token_id": ends}
    for name, content in (("config", _config(tiny)), ("generation_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    save_file(_weights(tiny), folder / "model.safetensors")
