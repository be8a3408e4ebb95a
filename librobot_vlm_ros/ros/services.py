"""`~/query`, `~/list_models` and `~/switch_model`. Each answers through a `Reply`, none holds the
executor.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from librobot_vlm_ros.core import as_vlm_error
from librobot_vlm_ros.models import list_vlms, model_info
from librobot_vlm_ros.models.base import ModelInfo
from librobot_vlm_ros.msg import ModelDescription
from librobot_vlm_ros.runtime import LoadReport
from librobot_vlm_ros.srv import ListModels, Query, SwitchModel

from .deferred import DeferredService, Reply
from .on_demand import Served, fill_answer, make_request
from .settings import Settings
from .weights_here import weights_present

__all__ = ["Host", "Services"]


class Host(Protocol):
    """What the services need of the node."""

    @property
    def settings(self) -> Settings:
        """Parameters now."""

    def served(self) -> Served:
        """Engine and cameras; raises `VlmError` NOT_ACTIVE while there are none."""

    def active_model(self) -> str:
        """Name of the loaded model, "" when none is."""

    def switch(
        self, model: str, weights: str, device: str, dtype: str, timeout_s: float
    ) -> Future[LoadReport]:
        """Change the model; raises `VlmError` when it cannot be tried."""


class Services:
    """The three services of a node."""

    def __init__(self, node: Any, host: Host) -> None:
        self._host = host
        self._logger = node.get_logger()
        # Images that come with a query are checked and decoded here, not on the executor.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vlm-requests")
        for kind, name, handle in (
            (Query, "~/query", self._query),
            (ListModels, "~/list_models", self._list),
            (SwitchModel, "~/switch_model", self._switch),
        ):
            DeferredService(node, kind, name, self._guarded(handle), self._on_lost)

    def close(self) -> None:
        """Take no more requests."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _guarded(self, handle: Callable[[Any, Reply], None]) -> Callable[[Any, Reply], None]:
        def run(request: Any, reply: Reply) -> None:
            try:
                handle(request, reply)
            except Exception as error:
                coded = as_vlm_error(error)
                response = reply.make_response()
                response.error_code, response.error_msg = int(coded.code), str(coded)
                if hasattr(response, "active"):
                    response.active = self._host.active_model()
                reply.send(response)

        return lambda request, reply: _submit(self._pool, run, request, reply)

    def _on_lost(self, error: Exception) -> None:
        self._logger.warning(f"an answer could not be sent, the client has gone: {error}")

    def _query(self, request: Any, reply: Reply) -> None:
        settings = self._host.settings
        try:
            served = self._host.served()
            future = served.engine.submit(make_request(request, served))
        except Exception as error:
            reply.send(fill_answer(reply.make_response(), as_vlm_error(error), settings))
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


def _submit(pool: ThreadPoolExecutor, run: Callable[..., None], request: Any, reply: Reply) -> None:
    try:
        pool.submit(run, request, reply)
    except RuntimeError:  # the node is ending; the client sees the service go
        return


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
