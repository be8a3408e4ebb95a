"""`AbstractVLM`: what every family of models is and does.

Two sides meet here. For learning and research it is a torch module: `forward`, `generate`,
`encode_image`, freezing, saving. For the robot it is a `VlmBackend`: `run` answers a batch of
requests (`answering.py`). A new family is one class with these abstract methods filled in, its rows
in `catalog.py` and its layouts registered with `checkpoint.register_layout`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import (
    DEFAULT_LIMITS,
    ErrorCode,
    GenerationParams,
    Limits,
    ModelError,
    RequestError,
)
from librobot_vlm_ros.models.adapting import Adapting
from librobot_vlm_ros.models.cache.image_features import FrameCache
from librobot_vlm_ros.models.families.preprocess import Resizing, resizing
from librobot_vlm_ros.models.generation.config import Generated, GenerationConfig
from librobot_vlm_ros.models.generation.decoder import Decoder
from librobot_vlm_ros.models.generation.fast.graph_runner import GraphRunner
from librobot_vlm_ros.models.generation.fast.weights import DECODERS, make_fast
from librobot_vlm_ros.models.generation.loop import generate
from librobot_vlm_ros.models.registry import model_info
from librobot_vlm_ros.models.training.lora import adapter_parameters

__all__ = ["AbstractVLM"]


class AbstractVLM(Adapting):
    """A vision-language model. One thread at a time may use it.

    `module` is the transformers model inside. `device` and `dtype` are names ("cuda:0", "float16").
    `resize` says how images of requests come to the model's size: `exact` as the published
    processors do it, `fast` (see `resize.py`), or `auto`.
    """

    family: ClassVar[str] = ""
    #: How images become tensors, with `resample`, `mean` and `std`.
    images: Any
    #: The transformers model's configuration.
    config: Any

    def __init__(
        self,
        module: Any,
        *,
        name: str,
        revision: str = "random",
        limits: Limits = DEFAULT_LIMITS,
        embedding_pooling: str = "mean",
        resize: str = "auto",
        decoder: str = "auto",
    ) -> None:
        """`decoder`: "module" takes each step of an answer through transformers' module,
        "functional" through our arithmetic on its weights, "auto" through that where it can. Vision
        towers that we have an arithmetic of (`fast/davit`) are taken so too, but for "module".
        """
        super().__init__()
        resizing(resize, torch.device("cpu"))
        if decoder not in DECODERS:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"there is no decoder {decoder!r}",
                f"use one of: {', '.join(DECODERS)}",
            )
        if embedding_pooling not in ("mean", "none"):
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"embedding_pooling is {embedding_pooling!r}, expected 'mean' or 'none'",
            )
        self.name = name
        self.revision = revision
        self.limits = limits
        self.embedding_pooling = embedding_pooling
        self.resize = resize
        self.tasks = frozenset(model_info(name).tasks)
        self.module = module
        self.train(module.training)  # a new torch module says that it trains, a loaded one doesn't
        self.frames = FrameCache()
        self.decoder = decoder

    @property
    def resizing(self) -> Resizing:
        """How images of requests come to the model's size; see `resize.py`."""
        return resizing(self.resize, self.torch_device, self.images.resample)

    # What a family fills in.

    @classmethod
    @abstractmethod
    def create(cls, name: str, **options: Any) -> AbstractVLM:
        """Build the model as `registry.create_vlm` describes; gets all its arguments by name."""

    @abstractmethod
    def forward(
        self,
        images: Any = None,
        text: Sequence[str] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """`embeddings` [B, T, D], `logits` [B, L, V], and `loss` where labels are given."""

    @abstractmethod
    def encode_image(self, images: Any) -> Tensor:
        """Vision features in the language model's space, [B, N, D].

        `images`: float [B, 3, H, W] already normalised, or [B, views, 3, H, W]; or uint8 tensors,
        arrays, PIL images or Frames of any sizes.
        """

    @abstractmethod
    def encode_text(self, text: Any) -> Tensor:
        """Text features [B, T, D] of strings or token ids int64 [B, T]."""

    @abstractmethod
    def generate(self, images: Any = None, input_ids: Any = None, **options: Any) -> Tensor:
        """Token ids int64 [B, L] of the answers, padded at the end."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in transformers' native layout that `create_vlm` loads again."""

    @abstractmethod
    def load_pretrained(self, source: str, **options: Any) -> None:
        """Replace weights, configuration and tokenizer by those of a folder or hub id."""

    @property
    @abstractmethod
    def vision_encoder(self) -> nn.Module:
        """The part that sees."""

    @property
    @abstractmethod
    def language_model(self) -> nn.Module:
        """The part that reads and writes."""

    # Inside.

    def _asked(self, params: GenerationParams, *, beams: int, tokens: int) -> tuple[int, int]:
        """Beams and most tokens of an answer: what `params` asks for, else these as far as there is
        room. Raises RequestError BAD_PARAMETER; sampling means one beam.
        """
        beams = params.num_beams or beams
        if params.temperature > 0 and beams > 1:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"temperature {params.temperature} and num_beams {beams} exclude each other",
                "sample with num_beams 1, or search with temperature 0",
            )
        room = min(self.config.text_config.max_position_embeddings, self.limits.max_new_tokens)
        wanted = params.max_new_tokens or min(tokens, room)
        if wanted > room:
            raise RequestError(
                ErrorCode.BAD_PARAMETER,
                f"max_new_tokens is {wanted}, {self.name} has room for {room}",
            )
        return beams, wanted

    def _written(
        self, decoder: Decoder, history: Tensor, rules: GenerationConfig, seed: int | None
    ) -> Tensor:
        """Token ids [B, L] of the answers; each row samples from a seed of its own."""
        seeds = [None if seed is None else seed + row for row in range(len(history))]
        generated = generate(decoder, rules, history, seeds=seeds)
        ids = [torch.tensor(row.ids) for row in generated if isinstance(row, Generated)]
        return pad_sequence(ids, batch_first=True, padding_value=rules.pad).to(self.torch_device)

    def _graph_runner(
        self, kind: type[Any], text_model: Any, head: Any, length: int = 0
    ) -> GraphRunner | None:
        """Steps over the weights as they are now; None where the module is to take them.

        `length`: places of the longest prompt and its answer together.
        On CUDA graphs over buffers are kept from answer to answer, as long as the weights stay in
        place.
        """
        step = make_fast(kind, text_model, head, self.decoder, length)
        if step is None:
            return None
        if self._runner is None or not self._runner.fits(step):
            pool = GraphRunner(step)
            self._runner = pool if pool.cuda else None
            return pool
        kept: GraphRunner = self._runner
        return kept

    # The learner's side.

    def freeze(self) -> None:
        """Train nothing."""
        self._loaded().requires_grad_(False)

    def unfreeze(self) -> None:
        """Train everything; with an adapter in place or quantised layers, all that can learn: the
        adapter alone, or the layers that are not quantised.
        """
        module = self._loaded()
        learning = adapter_parameters(module).values() or module.parameters()
        for parameter in learning:
            if parameter.is_floating_point():
                parameter.requires_grad = True

    def freeze_vision(self) -> None:
        """Keep the vision encoder as it is; the projection after it still learns."""
        self.vision_encoder.requires_grad_(False)

    def freeze_language(self) -> None:
        """Keep the language model as it is."""
        self.language_model.requires_grad_(False)

    def get_num_parameters(self, trainable_only: bool = False) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(
            _size(parameter)
            for parameter in self._loaded().parameters()
            if parameter.requires_grad or not trainable_only
        )

    def gradient_checkpointing_enable(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        module = self._loaded()
        # Renamed in transformers 5.23; the old name warns there, the new one is unknown before.
        enable = getattr(
            module, "activation_checkpointing_enable", module.gradient_checkpointing_enable
        )
        # The other kind gives no gradient behind frozen inputs, such as the words of an adapter's.
        enable({"use_reentrant": False})


def _size(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: 4-bit ones lie two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
