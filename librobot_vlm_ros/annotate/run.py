"""One run of `annotate`, from its bags to its summary."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.annotate.job import (
    Job,
    Options,
    check_tasks,
    make_job,
    open_bags,
    topic_types,
)
from librobot_vlm_ros.annotate.journal import (
    Journal,
    SegmentDone,
    check_work,
    journal_folder,
    remove_work,
)
from librobot_vlm_ros.annotate.output_bag import is_finished, put_in_place, storage_of, write_bag
from librobot_vlm_ros.annotate.plan import Planner
from librobot_vlm_ros.annotate.workers import ResultRecorder, run_here, run_in_processes
from librobot_vlm_ros.bags import BagReader
from librobot_vlm_ros.bags.writer import disk_full, is_disk_full
from librobot_vlm_ros.console import Console
from librobot_vlm_ros.core import BagError, ErrorCode, RequestError, VlmError, get_task

if TYPE_CHECKING:
    from librobot_vlm_ros.runtime.loader import LoadReport

#: Single faults shown in words; all are counted.
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came of a run, as `--json` prints it."""

    out: str
    bags: list[str]
    model: dict[str, str]
    frames: int
    resumed_frames: int
    """Those of them that an earlier run had done."""
    bad_frames: int
    bad_frames_by_code: dict[str, int]
    results: int
    failed_results: int
    """Those of them that hold an error."""
    failed_results_by_code: dict[str, int]
    topics: dict[str, int]
    """Messages of the new bag."""
    left_out: dict[str, str]
    """Topics that could not be copied, and why."""
    lost: dict[str, str]
    """What is not whole in each bag."""
    model_s: float
    seconds: float


def annotate(options: Options, console: Console) -> Summary | None:
    """Do what `options` say, or go on where an earlier run stopped. None, when `resume` is asked
    for and nothing is left to do. Raises `VlmError`.
    """
    out = options.out
    with open_bags(options.bags, salvage=options.salvage) as readers:
        for reader in readers:
            if reader.lost:
                console.warn(f"{reader.path} is not whole, lost is {reader.lost}")
        types = topic_types(readers)
        job, twins = make_job(options, types)
        _announce(console, job, twins)
        results = _result_topics(job, types)
        _refuse_own_input(out, options.bags)
        check_work(out)
        if _is_done_already(job):
            return None
        if options.overwrite and not options.resume:
            remove_work(out)
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with Journal(out) as journal:
            try:
                return _Run(job, results, readers, journal, console).perform()
            except (VlmError, OSError) as error:
                if not isinstance(error, VlmError) and is_disk_full(error):
                    error = disk_full(journal.folder, error)
                if isinstance(error, VlmError) and error.code == ErrorCode.DISK_FULL:
                    raise _with_hint_to_resume(error, journal) from error
                raise


def _announce(console: Console, job: Job, twins: dict[str, str]) -> None:
    for topic, raw in sorted(twins.items()):
        console.line(f"{topic} holds the frames of {raw} once more: left to the originals")
    for topic, camera in job.cameras.items():
        console.line(f"camera '{camera}': {topic}")
    if job.instruction_topic:
        console.line(f"instructions: {job.instruction_topic}")


def _result_topics(job: Job, types: dict[str, str]) -> dict[str, str]:
    """Result topic -> type for these tasks, which are checked first."""
    from librobot_vlm_ros.models import model_info

    settings, node = job.settings(), job.options.node
    check_tasks(settings, model_info(settings.model).tasks)
    endings = {"text": ("/caption",), "regions": ("/grounding", "/detections")}
    outputs = {get_task(task.task).output for task in settings.task_list()}
    wanted = [end for output in outputs for end in endings.get(output, ("/embedding",))]
    topics = ResultRecorder(node).topics()
    results = {name: kind for name, kind in topics.items() if name.endswith(tuple(wanted))}
    taken = sorted(set(results) & set(types))
    if taken:
        raise RequestError(
            ErrorCode.BAD_PARAMETER,
            f"the bag holds {', '.join(taken)} already: results would mix with older ones",
            f"Name the new ones otherwise: --node {node}_2.",
        )
    return results


