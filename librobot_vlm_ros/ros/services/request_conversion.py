"""What a client asks (`~/query`, `~/generate`) as a checked request; a result as the answer."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from librobot_vlm_ros.core import (
    EngineError,
    ErrorCode,
    Frame,
    InferenceInfo,
    InferenceRequest,
    Result,
    VlmError,
    bad_parameter,
    clean_prompt,
    get_task,
)
from librobot_vlm_ros.ros.inputs.camera import Camera, frame_from_message, stamp_ns
from librobot_vlm_ros.ros.outputs.results import (
    embedding_message,
    grounding_message,
    info_message,
)
from librobot_vlm_ros.ros.parameters.settings import Settings
from librobot_vlm_ros.runtime import Engine

_MAX_TIMEOUT_S = 86400.0
_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class RequestContext:
    """What requests are made from; a snapshot of the node."""

    engine: Engine
    settings: Settings
    cameras: Mapping[str, Camera]
    state: str
    """Lifecycle state."""


def make_request(goal: Any, context: RequestContext, request_id: str = "") -> InferenceRequest:
    """The request that a `Query` request or `Generate` goal describes. Raises `VlmError`."""
    if context.state != "active":
        raise not_active(context.state)
    spec = get_task(goal.task)
    timeout_s = timeout_of(goal.timeout_s, context.settings.request_timeout_s)
    params = context.settings.generation()
    if goal.max_new_tokens:
        params = dataclasses.replace(params, max_new_tokens=int(goal.max_new_tokens))
    return InferenceRequest(
        request_id=request_id or f"query/{next(_numbers)}",
        frame=_frame(goal, context),
        task=spec.name,
        prompt=clean_prompt(goal.prompt, required=spec.needs_text),
        # Checked by InferenceRequest, and not copied before: it may be of any length.
        region=goal.region if len(goal.region) else None,
        params=params,
        deadline_ns=context.engine.now_ns() + round(timeout_s * 1e9),
    )


def not_active(state: str) -> EngineError:
    """The error for a node in that state, with what to do about it."""
    hint = "Configure and activate it, as with ros2 lifecycle set."
    if state in ("configuring", "activating"):
        hint = "Ask again once it is active."
    elif state in ("shuttingdown", "finalized"):
        hint = "It was shut down for good: start it again."
    return EngineError(ErrorCode.NOT_ACTIVE, f"the node is {state}", hint)


def timeout_of(asked_s: float, default_s: float) -> float:
    """Seconds that a request may take; 0 asks for the default. Raises `RequestError`."""
    if asked_s == 0.0:
        return default_s
    if not 0.0 < asked_s <= _MAX_TIMEOUT_S:  # NaN is in no interval
        raise bad_parameter(
            f"timeout_s is {asked_s:g}, expected 0 (the node's default) to {_MAX_TIMEOUT_S:g}"
        )
    return asked_s


def _frame(goal: Any, context: RequestContext) -> Frame:
    engine, settings = context.engine, context.settings
    if goal.use_image:
        return frame_from_message(
            goal.image, "", received_ns=engine.now_ns(), allow_depth=settings.allow_depth
        )
    name = goal.camera or next(iter(context.cameras))
    wanted_ns = stamp_ns(goal.stamp)
    try:
        if wanted_ns:
            return engine.frame_at(name, wanted_ns)
        # A camera that has stopped shows a world that may be gone: its last frame is no answer to
        # "now".
        limit_s = 0.0 if settings.lock_step else settings.camera_timeout_s
        return engine.latest(name, max_age_s=limit_s)
    except VlmError as error:
        camera = context.cameras.get(name)
        missing = camera.missing(now=True) if camera is not None else None
        if missing is not None and error.code in (ErrorCode.NO_FRAME, ErrorCode.FRAME_TOO_OLD):
            raise missing from error
        raise


def fill_answer(answer: Any, outcome: Result | VlmError, settings: Settings) -> Any:
    """Fill a `Query` response or `Generate` result from a result or an error."""
    answer.score = math.nan
    if isinstance(outcome, VlmError):
        outcome = Result(info=InferenceInfo(batch_size=0), error=outcome)
    grounding = grounding_message(outcome, settings.min_score)
    answer.header = grounding.header
    answer.info = info_message(outcome.info)
    answer.grounding = grounding
    answer.success = outcome.ok
    answer.error_code = outcome.error_code
    answer.error_msg = outcome.error_msg
    if outcome.answer is not None:
        answer.text = outcome.answer.text
        answer.score = float(outcome.answer.score)
        if outcome.answer.embedding is not None and hasattr(answer, "embedding"):
            answer.embedding = embedding_message(outcome)
    return answer
