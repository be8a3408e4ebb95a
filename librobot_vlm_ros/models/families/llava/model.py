"""LLaVA-1.5 (Liu et al., 2023, arXiv:2310.03744) on transformers' own LLaVA class.

A CLIP tower, two layers between, and Vicuna: a chat about one image. Boxes come as lists of numbers
from 0 to 1 of the padded square.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.loading import load_module
from librobot_vlm_ros.models.families.causal_lm import CausalLM
from librobot_vlm_ros.models.families.llava.checkpoint import plan_for
from librobot_vlm_ros.models.families.llava.configuration import LlavaConfig
from librobot_vlm_ros.models.families.llava.processor import LlavaProcessor
from librobot_vlm_ros.models.inputs.preprocess import CLIP_MEAN, CLIP_STD, ImageSettings
from librobot_vlm_ros.models.inputs.tokenizer import CausalTokenizer
from librobot_vlm_ros.models.registry import register_vlm
from librobot_vlm_ros.models.vlm import Loading, Parts


@register_vlm()
class LlavaVLM(CausalLM):
    """LLaVA-1.5 of any size. `LlavaVLM(config)` has random weights; see `create_vlm`."""

    config_class = LlavaConfig
    default_name = "llava-v1.5-7b"
    plan = staticmethod(plan_for)

    @classmethod
    def read_folder(cls, folder: Path, name: str, loading: Loading) -> Parts:
        """See `AbstractVLM`."""
        module = load_module(folder, **vars(loading))
        text, image = module.config.text_config, module.config.image_token_id
        hidden = [text.bos_token_id, text.eos_token_id]
        if text.pad_token_id is not None and text.pad_token_id < image:
            hidden.append(text.pad_token_id)
        tokenizer = CausalTokenizer(
            folder, hidden=hidden, vocab_size=text.vocab_size, control=("<image>",)
        )
        found = tokenizer.vocabulary.get("<image>", image)
        names = {number: token for token, number in tokenizer.vocabulary.items()}
        if found != image or names.get(found, "<image>") != "<image>":
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"config.json marks the image with token {image}, the tokenizer has {found} for it",
                "use the tokenizer that came with the weights",
            )
        processor = cls.default_processor(name, module.config)
        processor.tokenizer = tokenizer
        return Parts(module, processor)

    @classmethod
    def default_processor(cls, name: str, config: Any) -> LlavaProcessor:
        """See `CausalLM`; the official folders state nothing of images."""
        side = int(config.vision_config.image_size)
        return LlavaProcessor(name, config, ImageSettings(side, side, CLIP_MEAN, CLIP_STD))
