"""LLaVA-1.5 at tiny size: an official checkpoint, and the original arithmetic to compare with.

`original_logits` follows LLaVA (llava_arch.py: features of the last but one CLIP layer without the
class token, an MLP of two layers, put in the image's place), CLIP (Radford et al. 2021) and Llama
(Touvron et al. 2023). It reads tensors by their official names and knows nothing of transformers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from librobot_vlm_ros.models.families.llava.processor import BEFORE_IMAGE, LLAVA_TASKS
from librobot_vlm_ros.models.inputs.preprocess import CLIP_MEAN, CLIP_STD
from librobot_vlm_ros.models.testing.conformance import our_pixels
from librobot_vlm_ros.models.testing.parts import (
    RandomWeights,
    State,
    causal_mask,
    decoder_layer,
    encoder_layer,
    gelu,
    layer_norm,
    linear,
    official_config,
    patches,
    pieces,
    quick_gelu,
    reference_pixels,
    rms_norm,
    rotary_angles,
    write_json,
    write_shards,
)

SIDE = 336
#: The official config.json, whose top level is Llama's, and the tower's.
TEXT, _TOWER = official_config("llava"), official_config("llava_tower")
VISION = _TOWER["vision_config"]
PATCHES, EPS = 4, 1e-5
#: Token ids; the image stands behind the first.
IDS = [1, 300, 301, 7, 20, 33]


def _clip_weights(made: RandomWeights) -> State:
    """A whole CLIP: what reads text is published with the tower."""
    width, base = VISION["hidden_size"], "vision_model."
    made.add(f"{base}embeddings.class_embedding", width)
    made.add(f"{base}embeddings.patch_embedding.weight", width, 3, 14, 14)
    made.add(f"{base}embeddings.position_embedding.weight", PATCHES + 1, width)
    made.add("text_model.final_layer_norm.weight", 9)
    made.add("text_projection.weight", 16, 9)
    made.add("visual_projection.weight", 16, width)
    made.add("logit_scale")
    for layer in range(VISION["num_hidden_layers"]):
        made.encoder_layer(f"{base}encoder.layers.{layer}.", width, VISION["intermediate_size"])
    made.norm(f"{base}pre_layrnorm", width)
    made.norm(f"{base}post_layernorm", width)
    made.state[f"{base}embeddings.position_ids"] = torch.arange(PATCHES + 1)[None]
    made.state["text_model.embeddings.position_ids"] = torch.arange(7)[None]
    return made.state


def _llama_weights(made: RandomWeights, words: int) -> State:
    width, inner, seen = TEXT["hidden_size"], TEXT["intermediate_size"], VISION["hidden_size"]
    kv = width // TEXT["num_attention_heads"] * TEXT["num_key_value_heads"]
    made.add("model.embed_tokens.weight", words, width)
    made.norm("model.norm", width, bias=False)
    made.add("lm_head.weight", words, width)
    made.linear("model.mm_projector.0", width, seen)
    made.linear("model.mm_projector.2", width, width)
    for layer in range(TEXT["num_hidden_layers"]):
        made.decoder_layer(f"model.layers.{layer}.", width, inner, width, kv)
        made.state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return made.state


def write_official(folder: Path) -> None:
    """A folder laid out as liuhaotian/llava-v1.5-7b, its tower beside it."""
    import sentencepiece

    tower = folder / "vision_tower"
    tower.mkdir(parents=True)
    model = pieces([BEFORE_IMAGE, *LLAVA_TASKS.values(), "[0.25, 0.5, 0.75, 1.0] a red cube"], 400)
    (folder / "tokenizer.model").write_bytes(model)
    words = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    state = _llama_weights(RandomWeights(5), words)
    index = write_shards(folder, state, ["a.bin", "b.bin"], torch.save)
    config = {**TEXT, "vocab_size": words}
    write_json(folder, config=config, **{"pytorch_model.bin.index": index})
    save_file(_clip_weights(RandomWeights(6)), tower / "model.safetensors")
    write_json(tower, config=_TOWER)


def difference(folder: Path, module: Any) -> float:
    """Largest difference of a logit between the converted module and the original arithmetic."""
    image = torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(1))
    expected = original_logits(read_weights(folder), image, IDS, at=1)
    words = expected.shape[1]
    ids = torch.tensor([[IDS[0], *[module.config.image_token_id] * PATCHES, *IDS[1:]]])
    with torch.no_grad():
        found = module(
            input_ids=ids, pixel_values=image[None], attention_mask=torch.ones_like(ids)
        ).logits[0, :, :words]
    return float((found - expected).abs().max())


def pixels(vlm: Any, image: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """The published side's pixels [1, 3, H, W]: ours, and the reference processor's."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    reference = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    return our_pixels(vlm, image, height=SIDE, width=SIDE), reference_pixels(reference, image)


def read_weights(folder: Path) -> State:
    """All tensors of such a folder by their official names."""
    state: State = {}
    for shard in ("a.bin", "b.bin"):
        state |= torch.load(folder / shard, weights_only=True)
    return state | load_file(folder / "vision_tower" / "model.safetensors")


def _clip_features(state: State, image: Tensor) -> Tensor:
    """[3, 28, 28] to the patches [4, 24] of the last but one layer."""
    base = "vision_model."
    cells = patches(image, state[f"{base}embeddings.patch_embedding.weight"])
    x = torch.cat([state[f"{base}embeddings.class_embedding"][None], cells])
    x = x + state[f"{base}embeddings.position_embedding.weight"]
    x = layer_norm(state, f"{base}pre_layrnorm", x, EPS)
    for layer in range(VISION["num_hidden_layers"] - 1):
        at = f"{base}encoder.layers.{layer}."
        x = encoder_layer(state, at, x, VISION["num_attention_heads"], EPS, quick_gelu)
    return x[1:]


def original_logits(state: State, image: Tensor, ids: list[int], at: int) -> Tensor:
    """Logits [T, words] of `ids` with the image in front of ids[at]."""
    norm = partial(rms_norm, eps=EPS)
    seen = gelu(linear(state, "model.mm_projector.0", _clip_features(state, image)))
    seen = linear(state, "model.mm_projector.2", seen)
    words = state["model.embed_tokens.weight"][ids]
    x = torch.cat([words[:at], seen, words[at:]])
    angles = rotary_angles(len(x), TEXT["hidden_size"] // TEXT["num_attention_heads"])
    for layer in range(TEXT["num_hidden_layers"]):
        x = decoder_layer(state, f"model.layers.{layer}.", x, angles, causal_mask(len(x)), norm)
    return linear(state, "lm_head", norm(state, "model.norm", x))
