"""Models of every family with random weights, and transformers' way to run them."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from librobot_vlm_ros.models import create_vlm

_VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
_VISION |= {"num_attention_heads": 2, "image_size": 56, "patch_size": 14}
_MARKS = {"image_token_id": 1100, "video_token_id": 1101}
_MARKS |= {"vision_start_token_id": 1102, "vision_end_token_id": 1103}


def _text(layers: int, **more: Any) -> dict[str, Any]:
    """Wide at the start, so that answers vary: a fresh model repeats the token it was fed."""
    return {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1200,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }


#: Small models by registered name.
TINY: dict[str, dict[str, Any]] = {
    "internvl2-2b": {
        "vision_config": _VISION,
        "text_config": _text(8, head_dim=32),
        "image_token_id": 1100,
    },
    "llava-v1.5-7b": {"vision_config": _VISION, "text_config": _text(8, head_dim=32)},
    "paligemma-3b": {
        "vision_config": _VISION,
        "text_config": _text(8, head_dim=32),
        "image_token_id": 1100,
    },
    "qwen2-vl-2b": {
        **_MARKS,
        "vision_config": {"depth": 2, "embed_dim": 48, "num_heads": 2},
        "text_config": _text(8, rope_scaling={"type": "mrope", "mrope_section": [8, 4, 4]}),
    },
    "qwen3-vl-4b": {
        **_MARKS,
        "vision_config": {
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_heads": 2,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
        "text_config": _text(
            8, head_dim=32, rope_scaling={"rope_type": "default", "mrope_section": [8, 4, 4]}
        ),
    },
    "florence-2-base": {
        "vision_config": {
            "depths": [1, 1, 1, 1],
            "embed_dim": [16, 32, 48, 64],
            "num_heads": [1, 2, 3, 4],
            "num_groups": [1, 2, 3, 4],
            "patch_stride": [4, 2, 2, 2],
            "window_size": 4,
            "projection_dim": 128,
            "max_position_embeddings": 16,
        },
        "text_config": {
            "d_model": 128,
            "encoder_layers": 4,
            "decoder_layers": 6,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 256,
            "decoder_ffn_dim": 256,
            "vocab_size": 1200,
            "init_std": 0.3,
        },
        "image_size": 128,
    },
}


def build(name: str, device: str, dtype: str = "float32", **config: Any) -> Any:
    """A model of random weights that never ends an answer before its room is used up."""
    torch.manual_seed(0)
    vlm = create_vlm(name, config={"variant": name, **config}, device=device, dtype=dtype).eval()
    text = vlm.config.text_config
    ends = text.eos_token_id
    never = {*(ends if isinstance(ends, (list, tuple)) else [ends])}
    usual = vlm.processor.suppressed
    if vlm.family == "florence-2":
        vlm.processor.settings = dataclasses.replace(
            vlm.processor.settings, forced_eos_token_id=None
        )
        _weigh_written_tokens(vlm)
    vlm.processor.suppressed = lambda: sorted({*usual(), *never})
    return vlm


def _weigh_written_tokens(vlm: Any) -> None:
    """Let the last token count for more than the image does.

    What a fresh model writes next hardly depends on what it has written. Under the rule against
    repeats many orders of the same tokens are then equally likely, and which of them a search over
    beams ends at is up to rounding.
    """
    decoder = vlm.language_model.decoder
    with torch.no_grad():
        decoder.embed_tokens.weight.mul_(3.0)
        for layer in decoder.layers:
            layer.encoder_attn.out_proj.weight.mul_(0.1)
            layer.fc2.weight.mul_(0.3)
            layer.self_attn.q_proj.weight.mul_(0.3)


class Pair:
    """A model asked both ways about the same normalised image and the same ids."""

    def __init__(self, vlm: Any, new_tokens: int, side: int, words: int = 20) -> None:
        self.vlm, self.new_tokens, self.side, self.words = vlm, new_tokens, side, words
        self.florence = vlm.family == "florence-2"
        self.qwen = vlm.family.startswith("qwen")
        #: Beams of Florence-2, which has no other settings here.
        self.beams = 1

    def inputs(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Different images with the same words."""
        random = torch.Generator().manual_seed(7)
        ids = torch.randint(5, 1000, (1, self.words), generator=random)
        made = []
        for _ in range(count):
            image = torch.randn(1, 3, self.side, self.side, generator=random)
            made.append((image.to(self.vlm.torch_device, self.vlm.torch_dtype), ids))
        return made

    def ours(self, given: tuple[Tensor, Tensor], new_tokens: int = 0) -> list[int]:
        """Through this package."""
        image, ids = given
        options = {"num_beams": self.beams} if self.florence else {}
        out = self.vlm.generate(image, ids, max_new_tokens=new_tokens or self.new_tokens, **options)
        return list(out[0].tolist())

    def theirs(self, given: tuple[Tensor, Tensor], new_tokens: int = 0) -> list[int]:
        """Through transformers."""
        image, ids = given
        vlm, config = self.vlm, self.vlm.config
        device = vlm.torch_device
        ids = ids.to(device)
        more: dict[str, Any] = {"pixel_values": image}
        count = self.image_vectors(image)
        mark = torch.full((1, count), config.image_token_id, device=device)
        text = config.text_config
        image_first = getattr(vlm, "image_leads", False)  # also in front of the begin token
        front = getattr(text, "bos_token_id", None) == int(ids[0, 0]) and not image_first
        whole = torch.cat([ids[:, :1], mark, ids[:, 1:]] if front else [mark, ids], dim=1)
        if self.qwen:
            more = self._patches(image)
            more["mm_token_type_ids"] = (whole == config.image_token_id).int()
        if vlm.family == "paligemma":
            more["token_type_ids"] = torch.zeros_like(whole)
        suppressed = vlm.processor.suppressed()
        settings: dict[str, Any] = {"do_sample": False, "suppress_tokens": suppressed}
        settings |= {"max_new_tokens": new_tokens or self.new_tokens, "num_beams": self.beams}
        ends = text.eos_token_id
        settings["eos_token_id"] = ends
        first = ends[0] if isinstance(ends, (list, tuple)) else ends
        settings["pad_token_id"] = first if text.pad_token_id is None else text.pad_token_id
        if self.florence:
            settings |= published_settings(vlm)
        vlm.module.generation_config = GenerationConfig()
        with torch.inference_mode():
            out = vlm.module.generate(
                input_ids=whole,
                attention_mask=torch.ones_like(whole),
                generation_config=GenerationConfig(**settings),
                **more,
            )
        return list(out[0, 1 if self.florence else whole.shape[1] :].tolist())

    def image_vectors(self, image: Tensor) -> int:
        """How many vectors of the text model the image becomes."""
        if self.qwen:
            return int(self.vlm._count(image[0]))
        return int(self.vlm.processor.image_tokens)

    def _patches(self, image: Tensor) -> dict[str, Any]:
        from librobot_vlm_ros.models.families.qwen_vl.processor import patches

        images, device = self.vlm.images, self.vlm.torch_device
        cells = patches(image[0], images, device, self.vlm.torch_dtype)
        height, width = (side // images.patch for side in image.shape[-2:])
        grid = torch.tensor([[1, height, width]], device=device)
        return {"pixel_values": cells, "image_grid_thw": grid}


def published_settings(florence: Any) -> dict[str, Any]:
    """What a Florence-2 checkpoint says about generation, as transformers names it."""
    settings = florence.settings
    return {
        "decoder_start_token_id": florence.config.text_config.decoder_start_token_id,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size or None,
        "forced_bos_token_id": settings.forced_bos_token_id,
        "forced_eos_token_id": settings.forced_eos_token_id,
        "early_stopping": settings.early_stopping,
        "length_penalty": settings.length_penalty,
    }


def pair_of(name: str, device: str, new_tokens: int, **config: Any) -> Pair:
    """A small model of a family, ready to be asked."""
    sides = {"florence-2-base": 128, "qwen3-vl-4b": 96}
    sides |= dict.fromkeys(("internvl2-2b", "llava-v1.5-7b", "paligemma-3b"), 56)
    vlm = build(name, device, **{**TINY[name], **config})
    return Pair(vlm, new_tokens, sides.get(name, 112))


def qwen_tokenizer(name: str, generation: Any) -> tuple[Any, dict[str, Any]]:
    """A tokenizer of letters, and what a Qwen-VL config must know of its tokens."""
    from librobot_vlm_ros.models.testing.qwen_vl import IDS, write_official

    with tempfile.TemporaryDirectory(prefix="librobot-vlm-bench-") as scratch:
        folder = Path(scratch) / "tiny"
        write_official(folder, generation)
        tokenizer = create_vlm(name, pretrained=str(folder), device="cpu").tokenizer
    return tokenizer, {
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
    }


def qwen_with_tokenizer(device: str, layers: int = 12) -> Any:
    """A Qwen2-VL of random weights with a tokenizer, for whole requests."""
    from librobot_vlm_ros.models.testing.qwen_vl import IDS, SECOND, VOCABULARY

    tokenizer, marks = qwen_tokenizer("qwen2-vl-2b", SECOND)
    rope = {"type": "mrope", "mrope_section": [8, 4, 4]}
    text = _text(layers, vocab_size=VOCABULARY, rope_scaling=rope, eos_token_id=IDS["<|im_end|>"])
    vision = {"depth": 4, "embed_dim": 64, "num_heads": 4}
    vlm = build("qwen2-vl-2b", device, vision_config=vision, text_config=text, **marks)
    vlm.processor.tokenizer = tokenizer
    return vlm
