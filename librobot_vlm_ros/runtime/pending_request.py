"""A request on its way through the engine, the result it ends with, and the errors it may end with.

Exactly one result, whoever ends it first: the model's answer, a cancellation, a deadline, a pause.
Not thread-safe: the engine's lock guards it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future

from librobot_vlm_ros.core import (
    EngineError,
    ErrorCode,
    Frame,
    InferenceInfo,
    InferenceRequest,
    ModelAnswer,
    Result,
    VlmError,
)
from librobot_vlm_ros.runtime.loader import LoadReport

OnText = Callable[[str], None]
Outcome = ModelAnswer | VlmError


@dataclasses.dataclass(eq=False)
class PendingRequest:
    """A request that waits or that the model works on.

    `finished` turns true once, under the engine's lock, by whoever settles the outcome. From then
    on the model is told to stop at its next token, and whatever it still says is thrown away.
    """

    request: InferenceRequest
    future: Future[Result] | None = None
    """None for a standing task's request: its result goes to `on_result`."""
    on_text: OnText | None = None
    finished: bool = False
    streamed: bool = False
    """Whether text went to `on_text` already."""
    result: Result | None = None
    """What it was settled with; for `SharedState.deliver`."""

    @property
    def standing(self) -> bool:
        """Whether it comes from a standing task."""
        return self.future is None


def with_age(result: Result, frame: Frame, now_ns: int) -> Result:
    """`result` with the age of its frame at this moment: call it right before publishing."""
    info = dataclasses.replace(result.info, age_s=frame.age_s(now_ns))
    return dataclasses.replace(result, info=info)


def make_result(
    request: InferenceRequest,
    outcome: Outcome,
    *,
    model: LoadReport | None,
    now_ns: int,
    batch_size: int = 1,
) -> Result:
    """The result of a request: the source frame's header unchanged, and who answered what, how."""
    answer = outcome if isinstance(outcome, ModelAnswer) else None
    frame = request.frame
    info = InferenceInfo(
        request_id=request.request_id,
        camera=frame.camera,
        model=model.model if model is not None else "",
        revision=model.revision if model is not None else "",
        task=request.task,
        prompt=request.prompt,
        dtype=model.dtype if model is not None else "",
        device=model.device if model is not None else "",
        preprocess_s=answer.preprocess_s if answer else 0.0,
        inference_s=answer.inference_s if answer else 0.0,
        age_s=frame.age_s(now_ns),
        prompt_tokens=answer.prompt_tokens if answer else 0,
        generated_tokens=answer.generated_tokens if answer else 0,
        instruction_id=request.instruction_id,
        batch_size=batch_size,
    )
    return Result(
        frame_header=frame.header,
        stamp_ns=frame.stamp_ns,
        frame_id=frame.frame_id,
        image_width=frame.width,
        image_height=frame.height,
        info=info,
        answer=answer,
        error=outcome if isinstance(outcome, VlmError) else None,
    )


def busy(size: int) -> EngineError:
    """The queue is full."""
    return EngineError(
        ErrorCode.BUSY,
        f"{size} requests wait already",
        "Ask again later, less often, or raise queue_size.",
    )


def cancelled(request_id: str) -> EngineError:
    """Somebody cancelled it."""
    return EngineError(ErrorCode.CANCELLED, f"request {request_id!r} was cancelled")


def too_late(request_id: str) -> EngineError:
    """Its deadline passed."""
    return EngineError(
        ErrorCode.DEADLINE_EXCEEDED,
        f"request {request_id!r} was not answered before its deadline",
        "Allow more time, ask for fewer tokens (max_new_tokens), or use a smaller model.",
    )


def not_active(state: str) -> EngineError:
    """The engine does not run."""
    return EngineError(
        ErrorCode.NOT_ACTIVE,
        f"the engine is {state}, not running",
        "Activate the node and ask again.",
    )


def shutting_down() -> EngineError:
    """The engine ends."""
    return EngineError(ErrorCode.SHUTTING_DOWN, "the engine is shutting down")
