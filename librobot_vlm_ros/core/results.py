"""What comes out: regions, answers, and results with their provenance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from librobot_vlm_ros.core.errors import ErrorCode, InferenceError, VlmError


@dataclass(frozen=True)
class Region:
    """A labelled box in pixels of the source image.

    (0, 0) is the top left corner of the top left pixel. Raises `InferenceError` (INFERENCE_FAILED)
    for coordinates that are not finite or a box that is inside out, so that no such box can reach a
    subscriber. A parser counts such answers as malformed before it gets here.
    """

    label: str
    score: float
    """Probability in [0, 1]; NaN where the model gives none."""
    x_min: float
    y_min: float
    x_max: float
    y_max: float
    polygon: tuple[tuple[float, float], ...] = ()
    """Outline as (x, y) pixels, at least 3 points; empty unless the task gives one."""

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.box)) or not all(
            math.isfinite(value) for point in self.polygon for value in point
        ):
            raise InferenceError(
                ErrorCode.INFERENCE_FAILED,
                f"region {self.label!r} has coordinates that are not finite: {self.box}",
            )
        if self.x_max < self.x_min or self.y_max < self.y_min:
            raise InferenceError(
                ErrorCode.INFERENCE_FAILED,
                f"region {self.label!r} is inside out: {self.box}, expected x_min <= x_max "
                "and y_min <= y_max",
            )

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x_min, y_min, x_max, y_max), pixels."""
        return (self.x_min, self.y_min, self.x_max, self.y_max)


@dataclass(frozen=True, eq=False)
class EmbeddingData:
    """An embedding tensor on the host.

    Raises `InferenceError` (INFERENCE_FAILED) for another dtype or rank than stated below.
    """

    pooling: str
    """How tokens became one vector ("mean"), or "none" when there is a vector per token."""
    array: npt.NDArray[np.floating]
    """float32 or float16; [D], or [T, D] when `pooling` is "none"."""

    def __post_init__(self) -> None:
        array = self.array
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float16):
            found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise InferenceError(
                ErrorCode.INFERENCE_FAILED, f"embedding is {found}, expected float32 or float16"
            )
        rank = 2 if self.pooling == "none" else 1
        if array.ndim != rank:
            raise InferenceError(
                ErrorCode.INFERENCE_FAILED,
                f"embedding with pooling {self.pooling!r} has shape {list(array.shape)}, "
                f"expected {rank} dimension(s)",
            )


@dataclass(frozen=True)
class ModelAnswer:
    """What a model gives for one request; everything that does not apply stays at its default."""

    text: str = ""
    score: float = math.nan
    """Probability of the text in [0, 1] as defined by the family; NaN where there is none."""
    regions: tuple[Region, ...] = ()
    malformed: int = 0
    """Count of regions that the model wrote but that could not be read."""
    embedding: EmbeddingData | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preprocess_s: float = 0.0
    """Seconds from pixels and text to tensors."""
    inference_s: float = 0.0
    """Seconds in the model."""


@dataclass(frozen=True)
class InferenceInfo:
    """Provenance of a result; field for field the message `InferenceInfo`."""

    request_id: str = ""
    camera: str = ""
    model: str = ""
    revision: str = ""
    """Revision or digest of the weights."""
    task: str = ""
    prompt: str = ""
    """The cleaned prompt that was answered."""
    dtype: str = ""
    device: str = ""
    preprocess_s: float = 0.0
    inference_s: float = 0.0
    age_s: float = 0.0
    """Age of the frame when the result was made, seconds on the steady clock."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    instruction_id: int = 0
    """Number of the instruction that this answers; 0 where there is none."""
    batch_size: int = 1
    """How many requests the model answered together."""


@dataclass(frozen=True, eq=False)
class Result:
    """An answer or an error for one frame, never both, with the source image's own header.

    An error that came before there was a frame has none of it.
    """

    frame_header: object | None = None
    stamp_ns: int = 0
    frame_id: str = ""
    image_width: int = 0
    image_height: int = 0
    info: InferenceInfo = field(default_factory=InferenceInfo)
    answer: ModelAnswer | None = None
    error: VlmError | None = None

    def __post_init__(self) -> None:
        if (self.answer is None) == (self.error is None):
            raise VlmError(
                ErrorCode.INTERNAL, "a result needs either an answer or an error, exactly one"
            )

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.error is None

    @property
    def error_code(self) -> int:
        """Code for the wire; 0 when there is an answer."""
        return int(ErrorCode.OK if self.error is None else self.error.code)

    @property
    def error_msg(self) -> str:
        """Text for the wire; "" when there is an answer."""
        return "" if self.error is None else str(self.error)