def _refuse_own_input(out: Path, bags: Sequence[Path]) -> None:
    """Refuse where the new bag or its work folder is, contains or lies in a bag that is read."""
    for target in (_real(out), _real(journal_folder(out))):
        for path in bags:
            source = _real(path)
            if target == source or target in source.parents or source in target.parents:
                raise BagError(
                    ErrorCode.PATH_NOT_ALLOWED,
                    f"{out} cannot be written: it or {journal_folder(out).name} beside it, where "
                    f"the work for it lies, is where {path} is read from",
                    "Name another folder as the last argument.",
                )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for links in a circle


def _is_done_already(job: Job) -> bool:
    """Whether `out` is finished; raises where it is something else that must not be replaced."""
    options, out = job.options, job.options.out
    if not os.path.lexists(out):  # a link to nothing is something, too
        return False
    if options.resume and is_finished(out, job.fingerprint()):
        remove_work(out)  # there is some where the run before was killed in its last step
        return True
    if not options.overwrite:
        raise BagError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{out} exists already" + (" and is of another run" if options.resume else ""),
            "Choose another path, or replace it with --overwrite.",
        )
    if not (out / "metadata.yaml").is_file():
        raise BagError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{out} is not replaced: it is no bag",
            "Remove it yourself.",
        )
    return False


def _with_hint_to_resume(error: VlmError, journal: Journal) -> VlmError:
    """`error` with a hint to what was kept; half a bag is removed."""
    shutil.rmtree(journal.folder / "bag", ignore_errors=True)
    try:
        done, total = journal.done_count(), journal.frame_count()
    except Exception:  # not even the plan found room
        return error
    return BagError(
        error.code,
        error.message,
        f"{done} of {total} frames are kept in {journal.folder}: free space on that disk (or raise "
        "the limit on file sizes), then run the same command again.",
    )


