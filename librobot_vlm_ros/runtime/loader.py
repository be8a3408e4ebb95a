"""Loading, switching and freeing models, on the thread that owns them, and the memory they take.

`Loader` is used by the model thread only. What others see of a load is its `LoadJob`, whose flags
the engine's lock guards.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol, cast

from librobot_vlm_ros.core import ErrorCode, Frame, ModelError, VlmError, as_vlm_error
from librobot_vlm_ros.models.backend import VlmBackend

logger = logging.getLogger("librobot_vlm_ros.runtime")

# Free memory that a model is given beyond its weights, for what it needs while it is loaded and
# warmed up.
HEADROOM = 1.2


class BackendFactory(Protocol):
    """Makes a backend; called on the model thread."""

    def __call__(
        self, name: str, *, should_cancel: Callable[[], bool], **options: Any
    ) -> VlmBackend:
        """Give the loaded model; once `should_cancel()` is true, LOAD_CANCELLED may be raised."""


class ExtendedBackend(VlmBackend, Protocol):
    """What a backend may do besides what every one does; each part is looked for by its name."""

    @property
    def prepares_ahead(self) -> bool:
        """Whether `prepare_frame` pays: not where it takes the cores that `run` computes on."""

    def prepare_frame(self, frame: Frame) -> None:
        """Do what does not need the model, such as resizing, before the frame's first request; on
        another thread, beside `run`. What it raises is not told: the requests will meet it again.
        """

    def frame_counts(self) -> Mapping[str, int]:
        """Since it was made: `hits`, requests that shared features of their frame; `misses`, that
        had them computed; `ahead`, frames prepared before their first request.
        """

    def input_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Width and height that an image of this size is brought to; None where less of it would
        change more than sharpness. Called from any thread.
        """

    def free_memory(self) -> int | None:
        """Free bytes where it lives; None where that is not known."""

    def free_caches(self) -> None:
        """Drop caches; the next request is slower, its answer the same."""


# -- loading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What was loaded."""

    model: str
    revision: str
    device: str
    dtype: str
    tasks: frozenset[str]
    load_s: float
    """Seconds from the start of loading until the model was warm."""


@dataclasses.dataclass
class LoadJob:
    """One load on its way. `settled` and `cancelled` never both become true."""

    name: str
    options: Mapping[str, Any]
    required_bytes: int | None = None
    """Memory that the model needs beside the present one; None = as much as that."""
    future: Future[LoadReport] = dataclasses.field(default_factory=Future)
    cancelled: bool = False
    settled: bool = False
    roll_back: bool = True
    """Turned off when the engine wants no model any more."""


