"""Results with their provenance, and the age of a frame."""

from __future__ import annotations

import dataclasses

from librobot_vlm_ros.core import (
    Frame,
    InferenceInfo,
    InferenceRequest,
    ModelAnswer,
    Result,
    VlmError,
)
from librobot_vlm_ros.runtime.loader import LoadReport
from librobot_vlm_ros.runtime.standing import StandingTask


def frame_age_s(frame: Frame, now_ns: int) -> float:
    """Seconds since `frame` was received, both on the steady clock; never negative."""
    return frame.age_s(now_ns)


def with_age(result: Result, frame: Frame, now_ns: int) -> Result:
    """`result` with the age of its frame at this moment: call it right before publishing."""
    info = dataclasses.replace(result.info, age_s=frame_age_s(frame, now_ns))
    return dataclasses.replace(result, info=info)


def make_result(
    request: InferenceRequest,
    outcome: ModelAnswer | VlmError,
    *,
    model: LoadReport | None,
    now_ns: int,
    batch_size: int = 1,
) -> Result:
    """The result of a request: the source frame's header unchanged, and who answered what, how."""
    answer = outcome if isinstance(outcome, ModelAnswer) else None
    error = outcome if isinstance(outcome, VlmError) else None
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
        age_s=frame_age_s(frame, now_ns),
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
        error=error,
    )


def make_refusal(
    request_id: str, frame: Frame, task: StandingTask, error: VlmError, now_ns: int
) -> Result:
    """The result of a standing task that cannot be asked of this frame."""
    info = InferenceInfo(
        request_id=request_id,
        camera=frame.camera,
        task=task.task,
        prompt=task.prompt,
        age_s=frame_age_s(frame, now_ns),
        instruction_id=task.instruction_id,
    )
    return Result(
        frame_header=frame.header,
        stamp_ns=frame.stamp_ns,
        frame_id=frame.frame_id,
        image_width=frame.width,
        image_height=frame.height,
        info=info,
        error=error,
    )
