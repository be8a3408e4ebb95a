"""Qwen2-VL and Qwen3-VL at tiny size: official checkpoints, and the original arithmetic.

`original_logits` follows the papers (Qwen2-VL: Wang et al. 2024; Qwen3-VL: Qwen Team 2025;
DeepStack: Meng et al. 2024). It reads tensors by the names they were published under and knows
nothing of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from librobot_vlm_ros.models.families.qwen_vl.processor import patches
from librobot_vlm_ros.models.testing.parts import (
    LETTERS,
    RandomWeights,
    State,
    attention,
    causal_mask,
    decoder_layer,
    gelu,
    gelu_tanh,
    heads,
    layer_norm,
    letter_tokenizer,
    linear,
    official_config,
    quick_gelu,
    rms_norm,
    rotary,
    write_json,
)

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
    *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
FIRST = len(LETTERS) + 1
#: Ids by name, as `tokenizer` gives them.
IDS = {token: FIRST + place for place, token in enumerate(SPECIAL)}
VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = FIRST + len(SPECIAL) + 4, 32, 48, 3, 4, 2
WIDTH, DEPTH, VISION_HEADS, VISION_INNER, MERGE = 32, 3, 2, 64, 2
DEEP, SIDE, EPS, THETA = (0, 1), 6, 1e-6, 10000.0


@dataclass(frozen=True)
class Tiny:
    """What the generations differ in."""

    #: Of `official_config`.
    config: str
    third: bool
    patch: int
    head_dim: int
    #: Pairs of a head that turn with time, row and column.
    sections: tuple[int, int, int]


SECOND = Tiny("qwen2_vl", third=False, patch=14, head_dim=8, sections=(2, 1, 1))
THIRD = Tiny("qwen3_vl", third=True, patch=16, head_dim=16, sections=(4, 2, 2))


def tokenizer() -> Any:
    """Letters for words, and the tokens of the notation."""
    return letter_tokenizer(["<unk>"], SPECIAL)


def _weights(tiny: Tiny) -> State:
    made = RandomWeights(11)
    see, read = ("model.visual.", "model.language_model.") if tiny.third else ("visual.", "model.")
    first, second = ("linear_fc1", "linear_fc2") if tiny.third else ("fc1", "fc2")
    made.linear(f"{see}patch_embed.proj", WIDTH, 3 * 2 * tiny.patch**2, bias=tiny.third)
    kernel = made.state[f"{see}patch_embed.proj.weight"]
    made.state[f"{see}patch_embed.proj.weight"] = (kernel * 0.3).view(
        WIDTH, 3, 2, tiny.patch, tiny.patch
    )
    for layer in range(DEPTH):
        at = f"{see}blocks.{layer}."
        made.norm(f"{at}norm1", WIDTH)
        made.norm(f"{at}norm2", WIDTH)
        made.linear(f"{at}attn.qkv", 3 * WIDTH, WIDTH)
        made.linear(f"{at}attn.proj", WIDTH, WIDTH)
        made.linear(f"{at}mlp.{first}", VISION_INNER, WIDTH)
        made.linear(f"{at}mlp.{second}", WIDTH, VISION_INNER)
    wide = WIDTH * MERGE**2
    if tiny.third:
        made.add(f"{see}pos_embed.weight", SIDE**2, WIDTH, scale=5)
        made.norm(f"{see}merger.norm", WIDTH)
        for place in range(len(DEEP)):
            made.norm(f"{see}deepstack_merger_list.{place}.norm", wide)
        mergers = [f"{see}merger", *(f"{see}deepstack_merger_list.{i}" for i in range(len(DEEP)))]
        for at in mergers:
            made.linear(f"{at}.linear_fc1", wide, wide)
            made.linear(f"{at}.linear_fc2", HIDDEN, wide)
    else:
        made.norm(f"{see}merger.ln_q", WIDTH)
        made.linear(f"{see}merger.mlp.0", wide, wide)
        made.linear(f"{see}merger.mlp.2", HIDDEN, wide)
    # Wide, so that answers vary: a freshly initialised model repeats the token it was fed.
    made.linear(f"{read}embed_tokens", VOCABULARY, HIDDEN, bias=False)
    made.norm(f"{read}norm", HIDDEN, bias=False)
    if tiny.third:
        made.linear("lm_head", VOCABULARY, HIDDEN, bias=False)
    for layer in range(LAYERS):
        at = f"{read}layers.{layer}."
        queries, keys = HEADS * tiny.head_dim, KV_HEADS * tiny.head_dim
        made.decoder_layer(at, HIDDEN, INNER, queries, keys, bias=not tiny.third)
        if tiny.third:
            made.norm(f"{at}self_attn.q_norm", tiny.head_dim, bias=False)
            made.norm(f"{at}self_attn.k_norm", tiny.head_dim, bias=False)
    return made.state


def write_official(folder: Path, tiny: Tiny) -> None:
    """A folder laid out as the vendor's, its sampling settings with it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    ends = [IDS["<|im_end|>"], IDS["<|endoftext|>"]]
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "eos_token_id": ends}
    write_json(folder, config=official_config(tiny.config), generation_config=settings)
    save_file(_weights(tiny), folder / "model.safetensors")


