"""`AbstractVLM`: a vision-language model to load, train, ask and save.

It has a `module` (transformers' own class), a `processor` (prompts, pixels, answers) and a
`generator` (how it decodes). A family subclasses it once; decoder-only families do so through
`families.causal_lm.CausalLM`. The robot's side is another object, `backend`, a `LocalBackend`.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from librobot_vlm_ros.core import (
    DEFAULT_LIMITS,
    ErrorCode,
    GenerationParams,
    InferenceError,
    InferenceRequest,
    Limits,
    ModelAnswer,
    ModelError,
    VlmError,
)
from librobot_vlm_ros.models.cache.image_features import FrameEntry, ImageFeatures, pad_features
from librobot_vlm_ros.models.cache.prefix import PrefixCache
from librobot_vlm_ros.models.checkpoints.checksum import check_sha256
from librobot_vlm_ros.models.checkpoints.hub import find_weights, folder_digest
from librobot_vlm_ros.models.checkpoints.shards import refuse_endless
from librobot_vlm_ros.models.configuration import ModelConfig
from librobot_vlm_ros.models.generation.decoder import Decoder
from librobot_vlm_ros.models.generation.fast.weights import states
from librobot_vlm_ros.models.generation.generator import Generator
from librobot_vlm_ros.models.inputs.input_ids import IGNORED
from librobot_vlm_ros.models.inputs.preprocess import Resizing, resizing
from librobot_vlm_ros.models.local_backend import LocalBackend
from librobot_vlm_ros.models.placement import (
    Placement,
    dtype_name,
    missing_for_flash,
    move_module,
    resolve_placement,
)
from librobot_vlm_ros.models.processor import Processor
from librobot_vlm_ros.models.registry import model_info
from librobot_vlm_ros.models.training import lora
from librobot_vlm_ros.models.training.quantization import is_quantized, quantization_for, quantize

_log = logging.getLogger(__name__)

#: Where keys and values of what is read of frames may be kept: a frame a prompt.
Prefixes = tuple[PrefixCache, Sequence[FrameEntry]]


@dataclass(frozen=True)
class Parts:
    """What a model is made of."""

    module: Any
    processor: Processor


@dataclass(frozen=True)
class Loading:
    """What `load_module` is to be told beside the folder; the fields have its names."""

    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    should_cancel: Callable[[], bool] = lambda: False


class AbstractVLM(nn.Module, ABC):
    """A vision-language model. One thread at a time may use it.

    Called by itself, `Family(config)`, a family's class has random weights; see `create_vlm`.
    """

    #: The family's own `ModelConfig`: variant, vision_config, text_config and `to_transformers()`.
    config_class: ClassVar[type[Any]]
    #: The registered name of a model that is built by its class.
    default_name: ClassVar[str]

    #: The transformers model; None once closed.
    module: Any
    #: The transformers model's configuration.
    config: Any
    processor: Processor

    def __init__(
        self,
        config: Any = None,
        *,
        name: str = "",
        parts: Parts | None = None,
        revision: str = "random",
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        quantization: str = "none",
        freeze_vision: bool = False,
        freeze_language: bool = False,
        adapter: str | Path | None = None,
        limits: Limits = DEFAULT_LIMITS,
        embedding_pooling: str = "mean",
        resize: str = "auto",
        decoder: str = "auto",
    ) -> None:
        """`resize`: how images of requests come to the model's size, `exact` as the published
        processors do it, `fast`, or `auto` (see `families.preprocess`). `decoder`: see `Generator`;
        vision towers that have an arithmetic of ours are taken so too, but for "module".
        """
        super().__init__()
        name = name or self.default_name
        config = self.checked_config(config, name)
        resizing(resize, torch.device("cpu"))
        self.generator = Generator(decoder)
        if parts is None:
            quantization_for(config, quantization)  # refused before the work, not after it
            asked = {"vision": config.vision_config or {}, "text": config.text_config or {}}
            refuse_endless(asked, f"the config of {name}")
            parts = self.build(config, name, resolve_placement(device, dtype, attention))
        self.name, self.revision, self.limits, self.resize = name, revision, limits, resize
        self.tasks = frozenset(model_info(name).tasks)
        self.backend = LocalBackend(self, embedding_pooling)
        #: `states` of the weights as of the last answer; the same object as long as they are.
        self.weights: Any = None
        self._answers_now = False
        self._take(parts)
        self.train(self.module.training)  # a new torch module trains, a loaded one doesn't

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
            self._add_adapter(config)

    # What a family fills in.

    @classmethod
    @abstractmethod
    def build(cls, config: Any, name: str, where: Placement) -> Parts:
        """Parts with random weights."""

    @classmethod
    @abstractmethod
    def read_folder(cls, folder: Path, name: str, loading: Loading) -> Parts:
        """The parts of a checkpoint folder. Raises ModelError."""

    def _take(self, parts: Parts) -> None:
        """Have these parts from here on."""
        self.module, self.processor = parts.module, parts.processor
        self.config = parts.module.config
        self.processor.limits = self.limits
        self.generator.clear()

    @abstractmethod
    def image_features(self, prepared: Sequence[Any]) -> list[ImageFeatures]:
        """Vision features of images that the processor has prepared, in the language model's
        space.
        """

    @abstractmethod
    def look(self, images: Any) -> list[ImageFeatures]:
        """Features of each row of anything that holds images; see `encode_image`."""

    @abstractmethod
    def prompt_rows(
        self,
        words: Any,
        task: str | None,
        attention_mask: Tensor | None,
        features: Sequence[ImageFeatures] | None,
    ) -> list[list[int]]:
        """Token ids of each prompt, without padding; see `generate` for `words` and `task`."""

    @abstractmethod
    def start(
        self,
        features: Sequence[ImageFeatures] | None,
        prompts: Sequence[Sequence[int]],
        new_tokens: int = 0,
        prefixes: Prefixes | None = None,
    ) -> tuple[Decoder, Tensor]:
        """Merge images into prompts, a row each: the decoder over them, and the tokens int64
        [B, H] before the first new one. `new_tokens`: most that an answer may have.
        """

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
    def encode_text(self, text: Any) -> Tensor:
        """Text features [B, T, D] of strings or token ids int64 [B, T]."""

    # What a family may have otherwise.

    @property
    def vision_encoder(self) -> nn.Module:
        """The part that sees, without the projection into the language model's space."""
        tower: nn.Module = self.loaded().model.vision_tower
        return tower

    @property
    def language_model(self) -> nn.Module:
        """The layers that read and write; the output layer stands beside them."""
        model: nn.Module = self.loaded().model.language_model
        return model

    def get_embedding_dim(self) -> int:
        """D, the length of the vectors that `embed` and the encode methods give."""
        return int(self.config.text_config.hidden_size)

    def native_key(self, key: str) -> str:
        """Today's name of a key that an older version of transformers wrote."""
        return key

    # Making, loading, saving.

    @classmethod
    def checked_config(cls, config: Any, name: str) -> Any:
        """The family's config from what was given. Raises ModelError BAD_CONFIG."""
        if isinstance(config, cls.config_class):
            return config
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        given = dict(config or {})
        if strange := sorted(set(given) - known):
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"a {cls.config_class.__name__} has no {', '.join(map(repr, strange))}",
                f"fields: {', '.join(sorted(known))}",
            )
        given.setdefault("variant", cls.variant_of(name))
        return cls.config_class(**given)

    @classmethod
    def variant_of(cls, name: str) -> str:
        """The published architecture behind a registered name; a name of one's own, whose weights
        state theirs, starts from that of `default_name`.
        """
        return name if name in cls.config_class.variants else cls.default_name

    @classmethod
    def create(
        cls,
        name: str,
        *,
        config: Any = None,
        pretrained: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        quantization: str = "none",
        should_cancel: Callable[[], bool] | None = None,
        revision: str | None = None,
        weights_sha256: Sequence[str] = (),
        **options: Any,
    ) -> AbstractVLM:
        """See `registry.create_vlm`. `revision`: hub commit or branch."""
        checked = cls.checked_config(config, name)
        quantization_for(checked, quantization)
        options |= {"name": name, "quantization": quantization}
        if config is not None and pretrained is None:
            return cls(checked, device=device, dtype=dtype, attention=attention, **options)
        if checked.vision_config or checked.text_config:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                "config changes the architecture, but the weights decide it",
                "leave out vision_config and text_config, or leave out pretrained",
            )
        weights = find_weights(model_info(name), pretrained, revision)
        check_sha256(weights.folder, weights_sha256, should_cancel)
        loading = Loading(device, dtype, attention, should_cancel or (lambda: False))
        parts = cls.read_folder(weights.folder, name, loading)
        return cls(checked, parts=parts, revision=weights.revision, **options)

    def load_pretrained(self, source: str, **options: Any) -> None:
        """Replace weights, configuration and tokenizer by those of a folder or hub id; device and
        dtype stay.

        An adapter goes with the weights that it was made for, and the new ones are not quantised.
        `options`: `revision`, `attention` and `should_cancel`, as `create_vlm` has them.
        """
        weights = find_weights(model_info(self.name), source, options.pop("revision", None))
        loading = Loading(device=self.device, dtype=self.dtype, **options)
        parts = self.read_folder(weights.folder, self.name, loading)
        self.revision = weights.revision
        self._take(parts)
        self.module.train(self.training)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in transformers' native layout that `create_vlm` loads again.

        Raises ModelError BAD_CONFIG for a model whose tensors are not those of a plain one.
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.loaded().save_pretrained(str(folder))
        self.processor.save(folder)

    # Asking.

    @property
    def family(self) -> str:
        """The family's name in the catalogue."""
        return model_info(self.name).family

    @property
    def tokenizer(self) -> Any:
        """The processor's; None for a model that was built from a config."""
        return self.processor.tokenizer

    @property
    def images(self) -> Any:
        """The processor's settings of images."""
        return self.processor.images

    @property
    def resizing(self) -> Resizing:
        """How images of requests come to the model's size."""
        return resizing(self.resize, self.torch_device, self.processor.images.resample)

    def pixels(self, image: Any) -> Any:
        """uint8 [H, W, 3] prepared for the model; called from any thread."""
        return self.processor.pixels(image, self.resizing)

    def encode_image(self, images: Any) -> Tensor:
        """Vision features in the language model's space, [B, N, D]; of several views the tokens
        stand one view after the other.

        `images`: float [B, 3, H, W] already normalised, or [B, views, 3, H, W]; or uint8 tensors,
        arrays, PIL images or Frames of any sizes. Where images of a batch become different numbers
        of vectors, N is the largest, and the rows of others are padded with zeros at the end.
        """
        return pad_features(self.look(images))

    def generate(
        self,
        images: Any = None,
        input_ids: Any = None,
        *,
        text: Any = None,
        task: str | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Answers as token ids int64 [B, L], padded at the end; `decode_text` makes words of them.

        `input_ids` (tensor [B, L] taken as it is, or strings) or `text`: strings are questions, put
        into the family's chat; with a `task` into its sentence. NaN in a half dtype goes on in a
        safer one.
        """
        params = GenerationParams(max_new_tokens, num_beams, temperature, top_p, seed)
        config = self.processor.generation_config(params)
        words = text if text is not None else input_ids
        while True:
            try:
                with self.inference():
                    features = self.look(images) if images is not None else None
                    rows = self.prompt_rows(words, task, attention_mask, features)
                    decoder, history = self.start(features, rows, config.max_new_tokens)
                    return self.generator.token_ids(decoder, config, history, seed)
            except InferenceError as error:
                if error.code != ErrorCode.NAN_LOGITS or not self.to_safer_dtype():
                    raise

    def decode_text(self, ids: Sequence[int]) -> str:
        """Token ids to text, control tokens of the notation kept; begin, end and pad left out."""
        return self.processor.decode(ids)

    def run(
        self, batch: Sequence[InferenceRequest], **options: Any
    ) -> list[ModelAnswer | VlmError]:
        """Answer requests as the robot's node does; see `LocalBackend.run`."""
        return self.backend.run(batch, **options)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients and no dropout, whatever a training loop has set."""
        training = self.training
        if training:
            self.eval()
            self.weights = None  # they may have learnt since
        # A quantised layer may pack its weights anew while it answers; made in inference mode, they
        # could not be trained through afterwards.
        parameters = () if self.module is None else tuple(self.module.parameters())
        whole = all(parameter.is_floating_point() for parameter in parameters)
        weights = states(parameters)
        if self.weights != weights:  # an optimiser's step, load_state_dict, an adapter
            self.weights = weights
        before, self._answers_now = self._answers_now, True
        try:
            with torch.inference_mode() if whole else torch.no_grad():
                yield
        finally:
            self._answers_now = before
            if training:
                self.train()

    def token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of `labels` int64 [B, L] under `logits` [B, L, V]; -100 is not learnt, and
        tokens that are no words have no part in it.
        """
        words = logits.float()
        unused = torch.tensor(self.processor.suppressed(), device=words.device)
        words = words.index_fill(2, unused, torch.finfo(words.dtype).min)
        return functional.cross_entropy(
            words.flatten(0, 1), labels.flatten().to(words.device), ignore_index=IGNORED
        )

    # Weights: where they lie, what learns.

    @property
    def device(self) -> str:
        """Where the weights lie: "cpu", "cuda:0"."""
        return str(self.torch_device)

    @property
    def dtype(self) -> str:
        """What the weights are held in: "float32", "float16", "bfloat16"."""
        return dtype_name(self.torch_dtype)

    @property
    def torch_device(self) -> torch.device:
        """Where the weights lie, as torch calls it."""
        return next(self.loaded().parameters()).device

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the weights are held in, as torch calls it."""
        return next(self.loaded().parameters()).dtype

    def freeze(self) -> None:
        """Train nothing."""
        self.loaded().requires_grad_(False)

    def unfreeze(self) -> None:
        """Train everything; with an adapter in place or quantised layers, all that can learn: the
        adapter alone, or the layers that are not quantised.
        """
        module = self.loaded()
        learning = lora.adapter_parameters(module).values() or module.parameters()
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
            for parameter in self.loaded().parameters()
            if parameter.requires_grad or not trainable_only
        )

    def gradient_checkpointing_enable(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        module = self.loaded()
        # Renamed in transformers 5.23; the old name warns there, the new one is unknown before.
        enable = getattr(
            module, "activation_checkpointing_enable", module.gradient_checkpointing_enable
        )
        # The other kind gives no gradient behind frozen inputs, such as the words of an adapter's.
        enable({"use_reentrant": False})

    def memory_bytes(self) -> int:
        """Bytes of parameters and buffers, tied ones counted once."""
        if self.module is None:
            return 0
        held = [*self.module.parameters(), *self.module.buffers()]
        return sum({id(tensor): tensor.nbytes for tensor in held}.values())

    def free_caches(self) -> None:
        """Give back what is only kept to be quick. Answers stay the same."""
        self.generator.clear()
        if self.module is not None and self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the weights; what is asked of the model from here on is MODEL_NOT_LOADED."""
        on_gpu = self.module is not None and self.device.startswith("cuda")
        self.module = None
        self.free_caches()
        if on_gpu:
            torch.cuda.empty_cache()

    def to_safer_dtype(self) -> bool:
        """Go from a half dtype to one with float32's range, once; False when already there."""
        if self.torch_dtype == torch.float32:
            return False
        wide = (
            self.torch_dtype == torch.float16
            and self.torch_device.type == "cuda"
            and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        safer = torch.bfloat16 if wide else torch.float32
        _log.warning(
            "%s gave NaN in %s: from here on it computes in %s",
            self.name,
            self.dtype,
            dtype_name(safer),
        )
        move_module(self.loaded(), dtype=safer)
        for layer in self.loaded().modules():
            if getattr(layer, "compute_dtype", None) is not None:  # of a 4-bit layer
                layer.compute_dtype = safer
        return True

    # Adapters: one at a time. `module` stays the transformers model, with both in its layers.

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is in place; a merged one is part of the weights."""
        return lora.has_adapter(self.loaded())

    @property
    def is_quantized(self) -> bool:
        """Whether layers of the language model are held in 8 or 4 bits."""
        return is_quantized(self.loaded())

    def add_adapter(
        self, *, rank: int = 16, alpha: float = 32, dropout: float = 0.0, targets: Any = None
    ) -> None:
        """Put a new adapter in, which changes no answer until it is trained.

        From here on only the adapter learns; what was frozen or not before is forgotten. See
        `ModelConfig` for the arguments. Raises ModelError BAD_CONFIG where there is an adapter
        already, or for `targets` that are no layers.
        """
        self._add_adapter(
            ModelConfig(
                lora_rank=rank, lora_alpha=alpha, lora_dropout=dropout, lora_target_modules=targets
            )
        )

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter alone, in safetensors; peft's PeftModel reads the folder, too."""
        base = model_info(self.name).default_pretrained or self.name
        lora.save_adapter(self.loaded(), folder, base)

    def load_adapter(self, folder: str | Path) -> None:
        """Put the adapter of a folder in, in place of one that is there; it can be trained further.

        Takes folders of `save_adapter` and of peft. Raises ModelError: WEIGHTS_NOT_FOUND,
        UNSAFE_CHECKPOINT, WEIGHTS_CORRUPT, BAD_CONFIG, KEY_MISMATCH, SHAPE_MISMATCH, NAN_WEIGHTS;
        the model is then as it was.
        """
        folder, base = Path(folder).expanduser(), self._base_revision()
        lora.load_adapter(self.loaded(), folder, self.native_key)
        self.revision = f"{base}+{folder_digest(folder)}"

    def merge_adapter(self) -> None:
        """Make the adapter part of the weights: equal answers, as quick as without an adapter.

        Raises ModelError BAD_CONFIG for quantised weights, which cannot hold the sum.
        """
        lora.merge_adapter(self.loaded())

    def remove_adapter(self) -> None:
        """Take the adapter out: the model is what it was without it. Nothing learns after."""
        base = self._base_revision()
        lora.remove_adapter(self.loaded())
        self.revision = base

    # Inside.

    def _add_adapter(self, settings: ModelConfig) -> None:
        lora.add_adapter(self.loaded(), self.language_model, settings)
        self.revision = f"{self.revision}+lora"

    def _base_revision(self) -> str:
        """Which weights lie under the adapter."""
        return self.revision.rpartition("+")[0] if self.has_adapter else self.revision

    def loaded(self) -> Any:
        """The module. Raises ModelError MODEL_NOT_LOADED once closed."""
        if self.module is None:
            raise ModelError(
                ErrorCode.MODEL_NOT_LOADED, f"{self.name} was closed", "load the model again"
            )
        return self.module

    def _say_attention(self, config: ModelConfig) -> None:
        """What flash attention was preferred for, and what became of it."""
        if not config.use_flash_attn:
            return
        whole = self.loaded().config
        parts = [whole, whole.get_text_config(), getattr(whole, "vision_config", whole)]
        used = {part._attn_implementation for part in parts}
        if "flash_attention_2" in used:
            _log.info("%s: use_flash_attn: computing with flash_attention_2", self.name)
            return
        why = missing_for_flash(self.torch_device, self.torch_dtype) or "another one was asked for"
        chosen = ", ".join(sorted(used))
        _log.info("%s: use_flash_attn: computing with %s instead: %s", self.name, chosen, why)


def _size(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: 4-bit ones lie two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
