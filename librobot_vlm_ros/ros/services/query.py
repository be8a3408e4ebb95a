"""`~/query`, `~/list_models` and `~/switch_model`. Each answers through a `Reply`, none holds the
executor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from librobot_vlm_ros.core import VlmError, as_vlm_error
from librobot_vlm_ros.models import list_vlms, model_info
from librobot_vlm_ros.models.backend import ModelInfo
from librobot_vlm_ros.models.checkpoints.local_weights import weights_present
from librobot_vlm_ros.msg import ModelDescription
from librobot_vlm_ros.ros.monitoring.log_throttle import Throttled
from librobot_vlm_ros.ros.parameters.settings import Settings
from librobot_vlm_ros.ros.services.async_service import Reply
from librobot_vlm_ros.ros.services.request_conversion import Served, fill_answer, make_request
from librobot_vlm_ros.ros.services.service_thread import Intake
from librobot_vlm_ros.runtime import LoadReport
from librobot_vlm_ros.runtime.pending_request import busy
from librobot_vlm_ros.srv import ListModels, Query, SwitchModel

__all__ = ["Host", "Services"]


#: How long a query waits for images that arrived before it. Only an executor that is held up takes
#: so long; then the newest image that is there has to do.
_CATCH_UP_S = 0.2


class Host(Protocol):
    """What the services need of the node."""

    @property
    def settings(self) -> Settings:
        """Parameters now."""

    def served(self) -> Served:
        """Engine and cameras; raises `VlmError` NOT_ACTIVE while there are none."""

    def engine_full(self) -> bool:
        """Whether a request would be refused as BUSY; raises `VlmError` NOT_ACTIVE."""

    def catch_up(self, timeout_s: float) -> bool:
        """Wait for the images that have arrived; False where that takes longer."""

    def active_model(self) -> str:
        """Name of the loaded model, "" when none is."""

    def switch(
        self, model: str, weights: str, device: str, dtype: str, timeout_s: float
    ) -> Future[LoadReport]:
        """Change the model; raises `VlmError` when it cannot be tried."""


class Services:
    """The three services of a node.

    The intake's thread only decides: what can be refused without a look at the image (the node is
    not active, the queue is full) is answered there, so that a flood costs little; the rest goes to
    another thread whose line is as bounded as the engine's queue.
    """

    def __init__(self, node: Any, host: Host) -> None:
        self._host = host
        # Images that come with a query are checked and decoded here.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vlm-requests")
        self._lock = threading.Lock()
        self._waiting = 0
        self._busy_answer: tuple[int, Any] = (0, None)  # the size, and what it is refused with
        self._intake = Intake(node, Throttled(node.get_logger()))
        self._intake.serve(Query, "~/query", self._on_query)
        self._intake.serve(ListModels, "~/list_models", self._guarded(self._list))
        self._intake.serve(SwitchModel, "~/switch_model", self._guarded(self._switch))
        self._intake.start()

    def close(self) -> None:
        """Begin nothing more; what can be refused at once still is."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def stop(self, timeout_s: float) -> bool:
        """Take no more requests; whether the thread that does has ended in time."""
        return self._intake.stop(timeout_s)

    def _guarded(self, handle: Callable[[Any, Reply], None]) -> Callable[[Any, Reply], None]:
        def run(request: Any, reply: Reply) -> None:
            try:
                handle(request, reply)
            except Exception as error:
                self._refuse(reply, as_vlm_error(error))

        return lambda request, reply: self._submit(run, request, reply, self._refuse)

    def _submit(
        self,
        run: Callable[[Any, Reply], None],
        request: Any,
        reply: Reply,
        refuse: Callable[[Reply, VlmError], None],
    ) -> None:
        """Run on the pool, or refuse when its line is full."""
        limit = self._host.settings.queue_size
        with self._lock:
            full = self._waiting >= limit
            self._waiting += not full
        if full:
            refuse(reply, busy(limit))
            return
        try:
            self._pool.submit(self._run, run, request, reply)
        except RuntimeError:  # the node is ending; the client sees the service go
            return

    def _run(self, run: Callable[[Any, Reply], None], request: Any, reply: Reply) -> None:
        with self._lock:
            self._waiting -= 1
        run(request, reply)

    def _refuse(self, reply: Reply, error: VlmError) -> None:
        response = reply.make_response()
        response.error_code, response.error_msg = int(error.code), str(error)
        if hasattr(response, "active"):
            response.active = self._host.active_model()
        reply.send(response)

    def _refuse_query(self, reply: Reply, error: VlmError) -> None:
        reply.send(fill_answer(reply.make_response(), error, self._host.settings))

    def _on_query(self, request: Any, reply: Reply) -> None:
        try:
            full = self._host.engine_full()
        except Exception as error:
            self._refuse_query(reply, as_vlm_error(error))
            return
        if full:
            reply.send(self._busy_query())
        else:
            self._submit(self._query, request, reply, self._refuse_query)

    def _busy_query(self) -> Any:
        size = self._host.settings.queue_size
        if self._busy_answer[0] != size:
            answer = fill_answer(Query.Response(), busy(size), self._host.settings)
            self._busy_answer = (size, answer)
        return self._busy_answer[1]

    def _query(self, request: Any, reply: Reply) -> None:
        settings = self._host.settings
        try:
            served = self._host.served()
            if served.state == "active" and not request.use_image:
                self._host.catch_up(_CATCH_UP_S)
            future = served.engine.submit(make_request(request, served))
        except Exception as error:
            self._refuse_query(reply, as_vlm_error(error))
            return
        future.add_done_callback(
            lambda done: reply.send(fill_answer(reply.make_response(), done.result(), settings))
        )

    def _list(self, _request: Any, reply: Reply) -> None:
        response = reply.make_response()
        response.active = self._host.active_model()
        response.models = [
            _description(model_info(name), name == response.active) for name in list_vlms()
        ]
        reply.send(response)

    def _switch(self, request: Any, reply: Reply) -> None:
        future = self._host.switch(
            request.model, request.weights, request.device, request.dtype, request.timeout_s
        )

        def answer(done: Future[LoadReport]) -> None:
            response = reply.make_response()
            error = done.exception()
            if error is None:
                response.success, response.load_s = True, done.result().load_s
            else:
                coded = as_vlm_error(error)
                response.error_code, response.error_msg = int(coded.code), str(coded)
            response.active = self._host.active_model()
            reply.send(response)

        future.add_done_callback(answer)


def _description(info: ModelInfo, active: bool) -> ModelDescription:
    return ModelDescription(
        name=info.name,
        family=info.family,
        parameters=info.parameters,
        tasks=list(info.tasks),
        licence=info.licence,
        default_weights=info.shipped_folder or info.default_pretrained or "",
        revision=info.pinned_revision or "",
        aliases=list(info.aliases),
        min_memory_bytes=info.memory_bytes(),
        weights_present=weights_present(info),
        active=active,
    )
