"""What is asked for: one task on one frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from librobot_vlm_ros.core.errors import ErrorCode, RequestError, bad_parameter
from librobot_vlm_ros.core.frames import Frame
from librobot_vlm_ros.core.limits import DEFAULT_LIMITS
from librobot_vlm_ros.core.logtext import shortened
from librobot_vlm_ros.core.prompts import clean_prompt
from librobot_vlm_ros.core.tasks import TaskSpec, get_task

Box = tuple[float, float, float, float]

_MAX_SEED = 2**63 - 1
MAX_BEAMS = 32


def _integer_or_none(name: str, value: object, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad_parameter(f"{name} is {value!r}, expected an integer from {low} to {high}")


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not low <= value <= high  # NaN is in no interval
        or (above and value == low)
    ):
        bound = "above" if above else "from"
        raise bad_parameter(f"{name} is {value!r}, expected a number {bound} {low:g} to {high:g}")


@dataclass(frozen=True)
class GenerationParams:
    """How to decode; None means the model's published default.

    Raises `RequestError` (BAD_PARAMETER) for a value out of bounds.
    """

    max_new_tokens: int | None = None
    """1 to 1,000,000 here; `Limits.max_new_tokens` bounds it further."""
    num_beams: int | None = None
    """1 (greedy or sampling) to 32."""
    temperature: float = 0.0
    """0 decodes without sampling; up to 100."""
    top_p: float = 1.0
    """Nucleus: above 0, up to 1."""
    seed: int | None = None
    """0 to 2**63 - 1; None draws one."""

    def __post_init__(self) -> None:
        _integer_or_none("max_new_tokens", self.max_new_tokens, 1, 1_000_000)
        _integer_or_none("num_beams", self.num_beams, 1, MAX_BEAMS)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer_or_none("seed", self.seed, 0, _MAX_SEED)


@dataclass(frozen=True, eq=False)
class InferenceRequest:
    """One task on one frame. `task` may be given by an alias and holds the common name afterwards.

    Raises `RequestError`: UNKNOWN_TASK, EMPTY_PROMPT when the task needs text and there is none,
    BAD_REGION when it needs a region and there is none, or when the region is not a box that meets
    the image (a region is cut to the image). The prompt must have been through `clean_prompt`.
    """

    request_id: str
    frame: Frame
    task: str
    prompt: str = ""
    region: Box | None = None
    """(x_min, y_min, x_max, y_max) in pixels of the source image."""
    params: GenerationParams = field(default_factory=GenerationParams)
    deadline_ns: int | None = None
    """Steady clock, nanoseconds; None waits for ever."""
    instruction_id: int = 0
    """Number of the instruction that the prompt comes from; 0 where there is none."""

    def __post_init__(self) -> None:
        spec = get_task(self.task)
        object.__setattr__(self, "task", spec.name)
        if spec.needs_text and not self.prompt.strip():
            raise RequestError(
                ErrorCode.EMPTY_PROMPT,
                f"task {spec.name} needs a prompt: {spec.description}",
                "Send what to look for, or the question, as the prompt.",
            )
        if self.region is not None:
            object.__setattr__(self, "region", checked_region(self.region, self.frame))
        elif spec.needs_region:
            raise RequestError(
                ErrorCode.BAD_REGION,
                f"task {spec.name} needs a region: {spec.description}",
                "Send it as x_min, y_min, x_max, y_max in pixels of the image.",
            )

    @property
    def spec(self) -> TaskSpec:
        """What the task needs and gives."""
        return get_task(self.task)


def checked_region(region: Sequence[float], frame: Frame) -> Box:
    """`region` cut to the image, as a box; `RequestError` (BAD_REGION) when nothing is left."""
    values: list[float] = []
    with suppress(TypeError, ValueError, OverflowError):  # of a long one nothing is looked at
        values = [float(value) for value in region] if len(region) == 4 else []
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise RequestError(
            ErrorCode.BAD_REGION,
            f"region is {_shown(region)}, expected 4 finite numbers: x_min, y_min, x_max, y_max",
        )
    x_min, y_min, x_max, y_max = values
    cut = (
        max(0.0, x_min),
        max(0.0, y_min),
        min(float(frame.width), x_max),
        min(float(frame.height), y_max),
    )
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        raise RequestError(
            ErrorCode.BAD_REGION,
            f"region {tuple(values)} covers nothing of the {frame.width}x{frame.height} image",
            "Send x_min < x_max and y_min < y_max, in pixels, inside the image.",
        )
    return cut


def _shown(region: Any) -> str:
    with suppress(TypeError):
        if len(region) > 8:
            return f"{len(region)} numbers"
    return shortened(repr(region))


def make_request(
    *,
    request_id: str,
    frame: Frame,
    task: str,
    prompt: object = "",
    region: Box | None = None,
    params: GenerationParams | None = None,
) -> InferenceRequest:
    """A request from what a user typed: the prompt is cleaned, `DEFAULT_LIMITS` are checked.

    Raises `RequestError` as `clean_prompt`, `InferenceRequest` and `GenerationParams` do.
    """
    params = params or GenerationParams()
    most = DEFAULT_LIMITS.max_new_tokens
    if (params.max_new_tokens or 0) > most:
        raise bad_parameter(f"max_new_tokens is {params.max_new_tokens}, allowed are {most}")
    return InferenceRequest(
        request_id=request_id,
        frame=frame,
        task=task,
        prompt=clean_prompt(prompt, required=get_task(task).needs_text),
        region=region,
        params=params,
    )
