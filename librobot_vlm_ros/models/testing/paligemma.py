"""PaliGemma at tiny size: a published checkpoint, and the original arithmetic to compare with.

`original_logits` follows the papers (SigLIP: Zhai et al. 2023; Gemma: Mesnard et al. 2024; the
prefix that sees all of itself: Beyer et al. 2024). It reads tensors by the names they were
published under and knows nothing of transformers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import string
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from librobot_vlm_ros.models.families.preprocess import normalise
from librobot_vlm_ros.models.testing.parts import (
    encoder_weights,
    heads,
    layer_norm,
    projection_sizes,
    turned,
)

__all__ = ["difference", "mask_decoder_weights", "original_logits", "pixels", "write_official"]

SIDE = 224
VISION: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
PATCHES, EPS = 4, 1e-6
LETTERS = "▁\n" + string.ascii_letters + string.digits + string.punctuation
#: Token ids behind the image.
IDS = [2, 30, 31, 40, 21, 35, 50]


def _tokenizer() -> Any:
    """Letters for words, and PaliGemma's added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    names = ["<pad>", "<eos>", "<bos>", "<unk>", *LETTERS]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, [], unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    added = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
    special = ["<pad>", "<eos>", "<bos>", *added, "<image>"]
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return made


def _published_weights(words: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random) * 0.2

    state = {}
    width, base = VISION["hidden_size"], "vision_tower.vision_model."
    state[f"{base}embeddings.patch_embedding.weight"] = normal(width, 3, 14, 14) * 0.3
    state[f"{base}embeddings.patch_embedding.bias"] = normal(width)
    state[f"{base}embeddings.position_embedding.weight"] = normal(PATCHES, width)
    state |= encoder_weights(normal, base, VISION, [f"{base}post_layernorm"])
    hidden, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    state["multi_modal_projector.linear.weight"] = normal(hidden, width)
    state["multi_modal_projector.linear.bias"] = normal(hidden)
    state["language_model.model.embed_tokens.weight"] = normal(words, hidden)
    state["language_model.model.norm.weight"] = normal(hidden)
    kv = TEXT["head_dim"] * TEXT["num_key_value_heads"]
    for layer in range(TEXT["num_hidden_layers"]):
        at = f"language_model.model.layers.{layer}."
        for name, size in projection_sizes(hidden, inner, kv).items():
            state[f"{at}{name}.weight"] = normal(*size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{norm}.weight"] = normal(hidden)
    return state


def write_official(folder: Path) -> None:
    """A folder laid out as google/paligemma-3b-pt-224."""
    folder.mkdir(parents=True)
    made = _tokenizer()
    made.save(str(folder / "tokenizer.json"))
    image = made.token_to_id("<image>")
    words = image + 3  # padding behind the image token, as in the published table
    config = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": TEXT["hidden_size"],
        "projection_dim": TEXT["hidden_size"],
        "image_token_index": image,
        "text_config": {**TEXT, "model_type": "gemma", "vocab_size": words},
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_published_weights(words), folder / "model.safetensors")
    np.savez(folder / "vae-oid.npz", **mask_decoder_weights())


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
    from PIL import Image
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    vlm.images = dataclasses.replace(vlm.images, height=SIDE, width=SIDE)
    ours = normalise([vlm._pixels(image)], vlm.images, torch.device("cpu"), torch.float32)
    reference = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=3)
    theirs = reference(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    return ours, theirs


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _siglip_features(state: dict[str, Tensor], image: Tensor) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(state, name, x, EPS)

    base, count = "vision_tower.vision_model.", VISION["num_attention_heads"]
    kernel = state[f"{base}embeddings.patch_embedding.weight"].flatten(1)
    cells = [image[:, y : y + 14, x : x + 14].flatten() for y in (0, 14) for x in (0, 14)]
    x = torch.stack([kernel @ cell for cell in cells])
    x = x + state[f"{base}embeddings.patch_embedding.bias"]
    x = x + state[f"{base}embeddings.position_embedding.weight"]
    for layer in range(VISION["num_hidden_layers"]):
        at = f"{base}encoder.layers.{layer}."
        y = norm(x, f"{at}layer_norm1")
        q, k, v = (heads(linear(y, f"{at}self_attn.{n}_proj"), count) for n in "qkv")
        mixed = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).flatten(1), f"{at}self_attn.out_proj")
        y = _gelu(linear(norm(x, f"{at}layer_norm2"), f"{at}mlp.fc1"))
        x = x + linear(y, f"{at}mlp.fc2")
    return linear(norm(x, f"{base}post_layernorm"), "multi_modal_projector.linear")


def original_logits(state: dict[str, Tensor], image: Tensor, ids: list[int], prefix: int) -> Tensor:
    """Logits [4 + len(ids), words]; image and the first `prefix` ids see one another."""

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        return scaled * (1 + state[f"{name}.weight"])

    base, table = "language_model.model.", state["language_model.model.embed_tokens.weight"]
    words = table[ids] * math.sqrt(TEXT["hidden_size"])
    x = torch.cat([_siglip_features(state, image), words])
    count, size, length = TEXT["num_attention_heads"], TEXT["head_dim"], len(x)
    unseen = torch.full((length, length), -math.inf).triu(1)
    unseen[: PATCHES + prefix, : PATCHES + prefix] = 0.0
    for layer in range(TEXT["num_hidden_layers"]):
        at = f"{base}layers.{layer}."
        y = norm(x, f"{at}input_layernorm")
        q = turned(heads(y @ state[f"{at}self_attn.q_proj.weight"].T, count))
        k = turned(heads(y @ state[f"{at}self_attn.k_proj.weight"].T, 1))
        v = heads(y @ state[f"{at}self_attn.v_proj.weight"].T, 1)
        mixed = (q @ k.transpose(1, 2) / math.sqrt(size) + unseen).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ state[f"{at}self_attn.o_proj.weight"].T
        y = norm(x, f"{at}post_attention_layernorm")
        gate = _gelu(y @ state[f"{at}mlp.gate_proj.weight"].T)
        up = y @ state[f"{at}mlp.up_proj.weight"].T
        x = x + (gate * up) @ state[f"{at}mlp.down_proj.weight"].T
    return norm(x, f"{base}norm") @ table.T
