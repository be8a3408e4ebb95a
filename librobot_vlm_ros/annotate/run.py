"""One run of `annotate`, from its bags to its summary."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from librobot_vlm_ros.annotate.finish import is_finished, put_in_place, storage_of, write_bag
from librobot_vlm_ros.annotate.job import Job, check_tasks, make_job, open_bags, topic_types
from librobot_vlm_ros.annotate.journal import (
    Journal,
    SegmentDone,
    check_work,
    journal_folder,
    remove_work,
)
from librobot_vlm_ros.annotate.plan import Planner
from librobot_vlm_ros.annotate.pool import run_here, run_in_processes
from librobot_vlm_ros.annotate.report import SHOWN, Run, model_of, summarise
from librobot_vlm_ros.annotate.worker import ResultRecorder
from librobot_vlm_ros.bags import BagReader
from librobot_vlm_ros.bags.writer import disk_full, is_disk_full
from librobot_vlm_ros.console import Console
from librobot_vlm_ros.core import BagError, ErrorCode, RequestError, VlmError

__all__ = ["annotate"]


def annotate(args: argparse.Namespace) -> int:
    """Do what the arguments say; the exit code. Raises `VlmError`."""
    console = Console(sys.stderr if args.json else None)
    out = args.bags[-1]
    with open_bags(args.bags[:-1], salvage=args.salvage) as readers:
        for reader in readers:
            if reader.lost:
                console.warn(f"{reader.path} is not whole, lost is {reader.lost}")
        types = topic_types(readers)
        job, twins = make_job(args, types)
        _announce(console, job, twins)
        run = Run(args, console, job, out, _result_topics(job, types))
        _refuse_own_input(out, job.bags)
        check_work(out)
        if _is_done_already(run):
            return 0
        if args.overwrite and not args.resume:
            remove_work(out)
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with Journal(out) as journal:
            try:
                return _work(run, journal, readers)
            except (VlmError, OSError) as error:
                if not isinstance(error, VlmError) and is_disk_full(error):
                    error = disk_full(journal.folder, error)
                if isinstance(error, VlmError) and error.code == ErrorCode.DISK_FULL:
                    raise _kept(error, journal) from error
                raise


def _announce(console: Console, job: Job, twins: dict[str, str]) -> None:
    for topic, raw in sorted(twins.items()):
        console.line(f"{topic} holds the frames of {raw} once more: left to the originals")
    for topic, camera in job.cameras.items():
        console.line(f"camera '{camera}': {topic}")
    if job.instruction_topic:
        console.line(f"instructions: {job.instruction_topic}")


def _result_topics(job: Job, types: dict[str, str]) -> dict[str, str]:
    """Topics of the results that these tasks give. Checks the tasks, too."""
    from librobot_vlm_ros.core import get_task
    from librobot_vlm_ros.models import model_info

    settings = job.settings()
    check_tasks(settings, model_info(settings.model).tasks)
    endings = {"text": ("/caption",), "regions": ("/grounding", "/detections")}
    outputs = {get_task(task.task).output for task in settings.task_list()}
    wanted = [end for output in outputs for end in endings.get(output, ("/embedding",))]
    topics = ResultRecorder(job.node).topics()
    results = {name: kind for name, kind in topics.items() if name.endswith(tuple(wanted))}
    taken = sorted(set(results) & set(types))
    if taken:
        raise RequestError(
            ErrorCode.BAD_PARAMETER,
            f"the bag holds {', '.join(taken)} already: results would mix with older ones",
            f"Name the new ones otherwise: --node {job.node}_2.",
        )
    return results


def _refuse_own_input(out: Path, bags: Sequence[Path]) -> None:
    """Neither the new bag nor the folder of the work for it may be, hold or lie in a bag read."""
    for target in (_real(out), _real(journal_folder(out))):
        for path in bags:
            source = _real(path)
            if not (target == source or target in source.parents or source in target.parents):
                continue
            raise BagError(
                ErrorCode.PATH_NOT_ALLOWED,
                f"{out} cannot be written: it or {journal_folder(out).name} beside it, where the "
                f"work for it lies, is where {path} is read from",
                "Name another folder as the last argument.",
            )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for links in a circle


def _is_done_already(run: Run) -> bool:
    """Whether there is nothing to do; raises where `out` is something else."""
    args, out = run.args, run.out
    if not os.path.lexists(out):  # a link to nothing is something, too
        return False
    if args.resume and is_finished(out, run.job.fingerprint()):
        if journal_folder(out).exists():  # killed between the last two steps
            remove_work(out)
        run.console.line(f"{out} is finished already")
        if args.json:
            print(json.dumps({"out": str(out), "finished_before": True}))
        return True
    if not args.overwrite:
        raise BagError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{out} exists already" + (" and is of another run" if args.resume else ""),
            "Choose another path, or replace it with --overwrite.",
        )
    if not (out / "metadata.yaml").is_file():
        raise BagError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{out} is not replaced: it is no bag",
            "Remove it yourself.",
        )
    return False


def _work(run: Run, journal: Journal, readers: Sequence[BagReader]) -> int:
    meta = _plan(run, journal, readers)
    instructions = [(text, number) for text, number in meta["instructions"]]
    run.total, run.resumed = journal.frame_count(), journal.done_count()
    run.console.stage(
        f"{run.total} of {meta['images']} frames to annotate"
        + (f", {run.resumed} done before" if run.resumed else "")
    )
    _warn_of_space(run, readers)
    if run.resumed < run.total:
        for done in _segments(run, journal, readers, instructions):
            journal.commit(done)
    run.model_s = time.monotonic() - run.began_s
    run.console.stage(f"writing {run.out}")
    storage = run.args.storage or storage_of(readers[0])
    note = {"fingerprint": run.job.fingerprint(), "model": model_of(run)}
    name = run.out.absolute().name
    written, left_out = write_bag(journal, readers, run.results, storage, note, name)
    put_in_place(run.out, name)
    code = summarise(run, journal, dict(written.counts), left_out, readers)
    remove_work(run.out)
    return code


def _plan(run: Run, journal: Journal, readers: Sequence[BagReader]) -> dict[str, Any]:
    """The plan's meta data: of an unfinished run of the same job, or of a new plan."""
    asked = json.loads(json.dumps(run.job.fingerprint()))
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
        run.console.line(f"going on with the unfinished run in {journal.folder}")
        return meta
    run.console.stage("looking through " + ", ".join(str(path) for path in run.job.bags))
    journal.clear()
    planner = Planner(run.job, readers)

    def whole() -> dict[str, Any]:
        return {
            "fingerprint": asked,
            "instructions": planner.instructions,
            "images": planner.images,
            "problems": planner.problems,
        }

    journal.write_plan(planner.frames(), whole)
    meta = json.loads(json.dumps(whole()))
    for problem in planner.problems[:SHOWN]:
        run.console.warn(problem)
    if planner.images and not journal.frame_count():
        raise RequestError(
            ErrorCode.EMPTY_PROMPT,
            f"none of the {planner.images} frames is asked anything: the tasks need a text",
            "Give one: --tasks 'ground=red cube', --instruction TEXT or --instruction-topic.",
        )
    return meta


