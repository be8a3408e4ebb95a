"""The `~/generate` action: an answer streamed token by token, cancellable between tokens.

rclpy runs a goal's execute callback on the executor: it would hold every topic and service for as
long as the model writes, and a coroutine there is polled without a pause (7.1). Here each goal
waits on a thread of its own; there are never more of them than the queue takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from action_msgs.msg import GoalStatus
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle

from librobot_vlm_ros.action import Generate
from librobot_vlm_ros.core import (
    EngineError,
    ErrorCode,
    RequestError,
    Result,
    VlmError,
    as_vlm_error,
)
from librobot_vlm_ros.ros.services.request_conversion import fill_answer, make_request
from librobot_vlm_ros.ros.services.service_thread import SERVICE_QOS
from librobot_vlm_ros.runtime.pending_request import busy

_CANCEL_SETTLES_S = 2.0
# rclpy keeps an ended goal, with its image, for 15 minutes: a busy client's would fill the memory.
_RESULT_KEPT_S = 10


class _ThreadedActionServer(ActionServer):
    """Runs goals on threads of their own instead of the executor's."""

    def notify_execute(self, goal_handle: Any, execute_callback: Any) -> None:
        """rclpy's part: a goal is to be executed."""
        goal = self._execute_goal(execute_callback, goal_handle)
        threading.Thread(target=_run_through, args=(goal,), name="vlm-goal", daemon=True).start()

    async def _execute_goal_request(self, request_header_and_message: Any) -> None:
        """rclpy's part. A goal whose client went before it heard that it was accepted is never
        executed there, and so never ends.
        """
        await super()._execute_goal_request(request_header_and_message)
        handle = self._goal_handles.get(bytes(request_header_and_message[1].goal_id.uuid))
        if handle is not None and handle.status == GoalStatus.STATUS_ACCEPTED:
            handle.execute(_give_up)


def _run_through(coroutine: Any) -> None:
    """Run a coroutine that awaits nothing unfinished to its end."""
    try:
        while True:
            coroutine.send(None)
    except StopIteration:
        return


def _give_up(handle: Any) -> Any:
    _settle(handle.abort)
    return Generate.Result(
        error_code=int(ErrorCode.CANCELLED), error_msg="the client has gone before the goal began"
    )


class GenerateAction:
    """The action of the node, a `VlmNode`."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._logger = node.get_logger()
        self._lock = threading.Lock()
        self._running = 0
        self._cancelled: set[str] = set()
        self._server = _ThreadedActionServer(
            node,
            Generate,
            "~/generate",
            execute_callback=self._execute,
            goal_callback=lambda _goal: GoalResponse.ACCEPT,  # errors are answered in the result
            handle_accepted_callback=lambda handle: handle.execute(self._execute),
            cancel_callback=self._on_cancel,
            goal_service_qos_profile=SERVICE_QOS,
            result_service_qos_profile=SERVICE_QOS,
            result_timeout=_RESULT_KEPT_S,
            cancel_service_qos_profile=SERVICE_QOS,
        )

    def _on_cancel(self, handle: ServerGoalHandle) -> CancelResponse:
        request_id = _request_id(handle)
        with self._lock:
            self._cancelled.add(request_id)
        # The engine answers CANCELLED at once; the thread of the goal waits until rclpy has noted
        # the wish.
        try:
            self._node.request_context().engine.cancel(request_id)
        except VlmError as error:  # inactive by now: the goal ends anyway
            self._logger.info(f"cancelling a goal: {error}")
        return CancelResponse.ACCEPT

    def _execute(self, handle: ServerGoalHandle) -> Any:
        settings = self._node.settings
        stream = _Stream(handle)
        # Those that wait and those that the model works on; the engine knows which are which.
        entered = self._enter(settings.queue_size + settings.max_batch)
        outcome: Result | VlmError
        try:
            if not entered:
                raise busy(settings.queue_size)
            self._node.check_room()  # before a look at the image
            context = self._node.request_context()
            request = make_request(handle.request, context, _request_id(handle))
            future = context.engine.submit(request, on_token=stream.add)
            with self._lock:
                too_early = request.request_id in self._cancelled
            if too_early:  # the wish came before there was anything to cancel
                context.engine.cancel(request.request_id)
            outcome = future.result()
        except Exception as error:
            outcome = as_vlm_error(error)
        finally:
            self._leave(_request_id(handle), entered)
        result = fill_answer(Generate.Result(), outcome, settings)
        result.text = result.text or stream.text
        self._finish(handle, outcome)
        return result

    def _finish(self, handle: ServerGoalHandle, outcome: Result | VlmError) -> None:
        error = outcome if isinstance(outcome, VlmError) else outcome.error
        if error is None:
            _settle(handle.succeed)
        elif error.code == ErrorCode.CANCELLED and _wait_for(lambda: handle.is_cancel_requested):
            _settle(handle.canceled)
        else:
            if not isinstance(error, (EngineError, RequestError)):
                self._logger.error(f"goal failed: {error}")
            _settle(handle.abort)

    def _enter(self, limit: int) -> bool:
        with self._lock:
            if self._running >= limit:
                return False
            self._running += 1
            return True

    def _leave(self, request_id: str, entered: bool) -> None:
        with self._lock:
            self._running -= int(entered)
            self._cancelled.discard(request_id)


class _Stream:
    """Tokens as feedback. `add` is called on the engine's thread."""

    def __init__(self, handle: ServerGoalHandle) -> None:
        self._handle = handle
        self._count = 0
        self.text = ""

    def add(self, token: str) -> None:
        self.text += token
        self._count += 1
        self._handle.publish_feedback(
            Generate.Feedback(token=token, text=self.text, generated_tokens=self._count)
        )


def _request_id(handle: ServerGoalHandle) -> str:
    return f"generate/{bytes(handle.goal_id.uuid).hex()}"


def _wait_for(condition: Callable[[], bool], timeout_s: float = _CANCEL_SETTLES_S) -> bool:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


def _settle(transition: Callable[[], None]) -> None:
    """End a goal, unless rclpy has ended it (just cancelled, or its server destroyed)."""
    try:
        transition()
    except Exception:
        return
