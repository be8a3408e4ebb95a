"""`~/query`, `~/list_models` and `~/switch_model`; none holds the executor."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from librobot_vlm_ros.core import ErrorCode, VlmError, as_vlm_error
from librobot_vlm_ros.models import list_vlms, model_info
from librobot_vlm_ros.models.backend import ModelInfo
from librobot_vlm_ros.models.checkpoints.hub import weights_present
from librobot_vlm_ros.msg import ModelDescription
from librobot_vlm_ros.ros.services.request_conversion import fill_answer, make_request
from librobot_vlm_ros.ros.services.service_thread import Handler, Reply
from librobot_vlm_ros.runtime import LoadReport
from librobot_vlm_ros.runtime.pending_request import busy
from librobot_vlm_ros.srv import ListModels, Query, SwitchModel

#: How long a query waits for images that arrived before it. Only an executor that is held up takes
#: so long; then the newest image that is there has to do.
_CATCH_UP_S = 0.2


class NodeServices:
    """The three services of the node, a `VlmNode`.

    The service thread only decides: what can be refused without a look at the image (the node is
    not active, the queue is full) is answered there, so that a flood costs little; the rest goes to
    a worker thread whose line is as bounded as the engine's queue.
    """

    def __init__(self, node: Any) -> None:
        self._node = node
        # Images that come with a query are checked and decoded here.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="vlm-requests")
        self._lock = threading.Lock()
        self._waiting = 0
        self._busy_answer: tuple[int, Any] = (0, None)  # the size, and what it is refused with
        serve = node.service_thread.serve
        serve(Query, "~/query", self._on_query)
        serve(ListModels, "~/list_models", partial(self._enqueue, self._list_models))
        serve(SwitchModel, "~/switch_model", partial(self._enqueue, self._switch_model))

    def close(self) -> None:
        """Begin nothing more; what can be refused at once still is."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _on_query(self, request: Any, reply: Reply) -> None:
        try:
            self._node.check_room()
        except Exception as error:
            refusal = as_vlm_error(error)
            if refusal.code == ErrorCode.BUSY:
                reply.send(self._busy_query(refusal))
            else:
                self._refuse(reply, refusal)
        else:
            self._enqueue(self._query, request, reply)

    def _busy_query(self, error: VlmError) -> Any:
        """The refusal of a query, made once a queue size: of a flood, it is what costs most."""
        size = self._node.settings.queue_size
        if self._busy_answer[0] != size:
            self._busy_answer = size, fill_answer(Query.Response(), error, self._node.settings)
        return self._busy_answer[1]

    def _enqueue(self, work: Handler, request: Any, reply: Reply) -> None:
        """Run `work(request, reply)` on the worker thread, or refuse when its line is full."""
        limit = self._node.settings.queue_size
        with self._lock:
            full = self._waiting >= limit
            self._waiting += not full
        if full:
            self._refuse(reply, busy(limit))
            return
        with suppress(RuntimeError):  # the node is ending; the client sees the service go
            self._worker.submit(self._run, work, request, reply)

    def _run(self, work: Handler, request: Any, reply: Reply) -> None:
        with self._lock:
            self._waiting -= 1
        try:
            work(request, reply)
        except Exception as error:
            self._refuse(reply, as_vlm_error(error))

    def _refuse(self, reply: Reply, error: VlmError) -> None:
        response = reply.make_response()
        if isinstance(response, Query.Response):
            fill_answer(response, error, self._node.settings)
        else:
            response.error_code, response.error_msg = int(error.code), str(error)
            response.active = self._node.active_model()
        reply.send(response)

    # -- on the worker thread

    def _query(self, request: Any, reply: Reply) -> None:
        settings = self._node.settings
        context = self._node.request_context()
        if context.state == "active" and not request.use_image:
            self._node.catch_up(_CATCH_UP_S)
        future = context.engine.submit(make_request(request, context))
        future.add_done_callback(
            lambda done: reply.send(fill_answer(reply.make_response(), done.result(), settings))
        )

    def _list_models(self, _request: Any, reply: Reply) -> None:
        response = reply.make_response()
        response.active = self._node.active_model()
        response.models = [
            _description(model_info(name), name == response.active) for name in list_vlms()
        ]
        reply.send(response)

    def _switch_model(self, request: Any, reply: Reply) -> None:
        asked = {name: getattr(request, name) for name in ("model", "weights", "device", "dtype")}
        future = self._node.switch(asked, request.timeout_s)

        def answer(done: Future[LoadReport]) -> None:
            error = done.exception()
            if error is not None:
                self._refuse(reply, as_vlm_error(error))
                return
            response = reply.make_response()
            response.success, response.load_s = True, done.result().load_s
            response.active = self._node.active_model()
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
