"""Models of every family with random weights, and transformers' way to run them."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from librobot_vlm_ros.bench.measure import Bench
from librobot_vlm_ros.models import create_vlm

#: Small models by registered name. Their weights start out wide, so that answers vary: a fresh
#: model repeats the token it was fed.
TINY: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("tiny.json").read_text(encoding="utf-8")
)


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


def search(beams: int) -> str:
    """What a row's name calls the way to search."""
    return "greedy" if beams == 1 else f"{beams} beams"


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
        more: dict[str, Any] = {"pixel_values": image}
        mark = torch.full((1, self.image_vectors(image)), config.image_token_id)
        whole = torch.cat([mark, ids], dim=1).to(vlm.torch_device)
        text = config.text_config
        if self.qwen:
            more = self._patches(image)
            more["mm_token_type_ids"] = (whole == config.image_token_id).int()
        if vlm.family == "paligemma":
            more["token_type_ids"] = torch.zeros_like(whole)
        settings: dict[str, Any] = {"suppress_tokens": vlm.processor.suppressed()}
        settings |= {"max_new_tokens": new_tokens or self.new_tokens, "num_beams": self.beams}
        ends = text.eos_token_id
        settings["eos_token_id"] = ends
        first = ends[0] if isinstance(ends, (list, tuple)) else ends
        settings["pad_token_id"] = first if text.pad_token_id is None else text.pad_token_id
        if self.florence:
            settings |= published_settings(vlm)
        vlm.module.generation_config = GenerationConfig()
        row = generate_by_transformers(vlm.module, whole, settings, **more)
        return row[1 if self.florence else whole.shape[1] :]

    def compare(self, bench: Bench, name: str, runs: int, **rest: Any) -> None:
        """A row of `Bench.paired` for so many images."""
        bench.paired(name, self.theirs, self.ours, self.inputs(runs + 1), **rest)

    def image_vectors(self, image: Tensor) -> int:
        """How many vectors of the text model the image becomes."""
        return int(self.vlm.processor.count(image[0] if self.qwen else image))

    def _patches(self, image: Tensor) -> dict[str, Any]:
        from librobot_vlm_ros.models.families.qwen_vl.processor import patches

        images, device = self.vlm.images, self.vlm.torch_device
        cells = patches(image[0], images, device, self.vlm.torch_dtype)
        height, width = (side // images.patch for side in image.shape[-2:])
        grid = torch.tensor([[1, height, width]], device=device)
        return {"pixel_values": cells, "image_grid_thw": grid}


def generate_by_transformers(
    module: Any, ids: Tensor, settings: dict[str, Any], **inputs: Any
) -> list[int]:
    """What `generate` makes of ids [1, T] by these settings, never by chance."""
    with torch.inference_mode():
        out = module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(do_sample=False, **settings),
            **inputs,
        )
    return list(out[0].tolist())


def published_settings(florence: Any) -> dict[str, Any]:
    """What a Florence-2 checkpoint says about generation, as transformers names it."""
    settings = florence.processor.settings
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
    text = {**TINY["qwen2-vl-2b"]["text_config"], "num_hidden_layers": layers}
    text |= {"vocab_size": VOCABULARY, "eos_token_id": IDS["<|im_end|>"]}
    vision = {"depth": 4, "embed_dim": 64, "num_heads": 4}
    vlm = build("qwen2-vl-2b", device, vision_config=vision, text_config=text, **marks)
    vlm.processor.tokenizer = tokenizer
    return vlm