class Loader:
    """Holds the model, if there is one."""

    def __init__(self, factory: BackendFactory, *, warm_up: bool = True) -> None:
        self.backend: VlmBackend | None = None
        self.report: LoadReport | None = None
        self._factory = factory
        self._warm_up = warm_up
        self._name = ""
        self._options: Mapping[str, Any] = {}

    def perform(self, job: LoadJob, commit: Callable[[], bool]) -> LoadReport:
        """Load the job's model in place of the present one, if any.

        `commit()` is asked once the new model is ready: false = the job was cancelled meanwhile,
        throw the model away. On failure the model before is in place again; should that fail too,
        there is none.

        Raises `VlmError`.
        """
        had_model = self.backend is not None
        built = None
        if self.backend is not None and self._room_for_both(self.backend, job):
            try:
                built = self._build(job.name, job.options, lambda: job.cancelled, commit)
            except VlmError as error:
                if error.code != ErrorCode.OUT_OF_MEMORY or job.cancelled:
                    raise
                logger.warning("%s did not fit beside %s: freeing that first", job.name, self._name)
        if built is None:
            self.unload()
            try:
                built = self._build(job.name, job.options, lambda: job.cancelled, commit)
            except VlmError as error:
                if had_model:
                    self._restore(job, error)
                raise
        self.unload()
        return self._adopt(built, job.name, job.options)

    def unload(self) -> None:
        """Free the model; fine when there is none."""
        if self.backend is not None:
            _close(self.backend)
            self.backend = None
            self.report = None
            collect()

    def _room_for_both(self, old: VlmBackend, job: LoadJob) -> bool:
        """Is there memory for the new model beside the old one?"""
        if _elsewhere(job.options.get("device"), old.device):
            # The old one is in nobody's way there; should it not fit, OUT_OF_MEMORY says so.
            return True
        if str(job.options.get("device")) == "cpu":
            free = available_memory_bytes()
        else:
            free = free_memory_of(old)
        required = job.required_bytes if job.required_bytes is not None else old.memory_bytes()
        return free is not None and required * HEADROOM <= free

    def _build(
        self,
        name: str,
        options: Mapping[str, Any],
        should_cancel: Callable[[], bool],
        commit: Callable[[], bool] = lambda: True,
    ) -> tuple[VlmBackend, LoadReport]:
        started = time.perf_counter()
        if should_cancel():
            raise load_cancelled(name)
        backend: VlmBackend | None = None
        try:
            backend = self._factory(name, should_cancel=should_cancel, **options)
            if should_cancel():
                raise load_cancelled(name)
            if self._warm_up:
                backend.warm_up()
            report = LoadReport(
                model=backend.name,
                revision=backend.revision,
                device=backend.device,
                dtype=backend.dtype,
                tasks=frozenset(backend.tasks),
                load_s=time.perf_counter() - started,
            )
            if not commit():
                raise load_cancelled(name)
            return backend, report
        except BaseException as exc:  # a library's panic is no Exception; nobody else would hear
            logger.debug("loading %s failed:\n%s", name, traceback.format_exc())
            if backend is not None:
                _close(backend)
            error = forget_tracebacks(as_vlm_error(exc))
        backend = None
        collect()  # a half-built model sits in reference cycles
        raise error

    def _restore(self, job: LoadJob, reason: VlmError) -> None:
        """Load the model that was freed again."""
        if not job.roll_back:
            return
        logger.warning("switching failed (%s): loading %s again", reason, self._name)
        try:
            built = self._build(self._name, self._options, lambda: not job.roll_back)
            self._adopt(built, self._name, self._options)
        except VlmError as error:
            logger.error("the model before, %s, cannot be loaded again: %s", self._name, error)

    def _adopt(
        self, built: tuple[VlmBackend, LoadReport], name: str, options: Mapping[str, Any]
    ) -> LoadReport:
        self.backend, self.report = built
        self._name, self._options = name, options
        return built[1]


def load_cancelled(name: str) -> ModelError:
    """Somebody gave up waiting for it."""
    return ModelError(ErrorCode.LOAD_CANCELLED, f"loading of {name!r} was cancelled")


def _elsewhere(asked: object, present: str) -> bool:
    """Whether a model asked onto a device goes where the present one is not: another GPU, or a GPU
    from a CPU. "auto" takes the same device again.
    """
    if asked in (None, "", "auto"):
        return False
    name, _, number = str(asked).partition(":")
    present_name, _, present_number = present.partition(":")
    return name != "cpu" and (name, number or "0") != (present_name, present_number or "0")


def _close(backend: VlmBackend) -> None:
    try:
        backend.close()
    except Exception as error:
        logger.error("closing model %s failed: %s", backend.name, as_vlm_error(error))


# -- memory: what is left, and giving it back ----------------------------------------------------


def free_memory_of(backend: VlmBackend) -> int | None:
    """Free bytes where the backend lives; None where nobody can say."""
    if hasattr(backend, "free_memory"):
        try:
            free = cast(ExtendedBackend, backend).free_memory()
        except Exception as exc:  # a driver that cannot tell is no reason to give up a switch
            logger.warning("free memory is not known: %s", as_vlm_error(exc))
            return None
        if free is not None:
            return free
    return available_memory_bytes() if backend.device.startswith("cpu") else None


def available_memory_bytes() -> int | None:
    """Memory of this machine to be had without swapping [bytes]; None where it is not told."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def settle() -> None:
    """Free what sits in reference cycles, and leave all else out of later garbage collections.

    A full collection looks at every object there is: with torch and a model a tenth of a second and
    more, in which nothing else runs. Called once everything is loaded, collections are short from
    then on. It is about the whole process: for a program to call, not for a library.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def collect() -> None:
    """Free what sits in reference cycles, also of what `settle` left out (such as a model)."""
    if gc.get_freeze_count():
        settle()
    else:
        gc.collect()


def free_caches(backend: VlmBackend) -> None:
    """Give back what can be given back; errors are logged, not raised."""
    if hasattr(backend, "free_caches"):
        try:
            cast(ExtendedBackend, backend).free_caches()
        except Exception as error:
            logger.error("freeing the model's caches failed: %s", as_vlm_error(error))
    collect()


def forget_tracebacks(error: VlmError) -> VlmError:
    """`error` without the tracebacks in its chain: they would keep models and tensors alive as long
    as somebody holds the error (statistics keep the last one).
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