def _warn_of_space(run: Run, readers: Sequence[BagReader]) -> None:
    files = [
        file
        for reader in readers
        for file in ([reader.path] if reader.path.is_file() else reader.path.iterdir())
    ]
    needed = sum(file.stat().st_size for file in files if file.is_file())
    free = shutil.disk_usage(run.out.absolute().parent).free
    if free < needed:
        run.console.warn(
            f"{free / 1e9:.1f} GB are free for a bag that will have about {needed / 1e9:.1f} GB"
        )


def _segments(
    run: Run,
    journal: Journal,
    readers: Sequence[BagReader],
    instructions: list[tuple[str, int]],
) -> Iterator[SegmentDone]:
    """Finished segments, with progress and an estimate of the time left."""
    began_s = 0.0

    def on_model(report: Any) -> None:
        nonlocal began_s
        if run.model is None:
            from librobot_vlm_ros.ros.model_loading import loaded_text

            run.model, began_s = report, time.monotonic()
            run.console.line(loaded_text(report))

    with run.console.progress(run.total, "frames") as progress:
        progress.done = run.resumed

        def on_frames(more: int) -> None:
            now = progress.done + more
            rate = (now - run.resumed) / max(1e-6, time.monotonic() - began_s)
            left = f"{rate:.1f}/s, {_clock((run.total - now) / rate)} left" if now and rate else ""
            progress.step(left, to=now)

        todo = journal.open_segments()
        # More than there are segments would load the model for nothing.
        workers = min(run.args.workers, journal.open_count())
        if workers > 1:
            yield from run_in_processes(workers, run.job, instructions, todo, on_model, on_frames)
        else:
            yield from run_here(run.job, readers, instructions, todo, on_model, on_frames)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _kept(error: VlmError, journal: Journal) -> VlmError:
    """`error` with what was kept. Half a bag is not: its results are in the journal."""
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
