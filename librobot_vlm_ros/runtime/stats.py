"""Health of the engine: counters since its start, and ages and times over a sliding window.

Not thread-safe: the engine's lock guards the counters; an `EngineStats` is a frozen copy.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping

from librobot_vlm_ros.core import ErrorCode, ModelAnswer, VlmError
from librobot_vlm_ros.runtime.config import EngineState, to_ns, to_s

WINDOW_S = 10.0  # span of the sliding windows
MAX_SAMPLES = 4096


@dataclasses.dataclass(frozen=True)
class CameraStats:
    """One camera. Ages in seconds over the window; NaN = no sample in it."""

    received: int
    processed: int
    dropped: Mapping[str, int]
    """By reason (`DropReason` values), since the camera was declared."""
    stale: bool
    silent_s: float
    rate_hz: float
    """Frames received per second over the window."""
    age_p50_s: float
    age_p99_s: float


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """All that diagnostics tell. Times in seconds, counts since the start; NaN = no sample."""

    state: EngineState
    model: str
    revision: str
    device: str
    dtype: str
    frames_received: int
    frames_processed: int
    dropped: Mapping[str, int]
    """By reason (`DropReason` values)."""
    results: int
    """Answers given, to standing tasks and requests."""
    errors: Mapping[str, int]
    """By the name of the error code."""
    age_p50_s: float
    age_p99_s: float
    """Age of the frame when its result was handed over."""
    inference_p50_s: float
    inference_p99_s: float
    """Of a batch."""
    tokens_per_s: float
    """Generated tokens per second of inference."""
    queue_depth: int
    """Requests that wait, those that the model works on not among them."""
    in_flight: int
    """Requests the model works on now."""
    busy_s: float
    """How long the present run has taken so far."""
    memory_bytes: int
    """Held by the model's weights."""
    free_bytes: int | None
    """Free where the model lives; None = not known, or no model."""
    features_shared: int
    """Requests answered from features of their frame that another request had computed."""
    features_computed: int
    """Requests that had the features of their frame computed."""
    prepared_ahead: int
    """Frames that were at the model's size already when it took them."""
    last_error: str
    last_error_age_s: float
    """NaN = there was none."""
    idle_tasks: tuple[tuple[str, str], ...]
    """Standing tasks that cannot run, each with why."""
    cameras: Mapping[str, CameraStats]


class Window:
    """Values of the last `WINDOW_S` seconds, bounded in number."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, now_ns: int, value: float) -> None:
        """One value, now."""
        self._samples.append((now_ns, value))

    def values(self, now_ns: int) -> list[float]:
        """Those still within the span, oldest first."""
        while self._samples and now_ns - self._samples[0][0] > to_ns(WINDOW_S):
            self._samples.popleft()
        return [value for _, value in self._samples]

    def rate_hz(self, now_ns: int) -> float:
        """Values per second between the first and the last in the span; NaN below two."""
        count = len(self.values(now_ns))
        if count < 2:
            return math.nan
        span_ns = self._samples[-1][0] - self._samples[0][0]
        return (count - 1) / to_s(span_ns) if span_ns > 0 else math.nan


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that `percent` % of all do not exceed (nearest rank); NaN of none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


class Meter:
    """Counts as the engine works."""

    def __init__(self) -> None:
        self.results = 0
        self.errors: Counter[str] = Counter()
        self.consecutive_failures = 0
        self.last_error: VlmError | None = None
        self.last_error_ns: int | None = None
        self.run_started_ns: int | None = None
        self.in_flight = 0
        self.memory_bytes = 0
        self.free_bytes: int | None = None
        self.frame_counts: Mapping[str, int] = {}
        #: Most of the last runs took longer: the model will hardly be done before.
        self.quick_run_ns = 0
        self.ages: defaultdict[str, Window] = defaultdict(Window)  # of results, by camera [s]
        self.arrivals: defaultdict[str, Window] = defaultdict(Window)  # of frames, by camera
        self.times = Window()  # of batches [s]
        self._tokens = Window()
        self._last_runs: deque[float] = deque(maxlen=5)

    def run_began(self, requests: int, now_ns: int) -> None:
        """The model starts on a batch."""
        self.run_started_ns = now_ns
        self.in_flight = requests

    def run_ended(self, seconds: float, tokens: int, now_ns: int) -> None:
        """The model is done with it."""
        self.run_abandoned()
        self.times.add(now_ns, seconds)
        self._last_runs.append(seconds)
        self.quick_run_ns = to_ns(percentile(self._last_runs, 40))
        self._tokens.add(now_ns, float(tokens))

    def run_abandoned(self) -> None:
        """The batch ended in a way that says nothing about the model."""
        self.run_started_ns = None
        self.in_flight = 0

    def another_model(self) -> None:
        """What is known of the model before says nothing about this one."""
        self.consecutive_failures = 0
        self.frame_counts = {}
        self.quick_run_ns = 0
        self._last_runs.clear()

    def delivered(
        self, camera: str, outcome: ModelAnswer | VlmError, age_s: float, now_ns: int
    ) -> None:
        """A result was handed over; `camera` is "" for an image that came with its request."""
        if isinstance(outcome, VlmError):
            self.failed(outcome, now_ns)
            return
        self.results += 1
        if camera:
            self.ages[camera].add(now_ns, age_s)

    def failed(self, error: VlmError, now_ns: int) -> None:
        """An error was handed over. A cancellation is counted, but is no fault to show as last."""
        self.errors[error.code.name] += 1
        if error.code != ErrorCode.CANCELLED:
            self.last_error = error
            self.last_error_ns = now_ns

    def keep_cameras(self, cameras: Iterable[str]) -> None:
        """Forget the windows of all others."""
        names = set(cameras)
        for windows in (self.ages, self.arrivals):
            for gone in set(windows) - names:
                del windows[gone]

    def tokens_per_s(self, now_ns: int) -> float:
        """Generated tokens per second of inference; NaN when nothing ran."""
        seconds = sum(self.times.values(now_ns))
        return sum(self._tokens.values(now_ns)) / seconds if seconds > 0 else math.nan
