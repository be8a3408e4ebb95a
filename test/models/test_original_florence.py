"""Official Florence-2 checkpoints, against the original arithmetic written here from its sources.

`original_logits` follows modeling_florence2.py of microsoft/Florence-2-large (DaViT as in Ding et
al. 2022, BART as in Lewis et al. 2019): it reads tensors by their official names and knows nothing
of transformers or of our key table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models import create_vlm, load_module
from librobot_vlm_ros.models.tiny import word_tokenizer

Weights = dict[str, Tensor]

DEPTHS, DIMS, HEADS = (1, 2), (8, 16), (2, 4)
WINDOW, POSITIONS = 3, 20
D_MODEL, LAYERS, TEXT_HEADS, FFN, MAX_POSITIONS = 24, 2, 3, 40, 150


def tiny_config(vocab_size: int) -> dict:
    """A config.json with the official fields, small numbers in them."""
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_florence2.Florence2Config"},
        "model_type": "florence2",
        "projection_dim": D_MODEL,
        "vocab_size": vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "text_config": {
            "vocab_size": vocab_size,
            "activation_function": "gelu",
            "d_model": D_MODEL,
            "decoder_attention_heads": TEXT_HEADS,
            "decoder_ffn_dim": FFN,
            "decoder_layers": LAYERS,
            "decoder_start_token_id": 2,
            "early_stopping": True,
            "encoder_attention_heads": TEXT_HEADS,
            "encoder_ffn_dim": FFN,
            "encoder_layers": LAYERS,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "forced_bos_token_id": 0,
            "forced_eos_token_id": 2,
            "is_encoder_decoder": True,
            "max_position_embeddings": MAX_POSITIONS,
            "no_repeat_ngram_size": 3,
            "num_hidden_layers": LAYERS,
            "num_beams": 3,
            "scale_embedding": False,
        },
        "vision_config": {
            "model_type": "davit",
            "drop_path_rate": 0.1,
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "enable_checkpoint": False,
            "dim_embed": list(DIMS),
            "num_heads": list(HEADS),
            "num_groups": list(HEADS),
            "depths": list(DEPTHS),
            "window_size": WINDOW,
            "projection_dim": D_MODEL,
            "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 5},
            "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": POSITIONS},
            "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        },
    }


def official_shapes(vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every official key with its shape."""

    def linear(name: str, out: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, inner)
        yield f"{name}.bias", (out,)

    def norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (size,)
        yield f"{name}.bias", (size,)

    before = 3
    for stage, dim in enumerate(DIMS):
        conv = f"vision_tower.convs.{stage}"
        kernel = 7 if stage == 0 else 3
        yield f"{conv}.proj.weight", (dim, before, kernel, kernel)
        yield f"{conv}.proj.bias", (dim,)
        yield from norm(f"{conv}.norm", dim if stage == 0 else before)
        for depth in range(DEPTHS[stage]):
            for block, attention in (
                ("spatial_block", "window_attn"),
                ("channel_block", "channel_attn"),
            ):
                base = f"vision_tower.blocks.{stage}.{depth}.{block}"
                for number in (1, 2):
                    yield f"{base}.conv{number}.fn.dw.weight", (dim, 1, 3, 3)
                    yield f"{base}.conv{number}.fn.dw.bias", (dim,)
                yield from norm(f"{base}.{attention}.norm", dim)
                yield from linear(f"{base}.{attention}.fn.qkv", 3 * dim, dim)
                yield from linear(f"{base}.{attention}.fn.proj", dim, dim)
                yield from norm(f"{base}.ffn.norm", dim)
                yield from linear(f"{base}.ffn.fn.net.fc1", 4 * dim, dim)
                yield from linear(f"{base}.ffn.fn.net.fc2", dim, 4 * dim)
        before = dim
    yield "image_projection", (DIMS[-1], D_MODEL)
    yield from norm("image_proj_norm", D_MODEL)
    yield "image_pos_embed.row_embeddings.weight", (POSITIONS, DIMS[-1] // 2)
    yield "image_pos_embed.column_embeddings.weight", (POSITIONS, DIMS[-1] - DIMS[-1] // 2)
    yield "visual_temporal_embed.pos_idx_to_embed", (5, DIMS[-1])
    yield "language_model.model.shared.weight", (vocab_size, D_MODEL)
    yield "language_model.final_logits_bias", (1, vocab_size)
    for side in ("encoder", "decoder"):
        base = f"language_model.model.{side}"
        yield f"{base}.embed_positions.weight", (MAX_POSITIONS + 2, D_MODEL)
        yield from norm(f"{base}.layernorm_embedding", D_MODEL)
        for layer in range(LAYERS):
            name = f"{base}.layers.{layer}"
            for kind in ("self_attn", "encoder_attn")[: 1 if side == "encoder" else 2]:
                for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    yield from linear(f"{name}.{kind}.{part}", D_MODEL, D_MODEL)
                yield from norm(f"{name}.{kind}_layer_norm", D_MODEL)
            yield from linear(f"{name}.fc1", FFN, D_MODEL)
            yield from linear(f"{name}.fc2", D_MODEL, FFN)
            yield from norm(f"{name}.final_layer_norm", D_MODEL)


def random_weights(vocab_size: int) -> Weights:
    torch.manual_seed(7)
    weights = {}
    for name, shape in official_shapes(vocab_size):
        value = torch.randn(shape) * 0.3
        if "norm" in name and name.endswith("weight"):
            value = 1 + value
        weights[name] = value
    weights["language_model.final_logits_bias"].zero_()
    return weights


# The original arithmetic.


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def depthwise(w: Weights, name: str, x: Tensor, side: int) -> Tensor:
    batch, _, dim = x.shape
    image = x.transpose(1, 2).reshape(batch, dim, side, side)
    image = F.conv2d(image, w[f"{name}.weight"], w[f"{name}.bias"], padding=1, groups=dim)
    return x + image.flatten(2).transpose(1, 2)


def window_attention(w: Weights, name: str, x: Tensor, side: int, heads: int) -> Tensor:
    batch, _, dim = x.shape
    x = x.view(batch, side, side, dim)
    rest = (WINDOW - side % WINDOW) % WINDOW
    x = F.pad(x, (0, 0, 0, rest, 0, rest))
    out = torch.zeros_like(x)
    for top in range(0, side + rest, WINDOW):
        for left in range(0, side + rest, WINDOW):
            part = x[:, top : top + WINDOW, left : left + WINDOW].reshape(batch, -1, dim)
            q, k, v = linear(w, f"{name}.qkv", part).chunk(3, dim=-1)
            pieces = []
            for head in range(heads):
                at = slice(head * dim // heads, (head + 1) * dim // heads)
                scores = q[..., at] @ k[..., at].transpose(1, 2) * (dim // heads) ** -0.5
                pieces.append(scores.softmax(-1) @ v[..., at])
            seen = linear(w, f"{name}.proj", torch.cat(pieces, -1))
            out[:, top : top + WINDOW, left : left + WINDOW] = seen.view(batch, WINDOW, WINDOW, dim)
    return out[:, :side, :side].reshape(batch, -1, dim)


def channel_attention(w: Weights, name: str, x: Tensor, groups: int) -> Tensor:
    _, tokens, dim = x.shape
    q, k, v = linear(w, f"{name}.qkv", x).chunk(3, dim=-1)
    pieces = []
    for group in range(groups):
        at = slice(group * dim // groups, (group + 1) * dim // groups)
        scores = (q[..., at] * tokens**-0.5).transpose(1, 2) @ k[..., at]
        pieces.append((scores.softmax(-1) @ v[..., at].transpose(1, 2)).transpose(1, 2))
    return linear(w, f"{name}.proj", torch.cat(pieces, -1))


def davit(w: Weights, pixels: Tensor) -> Tensor:
    x, side = pixels, pixels.shape[-1]
    for stage in range(len(DIMS)):
        conv = f"vision_tower.convs.{stage}"
        if stage > 0:  # prenorm
            x = layer_norm(w, f"{conv}.norm", x).transpose(1, 2).reshape(len(x), -1, side, side)
        stride, padding = (4, 3) if stage == 0 else (2, 1)
        x = F.conv2d(x, w[f"{conv}.proj.weight"], w[f"{conv}.proj.bias"], stride, padding)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        if stage == 0:
            x = layer_norm(w, f"{conv}.norm", x)
        for depth in range(DEPTHS[stage]):
            for kind in ("spatial_block", "channel_block"):
                base = f"vision_tower.blocks.{stage}.{depth}.{kind}"
                x = depthwise(w, f"{base}.conv1.fn.dw", x, side)
                if kind == "spatial_block":
                    seen = layer_norm(w, f"{base}.window_attn.norm", x)
                    x = x + window_attention(w, f"{base}.window_attn.fn", seen, side, HEADS[stage])
                else:
                    seen = layer_norm(w, f"{base}.channel_attn.norm", x)
                    x = x + channel_attention(w, f"{base}.channel_attn.fn", seen, HEADS[stage])
                x = depthwise(w, f"{base}.conv2.fn.dw", x, side)
                seen = layer_norm(w, f"{base}.ffn.norm", x)
                wide = F.gelu(linear(w, f"{base}.ffn.fn.net.fc1", seen))
                x = x + linear(w, f"{base}.ffn.fn.net.fc2", wide)
    return x


def image_features(w: Weights, pixels: Tensor) -> Tensor:
    x = davit(w, pixels)
    side = math.isqrt(x.shape[1])
    columns = w["image_pos_embed.column_embeddings.weight"][:side]
    rows = w["image_pos_embed.row_embeddings.weight"][:side]
    position = torch.cat(
        [columns[None].expand(side, -1, -1), rows[:, None].expand(-1, side, -1)], dim=-1
    )
    x = x + position.reshape(side * side, -1)
    x = x + w["visual_temporal_embed.pos_idx_to_embed"][0]  # one frame in time
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
    return layer_norm(w, "image_proj_norm", x @ w["image_projection"])


def bart_attention(w: Weights, name: str, x: Tensor, seen: Tensor, *, causal: bool) -> Tensor:
    q = linear(w, f"{name}.q_proj", x) * (D_MODEL // TEXT_HEADS) ** -0.5
    k, v = linear(w, f"{name}.k_proj", seen), linear(w, f"{name}.v_proj", seen)
    pieces = []
    for head in range(TEXT_HEADS):
        at = slice(head * D_MODEL // TEXT_HEADS, (head + 1) * D_MODEL // TEXT_HEADS)
        scores = q[..., at] @ k[..., at].transpose(1, 2)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        pieces.append(scores.softmax(-1) @ v[..., at])
    return linear(w, f"{name}.out_proj", torch.cat(pieces, -1))


def bart_side(w: Weights, side: str, x: Tensor, memory: Tensor | None) -> Tensor:
    base = f"language_model.model.{side}"
    # BART's table of positions begins with two rows that are never used.
    x = x + w[f"{base}.embed_positions.weight"][2 : 2 + x.shape[1]]
    x = layer_norm(w, f"{base}.layernorm_embedding", x)
    for layer in range(LAYERS):
        name = f"{base}.layers.{layer}"
        seen = bart_attention(w, f"{name}.self_attn", x, x, causal=memory is not None)
        x = layer_norm(w, f"{name}.self_attn_layer_norm", x + seen)
        if memory is not None:
            seen = bart_attention(w, f"{name}.encoder_attn", x, memory, causal=False)
            x = layer_norm(w, f"{name}.encoder_attn_layer_norm", x + seen)
        wide = F.gelu(linear(w, f"{name}.fc1", x))
        x = layer_norm(w, f"{name}.final_layer_norm", x + linear(w, f"{name}.fc2", wide))
    return x


def original_logits(w: Weights, pixels: Tensor, words: Tensor, answer: Tensor) -> Tensor:
    table = w["language_model.model.shared.weight"]
    memory = bart_side(
        w, "encoder", torch.cat([image_features(w, pixels), table[words]], dim=1), None
    )
    hidden = bart_side(w, "decoder", table[answer], memory)
    return hidden @ table.T + w["language_model.final_logits_bias"]


# The tests.

WriteCheckpoint = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteCheckpoint:
    """Write an official folder; shards is the number of weight files."""

    def make(weights: Weights, *, vocab_size: int, shards: int = 1, pickled: bool = False) -> Path:
        folder = tmp_path / "official"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(tiny_config(vocab_size)))
        if pickled:
            torch.save(weights, folder / "pytorch_model.bin")
        elif shards == 1:
            save_file(weights, folder / "model.safetensors")
        else:
            index = {}
            for number in range(shards):
                name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
                part = {k: weights[k] for k in sorted(weights)[number::shards]}
                save_file(part, folder / name)
                index |= dict.fromkeys(part, name)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return folder

    return make


VOCAB = 60
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))  # 7 x 7 cells
WORDS = torch.tensor([[0, 11, 12, 13, 2], [0, 21, 22, 23, 2]])
ANSWER = torch.tensor([[2, 0, 30, 31], [2, 0, 40, 41]])


def logits_of(module, pixels: Tensor = PIXELS) -> Tensor:
    cells = 1 + 7 * 7
    image = torch.full((2, cells), module.config.image_token_id)
    ids = torch.cat([image, WORDS], dim=1)
    with torch.no_grad():
        return module(input_ids=ids, pixel_values=pixels, decoder_input_ids=ANSWER).logits


@pytest.mark.parametrize("layout", [{}, {"shards": 3}, {"pickled": True}])
def test_logits_equal_the_original_arithmetic(write: WriteCheckpoint, layout: dict) -> None:
    weights = random_weights(VOCAB)
    module = load_module(write(weights, vocab_size=VOCAB, **layout), "float32", "cpu")
    expected = original_logits(weights, PIXELS, WORDS, ANSWER)
    found = logits_of(module)
    assert found.shape == (2, 4, VOCAB + 1)  # transformers' place holder for the image
    torch.testing.assert_close(found[..., :VOCAB], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kept", ["language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight"]
)
def test_any_one_of_the_shared_tables_is_enough(write: WriteCheckpoint, kept: str) -> None:
    weights = random_weights(VOCAB)
    expected = original_logits(weights, PIXELS, WORDS, ANSWER)
    weights[kept] = weights.pop("language_model.model.shared.weight")
    module = load_module(write(weights, vocab_size=VOCAB), "float32", "cpu")
    torch.testing.assert_close(logits_of(module)[..., :VOCAB], expected, atol=1e-5, rtol=1e-5)


def test_shared_tables_that_differ_are_refused(write: WriteCheckpoint) -> None:
    weights = random_weights(VOCAB)
    weights["language_model.lm_head.weight"] = torch.randn(VOCAB, D_MODEL)
    with pytest.raises(ModelError, match="shares its weights") as caught:
        load_module(write(weights, vocab_size=VOCAB), "float32", "cpu")
    assert caught.value.code == ErrorCode.KEY_MISMATCH


def test_every_dimension_comes_from_the_folder(write: WriteCheckpoint) -> None:
    module = load_module(write(random_weights(VOCAB), vocab_size=VOCAB), "float32", "cpu")
    vision, text = module.config.vision_config, module.config.text_config
    assert (tuple(vision.embed_dim), tuple(vision.depths)) == (DIMS, DEPTHS)
    assert (tuple(vision.num_heads), vision.window_size) == (HEADS, WINDOW)
    assert vision.max_position_embeddings == POSITIONS
    assert (text.d_model, text.encoder_layers, text.vocab_size) == (D_MODEL, LAYERS, VOCAB + 1)
    assert text.max_position_embeddings == MAX_POSITIONS
    assert module.config.image_token_id == VOCAB


def test_a_bias_that_has_no_place_must_be_zero(write: WriteCheckpoint) -> None:
    weights = random_weights(VOCAB)
    weights["language_model.final_logits_bias"][0, 5] = 0.1
    with pytest.raises(ModelError) as caught:
        load_module(write(weights, vocab_size=VOCAB), "float32", "cpu")
    assert caught.value.code == ErrorCode.KEY_MISMATCH


def test_an_unknown_image_feature_source_is_refused(write: WriteCheckpoint) -> None:
    folder = write(random_weights(VOCAB), vocab_size=VOCAB)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_feature_source"] = ["last_frame"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_module(folder, "float32", "cpu")
    assert caught.value.code == ErrorCode.BAD_CONFIG


@pytest.fixture
def whole_folder(write: WriteCheckpoint) -> Path:
    """An official folder with its tokenizer, which lacks the location and task tokens."""
    tokenizer = word_tokenizer(added=())
    vocab_size = tokenizer.get_vocab_size() + 1024
    folder = write(random_weights(vocab_size), vocab_size=vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": {"height": 56, "width": 56},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_a_whole_official_folder_answers_with_the_published_settings(whole_folder, ask) -> None:
    vlm = create_vlm("florence-2-base", pretrained=str(whole_folder), device="cpu")
    rules = vlm.rules(ask("caption").params)
    assert (rules.num_beams, rules.no_repeat_ngram) == (3, 3)
    assert (rules.forced_first, rules.forced_last, rules.early_stopping) == (0, 2, True)
    assert rules.max_new_tokens == MAX_POSITIONS  # as many as there are positions for
    (answer,) = vlm.run([ask("detect")])
    assert answer.generated_tokens > 2


def test_saved_in_the_native_layout_it_loads_and_answers_the_same(
    whole_folder, ask, tmp_path
) -> None:
    vlm = create_vlm("florence-2-base", pretrained=str(whole_folder), device="cpu")
    vlm.save_pretrained(tmp_path / "native")
    again = create_vlm("florence-2-base", pretrained=str(tmp_path / "native"), device="cpu")
    assert again.settings == vlm.settings
    requests = [ask("detect"), ask("caption")]
    for one, other in zip(vlm.run(requests), again.run(requests), strict=True):
        assert (one.text, one.regions) == (other.text, other.regions)
