"""Florence-2 at tiny size: checkpoints in both layouts, and the original arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from librobot_vlm_ros.models.families.florence2.configuration import FlorenceConfig
from librobot_vlm_ros.models.families.florence2.processor import (
    ADDED_TOKENS,
    FlorenceProcessor,
    FlorenceSettings,
    FlorenceTokenizer,
)
from librobot_vlm_ros.models.inputs.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageSettings,
)
from librobot_vlm_ros.models.testing.conformance import our_pixels
from librobot_vlm_ros.models.testing.parts import (
    RandomWeights,
    State,
    attention,
    causal_mask,
    gelu,
    heads,
    layer_norm,
    linear,
    official_config,
    reference_pixels,
    write_json,
)

#: Small parts as transformers names them. The weights start out wide, so that answers vary: a
#: freshly initialised model repeats the token it was fed.
TINY_VISION, TINY_TEXT = official_config("florence2_native").values()
_SPOKEN = (
    "what does the image describe locate objects with category name in phrases caption a an and "
    "red green blue yellow cube ball duck mug table robot arm text region is it of mask detail "
    "describe shown paragraph their descriptions proposals regions polygon"
)
WORDS = _SPOKEN.split()
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
    """Write a folder laid out as models/checkpoints/shipped/florence_2_tabletop is; gives its path.

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
    module.save_pretrained(str(folder))
    processor = FlorenceProcessor(
        "florence-2-tabletop",
        config,
        ImageSettings(image_size, image_size),
        FlorenceTokenizer(fast, config),
        settings or FlorenceSettings(max_new_tokens=24),
    )
    processor.save(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")


Weights = State

_CONFIG = official_config("florence2")
VISION, TEXT = _CONFIG["vision_config"], _CONFIG["text_config"]
DEPTHS, DIMS, HEADS = (tuple(VISION[name]) for name in ("depths", "dim_embed", "num_heads"))
WINDOW, POSITIONS = VISION["window_size"], VISION["image_pos_embed"]["max_pos_embeddings"]
D_MODEL, FFN, LAYERS = TEXT["d_model"], TEXT["encoder_ffn_dim"], TEXT["encoder_layers"]
TEXT_HEADS, MAX_POSITIONS = TEXT["encoder_attention_heads"], TEXT["max_position_embeddings"]
#: Pixels of a side of the published models' input.
SIDE = 768


_layer_norm = partial(layer_norm, eps=1e-5)


def _depthwise(w: Weights, name: str, x: Tensor, side: int) -> Tensor:
    batch, _, dim = x.shape
    image = x.transpose(1, 2).reshape(batch, dim, side, side)
    image = F.conv2d(image, w[f"{name}.weight"], w[f"{name}.bias"], padding=1, groups=dim)
    return x + image.flatten(2).transpose(1, 2)


def _window_attention(w: Weights, name: str, x: Tensor, side: int, count: int) -> Tensor:
    batch, _, dim = x.shape
    x = x.view(batch, side, side, dim)
    rest = (WINDOW - side % WINDOW) % WINDOW
    x = F.pad(x, (0, 0, 0, rest, 0, rest))
    out = torch.zeros_like(x)
    for top in range(0, side + rest, WINDOW):
        for left in range(0, side + rest, WINDOW):
            part = x[:, top : top + WINDOW, left : left + WINDOW].reshape(batch, -1, dim)
            q, k, v = (heads(x, count) for x in linear(w, f"{name}.qkv", part).chunk(3, dim=-1))
            seen = linear(w, f"{name}.proj", attention(q, k, v))
            out[:, top : top + WINDOW, left : left + WINDOW] = seen.view(batch, WINDOW, WINDOW, dim)
    return out[:, :side, :side].reshape(batch, -1, dim)


def _channel_attention(w: Weights, name: str, x: Tensor, groups: int) -> Tensor:
    """Channels of a group see one another; each is as long as there are places."""
    q, k, v = (
        part.transpose(1, 2).unflatten(1, (groups, -1))
        for part in linear(w, f"{name}.qkv", x).chunk(3, dim=-1)
    )
    scores = q @ k.transpose(-1, -2) * x.shape[1] ** -0.5
    return linear(w, f"{name}.proj", (scores.softmax(-1) @ v).flatten(1, 2).transpose(1, 2))


def _davit(w: Weights, pixels: Tensor) -> Tensor:
    x, side = pixels, pixels.shape[-1]
    for stage in range(len(DIMS)):
        conv = f"vision_tower.convs.{stage}"
        if stage > 0:  # prenorm
            x = _layer_norm(w, f"{conv}.norm", x).transpose(1, 2).reshape(len(x), -1, side, side)
        stride, padding = (4, 3) if stage == 0 else (2, 1)
        x = F.conv2d(x, w[f"{conv}.proj.weight"], w[f"{conv}.proj.bias"], stride, padding)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        if stage == 0:
            x = _layer_norm(w, f"{conv}.norm", x)
        for depth in range(DEPTHS[stage]):
            for kind in ("spatial_block", "channel_block"):
                base = f"vision_tower.blocks.{stage}.{depth}.{kind}"
                x = _depthwise(w, f"{base}.conv1.fn.dw", x, side)
                if kind == "spatial_block":
                    seen = _layer_norm(w, f"{base}.window_attn.norm", x)
                    x = x + _window_attention(w, f"{base}.window_attn.fn", seen, side, HEADS[stage])
                else:
                    seen = _layer_norm(w, f"{base}.channel_attn.norm", x)
                    x = x + _channel_attention(w, f"{base}.channel_attn.fn", seen, HEADS[stage])
                x = _depthwise(w, f"{base}.conv2.fn.dw", x, side)
                seen = _layer_norm(w, f"{base}.ffn.norm", x)
                wide = gelu(linear(w, f"{base}.ffn.fn.net.fc1", seen))
                x = x + linear(w, f"{base}.ffn.fn.net.fc2", wide)
    return x


def _image_features(w: Weights, pixels: Tensor) -> Tensor:
    x = _davit(w, pixels)
    side = math.isqrt(x.shape[1])
    columns = w["image_pos_embed.column_embeddings.weight"][:side]
    rows = w["image_pos_embed.row_embeddings.weight"][:side]
    position = torch.cat(
        [columns[None].expand(side, -1, -1), rows[:, None].expand(-1, side, -1)], dim=-1
    )
    x = x + position.reshape(side * side, -1)
    x = x + w["visual_temporal_embed.pos_idx_to_embed"][0]  # one frame in time
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
    return _layer_norm(w, "image_proj_norm", x @ w["image_projection"])


def _bart_attention(w: Weights, name: str, x: Tensor, seen: Tensor, *, causal: bool) -> Tensor:
    read = (("q_proj", x), ("k_proj", seen), ("v_proj", seen))
    q, k, v = (heads(linear(w, f"{name}.{part}", y), TEXT_HEADS) for part, y in read)
    mixed = attention(q, k, v, causal_mask(x.shape[1]) if causal else None)
    return linear(w, f"{name}.out_proj", mixed)


def _bart_side(w: Weights, side: str, x: Tensor, memory: Tensor | None) -> Tensor:
    base = f"language_model.model.{side}"
    # BART's table of positions begins with two rows that are never used.
    x = x + w[f"{base}.embed_positions.weight"][2 : 2 + x.shape[1]]
    x = _layer_norm(w, f"{base}.layernorm_embedding", x)
    for layer in range(LAYERS):
        name = f"{base}.layers.{layer}"
        seen = _bart_attention(w, f"{name}.self_attn", x, x, causal=memory is not None)
        x = _layer_norm(w, f"{name}.self_attn_layer_norm", x + seen)
        if memory is not None:
            seen = _bart_attention(w, f"{name}.encoder_attn", x, memory, causal=False)
            x = _layer_norm(w, f"{name}.encoder_attn_layer_norm", x + seen)
        wide = gelu(linear(w, f"{name}.fc1", x))
        x = _layer_norm(w, f"{name}.final_layer_norm", x + linear(w, f"{name}.fc2", wide))
    return x


def original_logits(w: Weights, pixels: Tensor, words: Tensor, answer: Tensor) -> Tensor:
    """Logits [B, L, V] of `answer` [B, L] for pixels [B, 3, H, W] and `words` [B, T]."""
    table = w["language_model.model.shared.weight"]
    memory = _bart_side(
        w, "encoder", torch.cat([_image_features(w, pixels), table[words]], dim=1), None
    )
    hidden = _bart_side(w, "decoder", table[answer], memory)
    return hidden @ table.T + w["language_model.final_logits_bias"]


def added_parameters(module: Any) -> int:
    """transformers' place holder for the image is one row that the published models have not."""
    return int(module.config.text_config.d_model)


def tiny_config(vocab_size: int) -> dict[str, Any]:
    """A config.json with the official fields, small numbers in them."""
    text = {**TEXT, "vocab_size": vocab_size}
    return {**_CONFIG, "vocab_size": vocab_size, "text_config": text}


def random_weights(vocab_size: int) -> Weights:
    """Every official tensor, the same ones at each call."""
    made = RandomWeights(7, 0.3)
    before = 3
    for stage, dim in enumerate(DIMS):
        conv = f"vision_tower.convs.{stage}"
        kernel = 7 if stage == 0 else 3
        made.add(f"{conv}.proj.weight", dim, before, kernel, kernel)
        made.add(f"{conv}.proj.bias", dim)
        made.norm(f"{conv}.norm", dim if stage == 0 else before)
        for depth in range(DEPTHS[stage]):
            for kind in ("window", "channel"):
                block = "spatial_block" if kind == "window" else "channel_block"
                base = f"vision_tower.blocks.{stage}.{depth}.{block}"
                for number in (1, 2):
                    made.add(f"{base}.conv{number}.fn.dw.weight", dim, 1, 3, 3)
                    made.add(f"{base}.conv{number}.fn.dw.bias", dim)
                made.norm(f"{base}.{kind}_attn.norm", dim)
                made.linear(f"{base}.{kind}_attn.fn.qkv", 3 * dim, dim)
                made.linear(f"{base}.{kind}_attn.fn.proj", dim, dim)
                made.norm(f"{base}.ffn.norm", dim)
                made.linear(f"{base}.ffn.fn.net.fc1", 4 * dim, dim)
                made.linear(f"{base}.ffn.fn.net.fc2", dim, 4 * dim)
        before = dim
    made.add("image_projection", DIMS[-1], D_MODEL)
    made.norm("image_proj_norm", D_MODEL)
    made.add("image_pos_embed.row_embeddings.weight", POSITIONS, DIMS[-1] // 2)
    made.add("image_pos_embed.column_embeddings.weight", POSITIONS, DIMS[-1] - DIMS[-1] // 2)
    made.add("visual_temporal_embed.pos_idx_to_embed", 5, DIMS[-1])
    made.add("language_model.model.shared.weight", vocab_size, D_MODEL)
    made.add("language_model.final_logits_bias", 1, vocab_size, scale=0)
    for side in ("encoder", "decoder"):
        base = f"language_model.model.{side}"
        made.add(f"{base}.embed_positions.weight", MAX_POSITIONS + 2, D_MODEL)
        made.norm(f"{base}.layernorm_embedding", D_MODEL)
        for layer in range(LAYERS):
            name = f"{base}.layers.{layer}"
            for kind in ("self_attn", "encoder_attn")[: 1 if side == "encoder" else 2]:
                for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    made.linear(f"{name}.{kind}.{part}", D_MODEL, D_MODEL)
                made.norm(f"{name}.{kind}_layer_norm", D_MODEL)
            made.linear(f"{name}.fc1", FFN, D_MODEL)
            made.linear(f"{name}.fc2", D_MODEL, FFN)
            made.norm(f"{name}.final_layer_norm", D_MODEL)
    return made.state


def write_official(folder: Path) -> None:
    """A folder laid out as microsoft/Florence-2-base."""
    folder.mkdir(parents=True)
    tokenizer = word_tokenizer(added=())  # the location and task tokens are added while loading
    vocab_size = tokenizer.get_vocab_size() + 1024
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(random_weights(vocab_size), folder / "model.safetensors")
    images = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "resample": 3}
    images["size"] = {"height": 56, "width": 56}
    write_json(folder, config=tiny_config(vocab_size), preprocessor_config=images)


def difference(folder: Path, module: Any) -> float:
    """Largest difference of a logit between the converted module and the original arithmetic."""
    random = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 56, 56, generator=random)  # 7 x 7 cells
    words = torch.tensor([[0, 11, 12, 13, 2], [0, 21, 22, 23, 2]])
    answer = torch.tensor([[2, 0, 30, 31], [2, 0, 40, 41]])
    expected = original_logits(load_file(folder / "model.safetensors"), image, words, answer)
    places = torch.full((2, 1 + 7 * 7), module.config.image_token_id)
    with torch.no_grad():
        found = module(
            input_ids=torch.cat([places, words], dim=1),
            pixel_values=image,
            decoder_input_ids=answer,
        ).logits[..., : expected.shape[-1]]
    return float((found - expected).abs().max())


def pixels(vlm: Any, image: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """The published side's pixels [1, 3, H, W]: ours, and the reference processor's."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    reference = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    return our_pixels(vlm, image, height=SIDE, width=SIDE), reference_pixels(reference, image)