class _Run:
    """The work itself, with its journal open."""

    def __init__(
        self,
        job: Job,
        results: dict[str, str],
        readers: Sequence[BagReader],
        journal: Journal,
        console: Console,
    ) -> None:
        self._job = job
        self._results = results
        """Topic -> type of what is added."""
        self._readers = readers
        self._journal = journal
        self._console = console
        self._began_s = time.monotonic()
        self._model: LoadReport | None = None
        self._total = self._resumed = 0

    def perform(self) -> Summary:
        """Plan, answer, write the bag."""
        out, journal = self._job.options.out, self._journal
        plan = self._plan()
        self._total, self._resumed = journal.frame_count(), journal.done_count()
        self._console.stage(
            f"{self._total} of {plan['images']} frames to annotate"
            + (f", {self._resumed} done before" if self._resumed else "")
        )
        self._warn_of_space()
        if self._resumed < self._total:
            for done in self._segments([(text, number) for text, number in plan["instructions"]]):
                journal.commit(done)
        model_s = time.monotonic() - self._began_s
        self._console.stage(f"writing {out}")
        written, left_out = write_bag(
            journal,
            self._readers,
            self._results,
            self._job.options.storage or storage_of(self._readers[0]),
            {"fingerprint": self._job.fingerprint(), "model": self._model_used()},
            out.absolute().name,
        )
        put_in_place(out, out.absolute().name)
        summary = self._summary(dict(written.counts), left_out, model_s)
        remove_work(out)
        return summary

    def _plan(self) -> dict[str, Any]:
        """The plan's meta data: of an unfinished run of the same job, or of a new plan."""
        asked, journal = self._job.fingerprint(), self._journal
        meta = journal.meta()
        different = [name for name in asked if meta.get("fingerprint", {}).get(name) != asked[name]]
        # A run that ended before its first frames, for want of weights say, is in nobody's way.
        if meta and not (different and journal.done_count() == 0):
            if different:
                raise BagError(
                    ErrorCode.PATH_NOT_ALLOWED,
                    f"{journal.folder} holds an unfinished run with other {', '.join(different)}",
                    "Give the arguments of that run to go on, or --overwrite to begin anew.",
                )
            self._console.line(f"going on with the unfinished run in {journal.folder}")
            return meta
        bags = ", ".join(str(path) for path in self._job.options.bags)
        self._console.stage(f"looking through {bags}")
        journal.clear()
        planner = Planner(self._job, self._readers)

        def found() -> dict[str, Any]:
            return {
                "fingerprint": asked,
                "instructions": planner.instructions,
                "images": planner.images,
            }

        journal.write_plan(planner.frames(), found)
        for problem in planner.problems[:_SHOWN]:
            self._console.warn(problem)
        if planner.images and not journal.frame_count():
            raise RequestError(
                ErrorCode.EMPTY_PROMPT,
                f"none of the {planner.images} frames is asked anything: the tasks need a text",
                "Give one: --tasks 'ground=red cube', --instruction TEXT or --instruction-topic.",
            )
        return found()

    def _warn_of_space(self) -> None:
        files = [
            file
            for reader in self._readers
            for file in ([reader.path] if reader.path.is_file() else reader.path.iterdir())
        ]
        needed = sum(file.stat().st_size for file in files if file.is_file())
        free = shutil.disk_usage(self._job.options.out.absolute().parent).free
        if free < needed:
            self._console.warn(
                f"{free / 1e9:.1f} GB are free for a bag that will have about {needed / 1e9:.1f} GB"
            )

    def _segments(self, instructions: list[tuple[str, int]]) -> Iterator[SegmentDone]:
        """Finished segments, with progress and an estimate of the time left."""
        began_s = 0.0

        def on_model(report: LoadReport) -> None:
            nonlocal began_s
            if self._model is None:
                from librobot_vlm_ros.ros.model_loading import loaded_text

                self._model, began_s = report, time.monotonic()
                self._console.line(loaded_text(report))

        with self._console.progress(self._total, "frames") as progress:
            progress.done = self._resumed

            def on_frames(more: int) -> None:
                now = progress.done + more
                rate = (now - self._resumed) / max(1e-6, time.monotonic() - began_s)
                left_s = (self._total - now) / rate if rate else 0.0
                progress.step(f"{rate:.1f}/s, {_clock(left_s)} left" if rate else "", to=now)

            numbers = self._journal.open_segments()
            todo = ((number, self._journal.frames_of(number)) for number in numbers)
            # More than there are segments would load the model for nothing.
            workers = min(self._job.options.workers, len(numbers))
            told = (on_model, on_frames)
            if workers > 1:
                yield from run_in_processes(workers, self._job, instructions, todo, *told)
            else:
                yield from run_here(self._job, self._readers, instructions, todo, *told)

    def _model_used(self) -> dict[str, str]:
        """Which model answered, as far as this run knows."""
        model = self._model
        if model is None:  # all frames were done before
            return {"name": self._job.options.parameters["model"]}
        return {
            "name": model.model,
            "revision": model.revision,
            "device": model.device,
            "dtype": model.dtype,
        }

    def _summary(self, topics: dict[str, int], left_out: dict[str, str], model_s: float) -> Summary:
        """Count what was done, and show the faults."""
        options, console = self._job.options, self._console
        results, bad = (dict(sorted(one.items())) for one in self._journal.counts())
        good = results.pop(0, 0)
        failed, bad_frames = sum(results.values()), sum(bad.values())
        failed_by_code = {ErrorCode(code).name: count for code, count in results.items()}
        for topic, reason in left_out.items():
            console.warn(f"{topic} is not in {options.out}: {reason}")
        for topic, stamp_ns, text in self._journal.bad_frames(_SHOWN):
            console.warn(f"bad frame on {topic} at {stamp_ns}: {text}")
        if bad_frames > _SHOWN:
            console.warn(f"{bad_frames} bad frames in all")
        if failed:
            codes = ", ".join(f"{name} {count}" for name, count in failed_by_code.items())
            console.warn(f"{failed} results are errors: {codes}")
        return Summary(
            out=str(options.out),
            bags=[str(path) for path in options.bags],
            model=self._model_used(),
            frames=self._total,
            resumed_frames=self._resumed,
            bad_frames=bad_frames,
            bad_frames_by_code={ErrorCode(code).name: count for code, count in bad.items()},
            results=good + failed,
            failed_results=failed,
            failed_results_by_code=failed_by_code,
            topics=topics,
            left_out=left_out,
            lost={str(reader.path): reader.lost for reader in self._readers if reader.lost},
            model_s=round(model_s, 3),
            seconds=round(time.monotonic() - self._began_s, 3),
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
