"""A lifecycle node that survives what rclpy's does not, and whose transitions never block the
executor.

rclpy 7.1 raises out of the executor (and so ends the process) on an invalid transition request,
swallows what a transition callback raises without a word, and runs the callbacks on the executor's
thread, where a model that loads for minutes would stop every topic and service. Here transitions
run one at a time on a thread of their own; a request that cannot be is answered and logged; a hook
that raises is logged with its code.

    hook raises VlmError in configure or activate  -> FAILURE: back to where it was
    hook raises VlmError elsewhere, or any other exception -> ERROR -> `recover` -> unconfigured
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lifecycle_msgs.msg import State, Transition
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

from librobot_vlm_ros.core import ErrorCode, VlmError, as_vlm_error
from librobot_vlm_ros.ros.monitoring.log_throttle import ThrottledLog
from librobot_vlm_ros.ros.rcl_errors import coded_rcl_error
from librobot_vlm_ros.ros.services.service_thread import Reply, ServiceThread

_LABELS = {
    Transition.TRANSITION_CONFIGURE: "configure",
    Transition.TRANSITION_CLEANUP: "cleanup",
    Transition.TRANSITION_ACTIVATE: "activate",
    Transition.TRANSITION_DEACTIVATE: "deactivate",
    Transition.TRANSITION_UNCONFIGURED_SHUTDOWN: "shutdown",
    Transition.TRANSITION_INACTIVE_SHUTDOWN: "shutdown",
    Transition.TRANSITION_ACTIVE_SHUTDOWN: "shutdown",
}
_ERROR = "error processing"
_ALLOWED = {
    State.PRIMARY_STATE_UNCONFIGURED: ("configure", "shutdown"),
    State.PRIMARY_STATE_INACTIVE: ("cleanup", "activate", "shutdown"),
    State.PRIMARY_STATE_ACTIVE: ("deactivate", "shutdown"),
}
_ALIASES = {label: label for label in _LABELS.values()} | {
    f"{state}_shutdown": "shutdown" for state in ("unconfigured", "inactive", "active")
}


class GuardedLifecycleNode(LifecycleNode):
    """Base of the node: subclasses implement the six hooks below, each bounded in time itself.

    It starts no managed entities, such as lifecycle publishers: the node has none.
    """

    def configure(self) -> None:
        """Get everything ready; may take long, until `cancel_configure` (from another thread)."""

    def cancel_configure(self) -> None:
        """End a running `configure` soon; it then raises."""

    def activate(self) -> None:
        """Start working."""

    def deactivate(self) -> None:
        """Stop working, keep everything."""

    def cleanup(self) -> None:
        """Free what `configure` got."""

    def recover(self) -> None:
        """Free everything after an error, whatever the state was. Must not raise."""

    def __init__(self, node_name: str, **kwargs: Any) -> None:
        super().__init__(node_name, **kwargs)
        self._transition_lock = threading.Lock()
        self._pending: list[str] = []  # labels of the transitions that run or wait
        self._forced_error: VlmError | None = None
        self._jobs: queue.SimpleQueue[tuple[str, Future[bool]] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="vlm-lifecycle", daemon=True)
        self.throttled_log = ThrottledLog(self.get_logger())
        #: To be started by the subclass, with what else it serves.
        self.service_thread = ServiceThread(self, self.throttled_log)
        for service in self.services:
            if service.srv_name.endswith("change_state"):
                self.service_thread.take_over(service, self._on_change_state)
        self._worker.start()

    # -- state and requests

    @property
    def state_label(self) -> str:
        """The lifecycle state, as `ros2 lifecycle get` names it."""
        return str(self._state_machine.current_state[1])

    def request_transition(self, label: str) -> Future[bool]:
        """Run a transition (configure, activate, deactivate, cleanup, shutdown) when none runs.

        The future gives whether it succeeded, or raises `VlmError` INVALID_TRANSITION at once when
        it cannot be. `cleanup` and `shutdown` while configuring cancel the configuring first.
        """
        answer: Future[bool] = Future()
        with self._transition_lock:
            problem = self._why_not(label)
            if problem is None:
                self._pending.append(label)
                self._jobs.put((label, answer))
        if problem is not None:
            answer.set_exception(problem)
        elif self.state_label == "configuring" and label in ("cleanup", "shutdown"):
            self.get_logger().info(f"{label} requested while configuring: loading is cancelled")
            self.cancel_configure()
        return answer

    def raise_error(self, error: VlmError) -> None:
        """Go to `unconfigured` through error processing, for a fault found outside of a hook."""
        with self._transition_lock:  # behind whatever runs: the fault will not go away by itself
            self._forced_error = error
            self._pending.append(_ERROR)
            self._jobs.put((_ERROR, Future()))

    def stop_transitions(self, timeout_s: float) -> bool:
        """End the transition thread: cancels a running configure. True when it ended in time."""
        self._jobs.put(None)
        self.cancel_configure()
        self._worker.join(timeout_s)
        return not self._worker.is_alive()

    def _why_not(self, label: str) -> VlmError | None:
        state_id, state = self._state_machine.current_state
        if self._pending:
            if self._pending == ["configure"] and label in ("cleanup", "shutdown"):
                return None
            return VlmError(
                ErrorCode.INVALID_TRANSITION,
                f"'{label}' requested while '{self._pending[0]}' runs",
                "Ask again when it has ended.",
            )
        allowed = _ALLOWED.get(state_id, ())
        if label in allowed:
            return None
        return VlmError(
            ErrorCode.INVALID_TRANSITION,
            f"'{label or 'unknown transition'}' requested in state '{state}'",
            f"Possible there: {', '.join(allowed) or 'nothing, start the node again'}.",
        )

    def _on_change_state(self, request: Any, reply: Reply) -> None:
        asked = request.transition
        label = _ALIASES.get(asked.label, "") if asked.label else _LABELS.get(asked.id, "")

        def answer(done: Future[bool]) -> None:
            response = reply.make_response()
            error = done.exception()
            if error is not None:
                self.get_logger().error(f"transition refused: {error}")
            response.success = error is None and done.result()
            reply.send(response)

        self.request_transition(label).add_done_callback(answer)

    # -- the transition thread

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            label, answer = job
            try:
                success = self._trigger(label)
            except Exception as error:  # whatever rcl says, this thread and the node live on
                self.get_logger().error(
                    f"transition '{label}' failed in rcl: {as_vlm_error(error)}"
                )
                success = False
            with self._transition_lock:
                self._pending.pop(0)
            answer.set_result(success)

    def _trigger(self, label: str) -> bool:
        state = self.state_label
        if label == "cleanup" and state == "unconfigured":
            return True  # the configuring that it was to undo was cancelled
        if label == _ERROR:
            # Only these two can lead to error processing; in any other state nothing is at work.
            label = {"active": "deactivate", "inactive": "cleanup"}.get(state, "")
            if not label:
                self._forced_error = None
                return False
        result: TransitionCallbackReturn = getattr(self, f"trigger_{label}")()
        if state == "active" and label == "shutdown" and result != TransitionCallbackReturn.SUCCESS:
            return self.state_label == "finalized"
        return bool(result == TransitionCallbackReturn.SUCCESS)

    # -- rclpy's callbacks

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """rclpy's callback; see `configure`."""
        return self._run_hook("configure", self.configure)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """rclpy's callback; see `activate`."""
        return self._run_hook("activate", self.activate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """rclpy's callback; see `deactivate`."""
        return self._forced() or self._run_hook("deactivate", self.deactivate)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """rclpy's callback; see `cleanup`."""
        return self._forced() or self._run_hook("cleanup", self.cleanup)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """rclpy's callback; frees everything as `recover` does."""
        return self._run_hook("shutdown", self.recover)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """rclpy's callback: everything is freed and the node can be configured anew."""
        self._run_hook("error processing", self.recover)
        return TransitionCallbackReturn.SUCCESS

    def _forced(self) -> TransitionCallbackReturn | None:
        forced, self._forced_error = self._forced_error, None
        if forced is None:
            return None
        self.get_logger().error(f"the node goes to 'unconfigured': {forced}")
        return TransitionCallbackReturn.ERROR

    def _run_hook(self, name: str, hook: Callable[[], None]) -> TransitionCallbackReturn:
        started = time.monotonic()
        try:
            hook()
        except Exception as error:
            known = coded_rcl_error(error)
            if known is None:
                self.get_logger().error(
                    f"{name} failed: {as_vlm_error(error)}\n{traceback.format_exc()}"
                )
                return TransitionCallbackReturn.ERROR
            self.get_logger().error(f"{name} failed: {known}")
            if name in ("configure", "activate"):
                return TransitionCallbackReturn.FAILURE
            return TransitionCallbackReturn.ERROR
        self.get_logger().info(f"{name} done in {time.monotonic() - started:.2f} s")
        return TransitionCallbackReturn.SUCCESS
