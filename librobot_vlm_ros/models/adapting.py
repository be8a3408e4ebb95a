"""Adapters as a model's own methods, and the last steps of making a model of any family."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.answering import Answering
from librobot_vlm_ros.models.checkpoints.hub import folder_digest
from librobot_vlm_ros.models.configuration import ModelConfig
from librobot_vlm_ros.models.placement import missing_for_flash
from librobot_vlm_ros.models.registry import model_info
from librobot_vlm_ros.models.training import lora
from librobot_vlm_ros.models.training.quantization import is_quantized, quantization_for, quantize

__all__ = ["Adapting"]

_log = logging.getLogger(__name__)


class Adapting(Answering):
    """The part of `AbstractVLM` that deals with low-rank adapters (LoRA, QLoRA).

    `module` stays the transformers model; the adapted layers inside it hold base and adapter. One
    adapter at a time.
    """

    language_model: Any

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is in place; a merged one is part of the weights."""
        return lora.has_adapter(self._loaded())

    @property
    def is_quantized(self) -> bool:
        """Whether layers of the language model are held in 8 or 4 bits."""
        return is_quantized(self._loaded())

    def add_adapter(
        self,
        *,
        rank: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        targets: Any = None,
    ) -> None:
        """Put a new adapter in, which changes no answer until it is trained.

        From here on only the adapter learns; what was frozen or not before is forgotten. See
        `ModelConfig` for the arguments. Raises ModelError BAD_CONFIG where there is an adapter
        already, or for `targets` that are no layers.
        """
        settings = ModelConfig(
            lora_rank=rank, lora_alpha=alpha, lora_dropout=dropout, lora_target_modules=targets
        )
        lora.add_adapter(self._loaded(), self.language_model, settings)
        self._now_is(f"{self.revision}+lora")

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter alone, in safetensors; peft's PeftModel reads the folder, too."""
        base = model_info(self.name).default_pretrained or self.name
        lora.save_adapter(self._loaded(), folder, base)

    def load_adapter(self, folder: str | Path) -> None:
        """Put the adapter of a folder in, in place of one that is there; it can be trained further.

        Takes folders of `save_adapter` and of peft. Raises ModelError: WEIGHTS_NOT_FOUND,
        UNSAFE_CHECKPOINT, WEIGHTS_CORRUPT, BAD_CONFIG, KEY_MISMATCH, SHAPE_MISMATCH, NAN_WEIGHTS;
        the model is then as it was.
        """
        folder = Path(folder).expanduser()
        revision = self._base_revision()
        lora.load_adapter(self._loaded(), folder, self._native_key)
        self._now_is(f"{revision}+{folder_digest(folder)}")

    def merge_adapter(self) -> None:
        """Make the adapter part of the weights: equal answers, as quick as without an adapter.

        Raises ModelError BAD_CONFIG for quantised weights, which cannot hold the sum.
        """
        lora.merge_adapter(self._loaded())
        self.frames.clear()

    def remove_adapter(self) -> None:
        """Take the adapter out: the model is what it was without it. Nothing learns after."""
        revision = self._base_revision()
        lora.remove_adapter(self._loaded())
        self._now_is(revision)

    # Inside.

    def _native_key(self, key: str) -> str:
        """Today's name of a key that an older version of transformers wrote."""
        return key

    def _now_is(self, revision: str) -> None:
        """Results say which weights they came from; what was seen with others is forgotten."""
        self.revision = revision
        self.frames.clear()

    def _base_revision(self) -> str:
        """Which weights lie under the adapter."""
        return self.revision.rpartition("+")[0] if self.has_adapter else self.revision

    def _whole_module(self) -> Any:
        """The module to be written as a checkpoint. Raises ModelError BAD_CONFIG for one whose
        tensors are not those of a plain model.
        """
        if self.has_adapter:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                "a model with an adapter is not written as a whole",
                "save_adapter writes the adapter alone; merge_adapter makes it part of the weights",
            )
        if self.is_quantized:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                "a quantised model is not written: its weights have lost precision",
                "load it with quantization none to save it",
            )
        return self._loaded()

    def _finish(
        self,
        config: ModelConfig,
        *,
        quantization: str = "none",
        freeze_vision: bool = False,
        freeze_language: bool = False,
        adapter: str | Path | None = None,
    ) -> None:
        """What a configuration and options ask for, once the weights are in place."""
        self._say_attention(config)
        quantize(self.language_model, quantization_for(config, quantization))
        if config.gradient_checkpointing:
            self.gradient_checkpointing_enable()
        if freeze_vision:
            self.freeze_vision()
        if freeze_language:
            self.freeze_language()
        if (folder := adapter if adapter is not None else config.adapter) is not None:
            self.load_adapter(folder)
        elif config.use_lora or config.use_qlora:
            self.add_adapter(
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                targets=config.lora_target_modules,
            )

    def _say_attention(self, config: ModelConfig) -> None:
        """What flash attention was preferred for, and what became of it."""
        if not config.use_flash_attn:
            return
        whole = self._loaded().config
        parts = [whole, whole.get_text_config(), getattr(whole, "vision_config", whole)]
        used = {part._attn_implementation for part in parts}
        if "flash_attention_2" in used:
            _log.info("%s: use_flash_attn: computing with flash_attention_2", self.name)
            return
        why = missing_for_flash(self.torch_device, self.torch_dtype) or "another one was asked for"
        chosen = ", ".join(sorted(used))
        _log.info("%s: use_flash_attn: computing with %s instead: %s", self.name, chosen, why)