_norm, _rms = partial(layer_norm, eps=EPS), partial(rms_norm, eps=EPS)


def _position_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """The learnt square of positions, bilinear between its points, [rows, columns, D]."""
    square = table.T.view(1, -1, SIDE, SIDE)
    grown = F.interpolate(square, (rows, columns), mode="bilinear", align_corners=True)
    return grown[0].permute(1, 2, 0)


def _by_blocks(grid: Tensor) -> Tensor:
    """[rows, columns, ...] in the order of patches: those of one vector stand together."""
    rows, columns = grid.shape[0] // MERGE, grid.shape[1] // MERGE
    cells = grid.reshape(rows, MERGE, columns, MERGE, -1).transpose(1, 2)
    return cells.flatten(0, 3)


def _merged(w: State, at: str, x: Tensor, *, after: bool) -> Tensor:
    wide = _norm(w, f"{at}.norm", x.reshape(len(x) // MERGE**2, -1) if after else x)
    wide = gelu(linear(w, f"{at}.linear_fc1", wide.reshape(len(x) // MERGE**2, -1)))
    return linear(w, f"{at}.linear_fc2", wide)


def _features(w: State, tiny: Tiny, image: Tensor) -> list[Tensor]:
    """Vectors [N, D] of a normalised image [3, H, W], and those of each deep layer."""
    see = "model.visual." if tiny.third else "visual."
    cells = image.unfold(1, tiny.patch, tiny.patch).unfold(2, tiny.patch, tiny.patch)
    rows, columns = cells.shape[1:3]
    cells = cells.permute(1, 2, 0, 3, 4).unsqueeze(3).expand(-1, -1, -1, 2, -1, -1)
    kernel = w[f"{see}patch_embed.proj.weight"].flatten(1)
    grid = cells.flatten(2) @ kernel.T + w.get(f"{see}patch_embed.proj.bias", torch.zeros(1))
    if tiny.third:
        grid = grid + _position_table(w[f"{see}pos_embed.weight"], rows, columns)
    x = _by_blocks(grid)
    quarter = WIDTH // VISION_HEADS // 4
    speeds = THETA ** -(torch.arange(quarter) / quarter)
    numbers = torch.stack(
        torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1
    )
    angles = (_by_blocks(numbers)[:, :, None] * speeds).flatten(1)
    deep = []
    for layer in range(DEPTH):
        at = f"{see}blocks.{layer}."
        qkv = linear(w, f"{at}attn.qkv", _norm(w, f"{at}norm1", x))
        q, k, v = (heads(part, VISION_HEADS) for part in qkv.chunk(3, -1))
        mixed = attention(rotary(q, angles), rotary(k, angles), v)
        x = x + linear(w, f"{at}attn.proj", mixed)
        seen = _norm(w, f"{at}norm2", x)
        if tiny.third:
            inner = gelu_tanh(linear(w, f"{at}mlp.linear_fc1", seen))
            x = x + linear(w, f"{at}mlp.linear_fc2", inner)
            if layer in DEEP:
                at = f"{see}deepstack_merger_list.{DEEP.index(layer)}"
                deep.append(_merged(w, at, x, after=True))
        else:
            inner = linear(w, f"{at}mlp.fc1", seen)
            x = x + linear(w, f"{at}mlp.fc2", quick_gelu(inner))
    if tiny.third:
        return [_merged(w, f"{see}merger", x, after=False), *deep]
    wide = _norm(w, f"{see}merger.ln_q", x).reshape(-1, WIDTH * MERGE**2)
    return [linear(w, f"{see}merger.mlp.2", gelu(linear(w, f"{see}merger.mlp.0", wide)))]


def _angles(tiny: Tiny, places: Tensor) -> Tensor:
    """Angles [T, half] for places [T, 3] in time, row and column."""
    half = tiny.head_dim // 2
    axis = [axis for axis, count in enumerate(tiny.sections) for _ in range(count)]
    if tiny.third:  # row and column take turns with time, as long as they have pairs left
        axis = [0] * half
        for which in (1, 2):
            for turn in range(tiny.sections[which]):
                axis[which + 3 * turn] = which
    speeds = THETA ** -(torch.arange(half) / half)
    return places[:, axis] * speeds


def original_logits(
    w: State, tiny: Tiny, before: list[int], image: Tensor | None, behind: list[int]
) -> Tensor:
    """Logits [T, V] of words, the vectors of a normalised image [3, H, W], and words."""
    read = "model.language_model." if tiny.third else "model."
    table = w[f"{read}embed_tokens.weight"]
    shape = (0, 0)
    vectors, deep = table[:0], []
    if image is not None:
        vectors, *deep = _features(w, tiny, image)
        shape = tuple(side // (tiny.patch * MERGE) for side in image.shape[1:])
    places = [[i, i, i] for i in range(len(before))]
    start = len(before)
    places += [[start, start + r, start + c] for r in range(shape[0]) for c in range(shape[1])]
    start += max(shape)
    places += [[start + i] * 3 for i in range(len(behind))]
    angles = _angles(tiny, torch.tensor(places))
    x = torch.cat([table[before], vectors, table[behind]])
    mask = causal_mask(len(x))
    for layer in range(LAYERS):
        x = decoder_layer(w, f"{read}layers.{layer}.", x, angles, mask, _rms)
        if layer < len(deep):
            x = x.clone()
            x[len(before) : len(before) + len(vectors)] += deep[layer]
    head = w["lm_head.weight"] if tiny.third else table
    return _rms(w, f"{read}norm", x) @ head.T


def difference(folder: Path, module: Any, tiny: Tiny) -> float:
    """Largest difference of a logit between the loaded module and the original arithmetic."""
    weights = load_file(folder / "model.safetensors")
    factor = tiny.patch * MERGE
    image = torch.randn(3, 3 * factor, 2 * factor, generator=torch.Generator().manual_seed(3))
    before, behind = (
        [IDS["<|im_start|>"], 9, IDS["<|vision_start|>"]],
        [IDS["<|vision_end|>"], 7, 8],
    )
    middle = [IDS["<|image_pad|>"]] * 6
    row = torch.tensor([before + middle + behind])
    cells = image.unfold(1, tiny.patch, tiny.patch).unfold(2, tiny.patch, tiny.patch)
    flat = cells.permute(1, 2, 0, 3, 4).unsqueeze(3).expand(-1, -1, -1, 2, -1, -1).flatten(2)
    with torch.no_grad():
        found = module(
            input_ids=row,
            pixel_values=_by_blocks(flat),
            image_grid_thw=torch.tensor([[1, 6, 4]]),
            mm_token_type_ids=(row == IDS["<|image_pad|>"]).int(),
        ).logits[0]
        expected = original_logits(weights, tiny, before, image, behind)
    return float((found - expected).abs().max())


def pixels(vlm: Any, image: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Ours, and those of transformers' own processor on Pillow, as patches."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = vlm.images
    reference = Qwen2VLImageProcessorPil(
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
        patch_size=settings.patch,
        merge_size=settings.merge,
        temporal_patch_size=settings.frames,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )
    theirs = reference(image, return_tensors="pt", input_data_format="channels_last")
    ours = patches(vlm.pixels(image), settings, torch.device("cpu"), torch.float32)
    return ours, torch.as_tensor(theirs["pixel_values"])


def hooks(family: str) -> Any:
    """See `conformance.Hooks`; for "qwen2-vl" or "qwen3-vl"."""
    tiny = {"qwen2-vl": SECOND, "qwen3-vl": THIRD}[family]
    return SimpleNamespace(
        write_official=partial(write_official, tiny=tiny),
        difference=partial(difference, tiny=tiny),
        pixels=pixels,
    )
