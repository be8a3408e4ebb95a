"""PaliGemma at tiny size: a published checkpoint, and the original arithmetic to compare with.

`original_logits` follows the papers (SigLIP: Zhai et al. 2023; Gemma: Mesnard et al. 2024; the
prefix that sees all of itself: Beyer et al. 2024). It reads tensors by the names they were
published under and knows nothing of transformers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from librobot_vlm_ros.models.testing.conformance import our_pixels
from librobot_vlm_ros.models.testing.parts import (
    RandomWeights,
    State,
    causal_mask,
    decoder_layer,
    encoder_layer,
    gelu_tanh,
    layer_norm,
    letter_tokenizer,
    linear,
    official_config,
    patches,
    reference_pixels,
    rotary_angles,
    write_json,
)

SIDE = 224
_CONFIG = official_config("paligemma")
VISION, TEXT = _CONFIG["vision_config"], _CONFIG["text_config"]
PATCHES, EPS = 4, 1e-6
#: Token ids behind the image.
IDS = [2, 30, 31, 40, 21, 35, 50]


def _tokenizer() -> Any:
    """Letters for words, and PaliGemma's added tokens."""
    added = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
    return letter_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>"], ["<pad>", "<eos>", "<bos>", *added, "<image>"]
    )


def _published_weights(words: int) -> State:
    made = RandomWeights(7)
    width, base = VISION["hidden_size"], "vision_tower.vision_model."
    made.add(f"{base}embeddings.patch_embedding.weight", width, 3, 14, 14, scale=0.3)
    made.add(f"{base}embeddings.patch_embedding.bias", width)
    made.add(f"{base}embeddings.position_embedding.weight", PATCHES, width)
    for layer in range(VISION["num_hidden_layers"]):
        made.encoder_layer(f"{base}encoder.layers.{layer}.", width, VISION["intermediate_size"])
    made.norm(f"{base}post_layernorm", width)
    hidden, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    made.linear("multi_modal_projector.linear", hidden, width)
    made.add("language_model.model.embed_tokens.weight", words, hidden)
    made.norm("language_model.model.norm", hidden, bias=False, around=0)
    kv = TEXT["head_dim"] * TEXT["num_key_value_heads"]
    for layer in range(TEXT["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        made.decoder_layer(at, hidden, inner, hidden, kv, around=0)
    return made.state


def write_official(folder: Path) -> None:
    """A folder laid out as google/paligemma-3b-pt-224."""
    folder.mkdir(parents=True)
    made = _tokenizer()
    made.save(str(folder / "tokenizer.json"))
    image = made.token_to_id("<image>")
    words = image + 3  # padding behind the image token, as in the published table
    config = {**_CONFIG, "image_token_index": image, "text_config": {**TEXT, "vocab_size": words}}
    write_json(folder, config=config)
    save_file(_published_weights(words), folder / "model.safetensors")
    masks: dict[str, Any] = dict(mask_decoder_weights())
    np.savez(folder / "vae-oid.npz", **masks)


def mask_decoder_weights(seed: int = 11) -> dict[str, npt.NDArray[np.float32]]:
    """Random weights in the layout of the published decoder of masks, with names of its encoder."""
    random = np.random.default_rng(seed)

    def normal(*size: int) -> npt.NDArray[np.float32]:
        return (random.standard_normal(size) * 1.4).astype(np.float32)

    state = {"_vq_vae._embedding": normal(128, 512), "encoder.0.weight": normal(128, 1, 4, 4)}
    # Kernels of a transposed convolution have their inputs first.
    shapes = {"decoder.0": (512, (128, 512, 1, 1)), "decoder.12": (16, (1, 16, 1, 1))}
    for block in (2, 3):
        for layer, side in ((0, 3), (2, 3), (4, 1)):
            name = f"decoder.{block}.net.{layer}"
            shapes[name] = (128 * side**2, (128, 128, side, side))
    for layer, (wide, narrow) in enumerate(((128, 128), (128, 64), (64, 32), (32, 16))):
        shapes[f"decoder.{4 + 2 * layer}"] = (4 * wide, (wide, narrow, 4, 4))
    for name, (inputs, shape) in shapes.items():
        transposed = name in {f"decoder.{4 + 2 * layer}" for layer in range(4)}
        state[f"{name}.weight"] = normal(*shape) / math.sqrt(inputs)
        state[f"{name}.bias"] = normal(shape[1] if transposed else shape[0]) * 0.1
    return state


def difference(folder: Path, module: Any) -> float:
    """Largest difference of a logit between the loaded module and the original arithmetic."""
    image = torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(1))
    state, prefix = load_file(folder / "model.safetensors"), 4
    expected = original_logits(state, image, IDS, prefix)
    ids = torch.tensor([[*[module.config.image_token_id] * PATCHES, *IDS]])
    suffix = torch.zeros_like(ids)
    suffix[:, PATCHES + prefix :] = 1
    with torch.no_grad():
        found = module(
            input_ids=ids,
            pixel_values=image[None],
            attention_mask=torch.ones_like(ids),
            token_type_ids=suffix,
            # transformers reads the kinds of tokens only where it is told the answer.
            labels=torch.where(suffix == 1, ids, -100),
        ).logits[0]
    return float((found - expected).abs().max())


def pixels(vlm: Any, image: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """The published side's pixels [1, 3, H, W]: ours, and the reference processor's."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    reference = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=3)
    return our_pixels(vlm, image, height=SIDE, width=SIDE), reference_pixels(reference, image)


def _siglip_features(state: State, image: Tensor) -> Tensor:
    base = "vision_tower.vision_model."
    x = patches(image, state[f"{base}embeddings.patch_embedding.weight"])
    x = x + state[f"{base}embeddings.patch_embedding.bias"]
    x = x + state[f"{base}embeddings.position_embedding.weight"]
    for layer in range(VISION["num_hidden_layers"]):
        at = f"{base}encoder.layers.{layer}."
        x = encoder_layer(state, at, x, VISION["num_attention_heads"], EPS, gelu_tanh)
    x = layer_norm(state, f"{base}post_layernorm", x, EPS)
    return linear(state, "multi_modal_projector.linear", x)


def original_logits(state: State, image: Tensor, ids: list[int], prefix: int) -> Tensor:
    """Logits [4 + len(ids), words]; image and the first `prefix` ids see one another."""

    def norm(state: State, name: str, x: Tensor) -> Tensor:
        scaled = x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        return scaled * (1 + state[f"{name}.weight"])

    base, table = "language_model.model.", state["language_model.model.embed_tokens.weight"]
    words = table[ids] * math.sqrt(TEXT["hidden_size"])
    x = torch.cat([_siglip_features(state, image), words])
    mask, angles = causal_mask(len(x)), rotary_angles(len(x), TEXT["head_dim"])
    mask[: PATCHES + prefix, : PATCHES + prefix] = 0.0
    for layer in range(TEXT["num_hidden_layers"]):
        x = decoder_layer(state, f"{base}layers.{layer}.", x, angles, mask, norm, gelu_tanh)
    return norm(state, f"{base}norm", x) @ table.T
