"""Segments worked off in this process, or in several that each hold the model."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from librobot_vlm_ros.annotate.job import Job, open_bags
from librobot_vlm_ros.annotate.journal import SegmentDone
from librobot_vlm_ros.annotate.plan import FramePlan
from librobot_vlm_ros.bags import BagReader
from librobot_vlm_ros.core import ErrorCode, InferenceError, VlmError, as_vlm_error

__all__ = ["run_here", "run_in_processes"]

Segments = Iterator[tuple[int, list[FramePlan]]]
Instructions = Sequence[tuple[str, int]]
#: Told what the model is once it is loaded.
OnModel = Callable[[Any], None]
#: Told of frames that were done since it was told last.
OnFrames = Callable[[int], None]

_END_S = 5.0


def run_here(
    job: Job,
    readers: Sequence[BagReader],
    instructions: Instructions,
    segments: Segments,
    on_model: OnModel,
    on_frames: OnFrames,
) -> Iterator[SegmentDone]:
    """Work off `segments` one after the other. Raises `VlmError`."""
    from librobot_vlm_ros.annotate.worker import SegmentWorker

    worker = SegmentWorker(job, readers, instructions)
    on_model(worker.report)
    for number, plan in segments:
        yield worker.run(number, plan, _steps(on_frames))


def _steps(on_frames: OnFrames) -> Callable[[int], None]:
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        on_frames(done - told)
        told = done

    return tell


def run_in_processes(
    count: int,
    job: Job,
    instructions: Instructions,
    segments: Segments,
    on_model: OnModel,
    on_frames: OnFrames,
) -> Iterator[SegmentDone]:
    """Work off `segments` in `count` processes; they come back in the order they are done.

    Raises the `VlmError` of a process that fails, INFERENCE_FAILED for one that is killed. However
    this ends, the processes end too; they notice by themselves when this one is gone.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch in it hangs
    processes: dict[Connection, Any] = {}
    try:
        with _shared_cores(count):
            for _ in range(count):
                here, there = context.Pipe()
                process = context.Process(
                    target=_work, args=(there, job, list(instructions)), daemon=True
                )
                process.start()
                there.close()  # so that its end is noticed
                processes[here] = process
        yield from _collect(processes, segments, on_model, on_frames)
    finally:
        for process in processes.values():
            process.terminate()
        for pipe, process in processes.items():
            process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()


def _collect(
    processes: dict[Connection, Any], segments: Segments, on_model: OnModel, on_frames: OnFrames
) -> Iterator[SegmentDone]:
    busy = set(processes)
    while busy:
        for pipe in wait(list(busy)):
            assert isinstance(pipe, Connection)
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError) as error:
                raise _killed(processes[pipe]) from error
            if kind == "error":
                raise value
            if kind == "frames":
                on_frames(value)
                continue
            if kind == "model":
                on_model(value)
            else:
                yield value
            following = next(segments, None)
            with contextlib.suppress(OSError):  # gone: the next receive says so
                pipe.send(following)
            if following is None:
                busy.discard(pipe)


def _killed(process: Any) -> VlmError:
    process.join(_END_S)
    return InferenceError(
        ErrorCode.INFERENCE_FAILED,
        f"a worker process ended by itself (exit code {process.exitcode})",
        "-9 is mostly the system, out of memory: use fewer --workers or a smaller --batch. "
        "What was done is kept: run the same command again.",
    )


@contextlib.contextmanager
def _shared_cores(count: int) -> Iterator[None]:
    """Each process started in here uses its share of the cores, unless the user said otherwise."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, (os.cpu_count() or 1) // count))
    try:
        yield
    finally:
        del os.environ[name]


def _work(pipe: Connection, job: Job, instructions: Instructions) -> None:
    """A worker process: segments come through the pipe until None does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends this one
    parent = multiprocessing.parent_process()

    def orphaned() -> bool:
        return parent is not None and not parent.is_alive()

    from librobot_vlm_ros.annotate.worker import SegmentWorker

    try:
        with open_bags(job.bags, salvage=job.salvage) as readers:
            worker = SegmentWorker(job, readers, instructions, orphaned)
            pipe.send(("model", worker.report))
            while (item := pipe.recv()) is not None:
                tell = _steps(lambda count: pipe.send(("frames", count)))
                pipe.send(("done", worker.run(*item, tell)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # nobody waits for it any more
    except Exception as error:
        coded = as_vlm_error(error)
        with contextlib.suppress(OSError):
            pipe.send(("error", coded))
