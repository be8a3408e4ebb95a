"""What a model holds: its weights, where they lie, and what is kept of frames to be quick."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from librobot_vlm_ros.core import ErrorCode, Frame, ModelError
from librobot_vlm_ros.models.cache.image_features import FrameCache
from librobot_vlm_ros.models.families.preprocess import ahead_of
from librobot_vlm_ros.models.generation.fast.weights import states
from librobot_vlm_ros.models.placement import dtype_name, free_bytes, move_module, usable_cores

__all__ = ["Holding"]

_log = logging.getLogger(__name__)


class Holding(nn.Module, ABC):
    """A transformers model and what was made of its weights and of frames."""

    name: str
    frames: FrameCache
    #: The transformers model; None once closed.
    module: Any
    #: Buffers of decode steps that are kept from answer to answer (`GraphRunner`).
    _runner: Any = None
    #: For which `_weights` a vision tower was made arithmetic of, and that (`FastDavit`)
    #: or None where it could not be.
    _tower: tuple[Any, Any] | None = None
    #: `states` of the weights that the features in `frames` were made with; the same object for as
    #: long as they are the same.
    _weights: Any = None
    #: Whether it answers now: without gradients, and with those weights.
    _answers_now = False

    # What a family fills in.

    @abstractmethod
    def get_embedding_dim(self) -> int:
        """D, the length of the vectors that `embed` and the encode methods give."""

    @abstractmethod
    def _pixels(self, pixels: Any) -> Any:
        """A frame's uint8 [H, W, 3] in the prepared form; called from any thread."""

    # What follows from it.

    @property
    def device(self) -> str:
        """Where the weights lie."""
        return str(next(self._loaded().parameters()).device)

    @property
    def dtype(self) -> str:
        """What the weights are held in."""
        return dtype_name(next(self._loaded().parameters()).dtype)

    @property
    def embedding_dim(self) -> int:
        """The same as `get_embedding_dim()`."""
        return self.get_embedding_dim()

    @property
    def prepares_ahead(self) -> bool:
        """Whether preparing frames beside `run` pays: on a GPU, and where torch leaves a core."""
        return self.torch_device.type != "cpu" or torch.get_num_threads() < usable_cores()

    def prepare_frame(self, frame: Frame) -> None:
        """Make the frame's pixels ready before a request asks for them. The one method that may be
        called while another thread is in `run`. Raises what `prepare` would raise for the frame.
        """
        with torch.inference_mode(), ahead_of(self.torch_device):
            self.frames.lookup(frame).prepare(self._pixels)

    def input_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Width and height that an image of this size is brought to; None where the number of
        vectors depends on the image, as it does unless a family says otherwise.
        """
        return None

    def frame_counts(self) -> Mapping[str, int]:
        """Requests that shared features of their frame (`hits`) and that had them computed
        (`misses`), frames prepared before their first request (`ahead`).
        """
        frames = self.frames
        return {"hits": frames.hits, "misses": frames.misses, "ahead": frames.prefetched}

    def free_caches(self) -> None:
        """Give back what is only kept to be quick: features of frames, and on a GPU buffers and
        the memory that torch holds for the next request. Answers stay the same.
        """
        self.frames.clear()
        self._runner = self._tower = None
        if self.module is not None and self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def free_memory(self) -> int | None:
        """Bytes free where the weights lie; None where that is not known, and once closed."""
        return None if self.module is None else free_bytes(self.torch_device)

    def close(self) -> None:
        """Free the weights; requests get MODEL_NOT_LOADED from here on."""
        on_gpu = self.module is not None and self.device.startswith("cuda")
        self.module = self._runner = self._tower = None
        self.frames.clear()
        if on_gpu:
            torch.cuda.empty_cache()

    def memory_bytes(self) -> int:
        """Bytes of parameters and buffers, tied ones counted once."""
        if self.module is None:
            return 0
        held = [*self.module.parameters(), *self.module.buffers()]
        return sum({id(tensor): tensor.nbytes for tensor in held}.values())

    @property
    def torch_device(self) -> torch.device:
        """Where the weights lie, as torch calls it."""
        return next(self._loaded().parameters()).device

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the weights are held in, as torch calls it."""
        return next(self._loaded().parameters()).dtype

    def _loaded(self) -> Any:
        if self.module is None:
            raise ModelError(
                ErrorCode.MODEL_NOT_LOADED, f"{self.name} was closed", "load the model again"
            )
        return self.module

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """No gradients and no dropout, whatever a training loop has set."""
        training = self.training
        if training:
            self.eval()
            self.frames.clear()  # the weights that made the features may have learnt since
        # A quantised layer may pack its weights anew while it answers; made in inference mode, they
        # could not be trained through afterwards.
        parameters = () if self.module is None else tuple(self.module.parameters())
        whole = all(parameter.is_floating_point() for parameter in parameters)
        weights = states(parameters)
        if self._weights != weights:  # an optimiser's step, load_state_dict
            if self._weights is not None:
                self.frames.clear()
            self._weights = weights
        before, self._answers_now = self._answers_now, True
        try:
            with torch.inference_mode() if whole else torch.no_grad():
                yield
        finally:
            self._answers_now = before
            if training:
                self.train()

    def _to_safer_dtype(self) -> bool:
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
        move_module(self._loaded(), dtype=safer)
        for layer in self._loaded().modules():
            if getattr(layer, "compute_dtype", None) is not None:  # of a 4-bit layer
                layer.compute_dtype = safer
        return True
