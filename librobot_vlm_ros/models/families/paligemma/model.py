"""PaliGemma (Beyer et al., 2024, arXiv:2407.07726) on transformers' own PaliGemma class.

A SigLIP tower, one layer between, and Gemma, which reads image and prompt as a whole and writes its
answer in order. Boxes come as location tokens, masks as codes for a decoder that is not part of the
checkpoint (`masks`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.loading import load_module
from librobot_vlm_ros.models.checkpoints.shards import read_json
from librobot_vlm_ros.models.families.causal_lm import CausalLM
from librobot_vlm_ros.models.families.paligemma.checkpoint import plan_for
from librobot_vlm_ros.models.families.paligemma.configuration import PaliGemmaConfig
from librobot_vlm_ros.models.families.paligemma.masks import (
    MaskDecoder,
    find_mask_decoder,
    read_mask_decoder,
)
from librobot_vlm_ros.models.families.paligemma.processor import BINS, PaliGemmaProcessor
from librobot_vlm_ros.models.inputs.preprocess import ImageSettings, image_settings
from librobot_vlm_ros.models.inputs.tokenizer import CausalTokenizer
from librobot_vlm_ros.models.registry import register_vlm
from librobot_vlm_ros.models.vlm import Loading, Parts

_HALF = (0.5, 0.5, 0.5)


@register_vlm()
class PaliGemmaVLM(CausalLM):
    """PaliGemma of any size. `PaliGemmaVLM(config)` has random weights; see `create_vlm`."""

    config_class = PaliGemmaConfig
    default_name = "paligemma-3b"
    plan = staticmethod(plan_for)
    processor: PaliGemmaProcessor
    first_position = 1
    prefix_attention = True
    image_leads = True
    _given_masks: MaskDecoder | None

    def __init__(
        self,
        config: Any = None,
        *,
        name: str = "",
        mask_decoder: str | Path | None = None,
        **options: Any,
    ) -> None:
        """`mask_decoder`: the weights that segmenting needs (vae-oid.npz as published, or
        safetensors), where they do not lie in the folder of the weights.
        """
        config = self.checked_config(config, name or self.default_name)
        path = mask_decoder if mask_decoder is not None else config.mask_decoder
        # No submodule: it is no part of what is trained, counted or moved.
        self.__dict__["_given_masks"] = (
            None if path is None else read_mask_decoder(Path(path).expanduser())
        )
        super().__init__(config, name=name, **options)

    @classmethod
    def read_folder(cls, folder: Path, name: str, loading: Loading) -> Parts:
        """See `AbstractVLM`."""
        module = load_module(folder, **vars(loading))
        config, text = module.config, module.config.text_config
        hidden = [text.bos_token_id, text.eos_token_id, text.pad_token_id]
        tokenizer = CausalTokenizer(
            folder, hidden=hidden, vocab_size=text.vocab_size, control=("<image>",)
        )
        names = {number: token for token, number in tokenizer.vocabulary.items()}
        first = tokenizer.vocabulary.get("<loc0000>", -1)
        locations = all(names.get(first + i) == f"<loc{i:04}>" for i in range(BINS))
        if names.get(config.image_token_id, "<image>") != "<image>" or first < 0 or not locations:
            raise ModelError(
                ErrorCode.TOKENIZER_MISMATCH,
                f"the tokenizer does not fit config.json: token {config.image_token_id} must be "
                "<image>, and <loc0000> to <loc1023> must stand in a row",
                "use the tokenizer.json that came with the weights",
            )
        processor = cls.default_processor(name, config)
        processor.tokenizer = tokenizer
        stated, beside = folder / "preprocessor_config.json", find_mask_decoder(folder)
        if stated.is_file():
            processor.images = image_settings(read_json(stated))
        if beside is not None:
            processor.masks = read_mask_decoder(beside)
        return Parts(module, processor)

    @classmethod
    def default_processor(cls, name: str, config: Any) -> PaliGemmaProcessor:
        """See `CausalLM`."""
        side = int(config.vision_config.image_size)
        return PaliGemmaProcessor(name, config, ImageSettings(side, side, _HALF, _HALF))

    def _take(self, parts: Parts) -> None:
        super()._take(parts)
        if self._given_masks is not None:
            self.processor.masks = self._given_masks

    @property
    def reader(self) -> Any:
        """See `CausalLM`: the whole model tells prefix and answer apart."""
        return self.loaded().model
