"""One run of `annotate`, from its bags to its summary."""

from __future__ import annotations

import dataclasses
import datetime
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros.annotate.job import (
    Job,
    Options,
    check_tasks,
    files_of,
    make_job,
    open_bags,
    topic_types,
)
from librobot_vlm_ros.annotate.journal import (
    Journal,
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
                if isinstance(error, OSError) and is_disk_full(error):
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
    if options.overwrite and (out / "metadata.yaml").is_file():
        return False
    if options.overwrite:
        wrong, hint = f"{out} is not replaced: it is no bag", "Remove it yourself."
    else:
        wrong = f"{out} exists already" + (" and is of another run" if options.resume else "")
        hint = "Choose another path, or replace it with --overwrite."
    raise BagError(ErrorCode.PATH_NOT_ALLOWED, wrong, hint)


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


@dataclasses.dataclass
class _Run:
    """The work itself, with its journal open."""

    job: Job
    results: dict[str, str]
    """Topic -> type of what is added."""
    readers: Sequence[BagReader]
    journal: Journal
    console: Console
    began_s: float = dataclasses.field(default_factory=time.monotonic)
    model: LoadReport | None = None

    def perform(self) -> Summary:
        """Plan, answer, write the bag."""
        out, journal = self.job.options.out, self.journal
        plan = self._plan()
        total, resumed = journal.frame_count(), journal.done_count()
        self.console.stage(
            f"{total} of {plan['images']} frames to annotate"
            + (f", {resumed} done before" if resumed else "")
        )
        self._warn_of_space()
        if resumed < total:
            self._answer(plan["instructions"], total, resumed)
        model_s = time.monotonic() - self.began_s
        self.console.stage(f"writing {out}")
        written, left_out = write_bag(
            journal,
            self.readers,
            self.results,
            self.job.options.storage or storage_of(self.readers[0]),
            {"fingerprint": self.job.fingerprint(), "model": self._model_used()},
            out.absolute().name,
        )
        put_in_place(out, out.absolute().name)
        results, bad = journal.counts()
        good = results.pop("OK", 0)
        self._warn_of_faults(left_out, results, bad)
        remove_work(out)
        return Summary(
            out=str(out),
            bags=[str(path) for path in self.job.options.bags],
            model=self._model_used(),
            frames=total,
            resumed_frames=resumed,
            bad_frames=sum(bad.values()),
            bad_frames_by_code=bad,
            results=good + sum(results.values()),
            failed_results=sum(results.values()),
            failed_results_by_code=results,
            topics=dict(written.counts),
            left_out=left_out,
            lost={str(reader.path): reader.lost for reader in self.readers if reader.lost},
            model_s=round(model_s, 3),
            seconds=round(time.monotonic() - self.began_s, 3),
        )

    def _plan(self) -> dict[str, Any]:
        """The plan's meta data: of an unfinished run of the same job, or of a new plan."""
        asked, journal = self.job.fingerprint(), self.journal
        meta = journal.meta()
        different = [name for name in asked if meta.get("fingerprint", {}).get(name) != asked[name]]
        # A run that ended before its first frames, for want of weights say, is in nobody's way.
        if meta and (not different or journal.done_count()):
            if different:
                raise BagError(
                    ErrorCode.PATH_NOT_ALLOWED,
                    f"{journal.folder} holds an unfinished run with other {', '.join(different)}",
                    "Give the arguments of that run to go on, or --overwrite to begin anew.",
                )
            self.console.line(f"going on with the unfinished run in {journal.folder}")
            return meta
        bags = ", ".join(str(path) for path in self.job.options.bags)
        self.console.stage(f"looking through {bags}")
        journal.clear()
        planner = Planner(self.job, self.readers)

        def found() -> dict[str, Any]:
            return {
                "fingerprint": asked,
                "instructions": planner.instructions,
                "images": planner.images,
            }

        journal.write_plan(planner.frames(), found)
        for problem in planner.problems[:_SHOWN]:
            self.console.warn(problem)
        if planner.images and not journal.frame_count():
            raise RequestError(
                ErrorCode.EMPTY_PROMPT,
                f"none of the {planner.images} frames is asked anything: the tasks need a text",
                "Give one: --tasks 'ground=red cube', --instruction TEXT or --instruction-topic.",
            )
        return found()

    def _warn_of_space(self) -> None:
        needed = sum(size for path in self.job.options.bags for _, size, _ in files_of(path))
        free = shutil.disk_usage(self.job.options.out.absolute().parent).free
        if free < needed:
            self.console.warn(
                f"{free / 1e9:.1f} GB are free for a bag that will have about {needed / 1e9:.1f} GB"
            )

    def _answer(self, instructions: list[list[Any]], total: int, resumed: int) -> None:
        """Answer and store the open segments, with progress and an estimate of the time left."""
        began_s = 0.0

        def on_model(report: LoadReport) -> None:
            nonlocal began_s
            if self.model is None:
                from librobot_vlm_ros.ros.model_loading import loaded_text

                self.model, began_s = report, time.monotonic()
                self.console.line(loaded_text(report))

        def on_frames(more: int) -> None:
            now = progress.done + more
            rate = (now - resumed) / max(1e-6, time.monotonic() - began_s)
            left = datetime.timedelta(seconds=round((total - now) / rate)) if rate else None
            progress.step(f"{rate:.1f}/s, {left} left" if rate else "", to=now)

        numbers = self.journal.open_segments()
        todo = ((number, self.journal.frames_of(number)) for number in numbers)
        # More than there are segments would load the model for nothing.
        workers = min(self.job.options.workers, len(numbers))
        texts = [(text, number) for text, number in instructions]
        with self.console.progress(total, "frames") as progress:
            progress.done = resumed
            if workers > 1:
                done = run_in_processes(workers, self.job, texts, todo, on_model, on_frames)
            else:
                done = run_here(self.job, self.readers, texts, todo, on_model, on_frames)
            for segment in done:
                self.journal.commit(segment)

    def _model_used(self) -> dict[str, str]:
        """Which model answered, as far as this run knows."""
        model = self.model
        if model is None:  # all frames were done before
            return {"name": self.job.options.parameters["model"]}
        return {
            "name": model.model,
            "revision": model.revision,
            "device": model.device,
            "dtype": model.dtype,
        }

    def _warn_of_faults(
        self, left_out: dict[str, str], failed: dict[str, int], bad: dict[str, int]
    ) -> None:
        """`failed`: results that are errors, by their code; `bad`: frames, by theirs."""
        warn = self.console.warn
        for topic, reason in left_out.items():
            warn(f"{topic} is not in {self.job.options.out}: {reason}")
        for topic, stamp_ns, text in self.journal.bad_frames(_SHOWN):
            warn(f"bad frame on {topic} at {stamp_ns}: {text}")
        if sum(bad.values()) > _SHOWN:
            warn(f"{sum(bad.values())} bad frames in all")
        if failed:
            codes = ", ".join(f"{name} {count}" for name, count in failed.items())
            warn(f"{sum(failed.values())} results are errors: {codes}")
