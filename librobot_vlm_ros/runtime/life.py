"""The engine's life: no model, loading, paused, running, stopped, and the ways between them.

Every way is bounded in time: whoever waits is answered at once, and the model thread follows at its
next token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from librobot_vlm_ros.core import EngineError, ErrorCode, VlmError
from librobot_vlm_ros.runtime.engine_state import Shared, no_model
from librobot_vlm_ros.runtime.loader import LoadJob, LoadReport, UnloadJob
from librobot_vlm_ros.runtime.requests import shutting_down


class EngineLife:
    """Loading, switching, starting, pausing, stopping; `Engine` adds frames and requests."""

    def __init__(
        self,
        shared: Shared,
        *,
        model: threading.Thread,
        timer: threading.Thread,
        ahead: threading.Thread,
    ) -> None:
        self._shared = shared
        self._model = model
        self._threads = (timer, ahead, model)
        for thread in self._threads:
            thread.start()

    def load(self, name: str, **options: Any) -> Future[LoadReport]:
        """Load a model into an empty engine. The future raises `VlmError`: what the loader says,
        LOAD_CANCELLED, BUSY while another load runs, INVALID_TRANSITION when a model is loaded (use
        `switch`), SHUTTING_DOWN.
        """
        return self._enqueue_load(LoadJob(name, options), switch=False)

    def switch(
        self,
        name: str,
        *,
        required_bytes: int | None = None,
        beside: bool | None = None,
        **options: Any,
    ) -> Future[LoadReport]:
        """Load another model in place of the present one, without losing what waits.

        The present one is kept until the new one is warm if there is memory for both
        (`required_bytes` of the new one, default: as much as the present one; `beside` overrules),
        else closed first. After a failure the present one is back and the future raises the new
        one's error; codes as for `load`.
        """
        return self._enqueue_load(LoadJob(name, options, required_bytes, beside), switch=True)

    def cancel_load(self, future: Future[LoadReport] | None = None) -> bool:
        """Give up the load or switch in progress (with `future`: only if it is that one): its
        future raises LOAD_CANCELLED at once, and
        what the loader still brings is thrown away. False when there is none.
        """
        shared = self._shared
        with shared.lock:
            job = shared.load_in_progress()
            meant = job is not None and (future is None or job.future is future)
            given_up = shared.cancel_loads(roll_back=True) if meant else []
            shared.wake()
        shared.fail_loads(given_up)
        return bool(given_up)

    def start(self) -> None:
        """Begin to work. Raises `VlmError`: MODEL_NOT_LOADED, SHUTTING_DOWN. Fine when running
        already.
        """
        shared = self._shared
        with shared.lock:
            if shared.stopped:
                raise shutting_down()
            if shared.loaded is None:
                raise no_model()
            if not shared.running:
                shared.running = True
                shared.meter.consecutive_failures = 0
                shared.watchdog.start(shared.clock())
            shared.wake()

    def pause(self, timeout_s: float = 5.0) -> bool:
        """Stop working and keep the model: all requests are answered NOT_ACTIVE now, the model is
        told to stop at its next token. True once nothing runs: no `on_result` comes after that.
        """
        shared = self._shared
        with shared.lock:
            ended = shared.hold()
        shared.complete(ended)
        return self._wait_idle(lambda: not shared.busy, timeout_s)

    def unload(self) -> Future[None]:
        """Pause, give up loads, free the model and forget all frames."""
        shared = self._shared
        job = UnloadJob()
        job.future.set_running_or_notify_cancel()
        with shared.lock:
            ended = shared.hold()
            given_up = shared.cancel_loads(roll_back=False)
            gone = shared.stopped
            if not gone:
                shared.jobs.append(job)
            shared.wake()
        shared.complete(ended)
        shared.fail_loads(given_up)
        if gone:  # stopping frees the model
            job.future.set_result(None)
        return job.future

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End: everything that waits is answered SHUTTING_DOWN, the model is freed, all threads
        end. True once they have; false when the model did not let go in time. May be called again.
        """
        shared = self._shared
        until = time.monotonic() + timeout_s
        with shared.lock:
            shared.stopped = True
            ended = shared.hold()
            given_up = shared.cancel_loads(roll_back=False)
            unloads = [job for job in shared.jobs if isinstance(job, UnloadJob)]
            shared.jobs.clear()
            shared.wake()
        shared.complete(ended)
        shared.fail_loads(given_up, shutting_down())
        for job in unloads:
            job.future.set_result(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # -- inside ----------------------------------------------------------------------------

    def _enqueue_load(self, job: LoadJob, *, switch: bool) -> Future[LoadReport]:
        shared = self._shared
        job.future.set_running_or_notify_cancel()
        error: VlmError | None = None
        with shared.lock:
            if shared.stopped:
                error = shutting_down()
            elif shared.load_in_progress() is not None:
                error = EngineError(
                    ErrorCode.BUSY, "a model is being loaded", "Wait for it, or cancel it."
                )
            elif not switch and shared.loaded is not None and not self._unload_waits():
                error = VlmError(
                    ErrorCode.INVALID_TRANSITION,
                    f"model {shared.loaded.model} is loaded",
                    "Switch, or unload first.",
                )
            else:
                shared.jobs.append(job)
            shared.wake()
        if error is not None:
            job.future.set_exception(error)
        return job.future

    def _unload_waits(self) -> bool:
        shared = self._shared
        return any(isinstance(job, UnloadJob) for job in (shared.job, *shared.jobs))

    def _wait_idle(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        shared = self._shared
        if threading.current_thread() is self._model:
            return True  # called from a callback: what runs is the caller itself
        with shared.lock:
            return shared.idle.wait_for(condition, timeout_s)
