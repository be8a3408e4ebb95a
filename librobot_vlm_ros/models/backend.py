"""What the rest of the package may know about a model, without torch.

`VlmBackend` is the whole interface between the runtime and a model: one thread calls `run` with
a batch of requests and gets one answer or one error per request, in order. `ModelInfo` is a row
of the registry. `stop_reason` says when a request must stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from librobot_vlm_ros.core import (
    EngineError,
    ErrorCode,
    InferenceRequest,
    ModelAnswer,
    VlmError,
)

#: Called as on_token(index of the request in the batch, new text) while text is generated.
OnToken = Callable[[int, str], None]
#: Called as should_stop(index of the request in the batch), before each token.
ShouldStop = Callable[[int], bool]

#: Bytes that one parameter takes, by the name of the dtype it is held in.
BYTES_PER_PARAMETER: Mapping[str, float] = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "int8": 1.0,
    "nf4": 0.5,
}


@runtime_checkable
class VlmBackend(Protocol):
    """A loaded model. One thread at a time calls it; no method is safe to call from two."""

    @property
    def name(self) -> str:
        """Registered name, such as ``florence-2-base``."""

    @property
    def revision(self) -> str:
        """Which weights: a hub commit, a hash of the folder's config and sizes, or "random"."""

    @property
    def device(self) -> str:
        """Where the weights lie: ``cpu``, ``cuda:0``."""

    @property
    def dtype(self) -> str:
        """What the weights are held in: ``float32``, ``float16``, ``bfloat16``."""

    @property
    def tasks(self) -> frozenset[str]:
        """Common task names (see core.tasks) that `run` answers."""

    @property
    def embedding_dim(self) -> int:
        """Length D of the vectors that the task ``embed`` gives."""

    def run(
        self,
        batch: Sequence[InferenceRequest],
        *,
        on_token: OnToken | None = None,
        should_stop: ShouldStop | None = None,
    ) -> list[ModelAnswer | VlmError]:
        """Answer every request: one entry each, in order.

        A request that fails gives its VlmError as its entry; the others are answered. A request
        whose `should_stop` turns true gives CANCELLED, one past its deadline DEADLINE_EXCEEDED.
        Nothing is raised for a bad request; an exception means that the model itself is broken.
        """

    def warm_up(self) -> None:
        """Run once on a blank frame, so that the first real frame does not pay for it."""

    def close(self) -> None:
        """Free the weights. `run` afterwards answers MODEL_NOT_LOADED."""

    def memory_bytes(self) -> int:
        """Bytes held by weights and buffers."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a registered model before any of it is loaded."""

    name: str
    #: The module of `librobot_vlm_ros.models` that defines the class ("fake",
    #: "families.llava.model"), or the full name of a module elsewhere.
    module: str
    family: str
    #: Number of parameters of the full-size model; 0 when there are none.
    parameters: int
    #: Common task names, sorted.
    tasks: tuple[str, ...]
    licence: str
    #: Hub id, or None when the weights are shipped or there are none.
    default_pretrained: str | None = None
    #: Hub commit or branch used when the user names none.
    pinned_revision: str | None = None
    #: Folder under checkpoints/shipped/ that ships with the package, or None.
    shipped_folder: str | None = None
    aliases: tuple[str, ...] = ()
    embedding_dim: int = 0
    description: str = ""
    #: What must be installed beyond numpy.
    requires: tuple[str, ...] = field(default=("torch", "transformers"))

    @property
    def full_module(self) -> str:
        """The name that `module` is imported by."""
        ours = self.module == "fake" or self.module.startswith("families.")
        return f"librobot_vlm_ros.models.{self.module}" if ours else self.module

    def memory_bytes(self, dtype: str = "float16") -> int:
        """Bytes of the weights alone when held in `dtype`; activations come on top."""
        return int(self.parameters * BYTES_PER_PARAMETER[dtype])


def stop_reason(
    request: InferenceRequest,
    index: int,
    should_stop: ShouldStop | None,
    now_ns: Callable[[], int] = time.monotonic_ns,
) -> EngineError | None:
    """Why request number `index` of a batch must stop now, or None to go on.

    `now_ns` is the steady clock that `request.deadline_ns` refers to.
    """
    if should_stop is not None and should_stop(index):
        return EngineError(
            ErrorCode.CANCELLED,
            f"request {request.request_id!r} was cancelled while the model was answering it",
        )
    if request.deadline_ns is not None and now_ns() >= request.deadline_ns:
        return EngineError(
            ErrorCode.DEADLINE_EXCEEDED,
            f"request {request.request_id!r} was still being answered at its deadline",
            "allow more time, ask for fewer tokens (max_new_tokens) or use a smaller model",
        )
    return None
