"""The process of the node: signals, executor, orderly end. Starts with `vlm_node` or `librobot-vlm
run`.

SIGINT, SIGTERM and SIGHUP end it with exit code 0 within 5 seconds, also while the model loads or
answers.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

_END_S = 3.5
_LAST_RESORT_S = 4.5


def main(args: Sequence[str] | None = None, values: Mapping[str, Any] | None = None) -> int:
    """Run the node until a signal comes, then end the process with exit code 0.

    Gives an exit code where the node could not be started.

    Args:
        args: as in `sys.argv`.
        values: parameters that win over those of `args` and of any file in them.
    """
    wait_for_signal = _catch_signals()  # before the imports below, which take a while
    from librobot_vlm_ros.ros.third_party import let_libraries_warn

    let_libraries_warn()
    from librobot_vlm_ros.ros.dds import clear_dead_segments, keep_freed_memory, use_image_profile
    from librobot_vlm_ros.ros.rcl_errors import coded_rcl_error
    from librobot_vlm_ros.runtime import collect

    freed = clear_dead_segments()  # or there may be no room for the profile
    transport = use_image_profile()
    keep_freed_memory()
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    from librobot_vlm_ros.core import as_vlm_error, bad_parameter

    argv = list(sys.argv if args is None else args)
    try:
        # rclpy's own handlers take the context away, and with it the last words of the node.
        rclpy.init(args=argv, signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:  # arguments and parameter files are read here
        known = coded_rcl_error(error)
        wrong = known or bad_parameter(
            f"the arguments of the process cannot be used: {error}",
            "Check what stands behind --ros-args, and the parameter file.",
        )
        print(f"vlm_node: {wrong}", file=sys.stderr)
        return 1 if known else 2
    try:
        node = _make_node(values or {})
    except Exception as error:
        print(f"vlm_node: {coded_rcl_error(error) or as_vlm_error(error)}", file=sys.stderr)
        return 1
    _forward_logging(node.get_logger())
    if freed:
        node.get_logger().info(
            f"freed {freed / 1e6:.0f} MB of shared memory that ended processes had left"
        )
    node.get_logger().info(transport)
    spinning = _Spinner(node)
    if node.settings.autostart:
        threading.Thread(target=_autostart, args=(node,), name="vlm-autostart", daemon=True).start()
    wait_for_signal()
    node.get_logger().info("ending")
    watchdog = threading.Timer(_LAST_RESORT_S, os._exit, args=(0,))
    watchdog.daemon = True
    watchdog.start()
    node.shut_down(_END_S)
    spinning.stop()
    node.destroy_node()
    rclpy.try_shutdown()
    # The participant goes with the last of what holds it, and takes its shared memory with it.
    del node, spinning
    collect()
    rclpy.get_default_context().destroy()
    sys.stdout.flush()
    sys.stderr.flush()
    # Taking the interpreter down takes seconds with torch in it, and is no option while a thread is
    # deep in the model. Everything that must end in order has.
    os._exit(0)


def _make_node(values: Mapping[str, Any]) -> Any:
    from rclpy.parameter import Parameter

    from librobot_vlm_ros.ros.node import VlmNode
    from librobot_vlm_ros.ros.parameters.declaration import ros_value

    overrides = [Parameter(name, value=ros_value(value)) for name, value in values.items()]
    return VlmNode(parameter_overrides=overrides)


def _catch_signals() -> Any:
    """Install handlers for the signals that end; gives a function that blocks until one has come.

    SIGHUP is a terminal that was closed, unless `nohup` has it ignored.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    ending = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        ending.append(signal.SIGHUP)
    for number in ending:
        signal.signal(number, lambda _number, _frame: None)
    return lambda: os.read(reader, 1)


def _autostart(node: Any) -> None:
    for label in ("configure", "activate"):
        try:
            if not node.request_transition(label).result() and node.state_label != "finalized":
                node.get_logger().error(
                    f"autostart stopped: the node is '{node.state_label}'. Put right what the "
                    "lines above say, then: "
                    f"ros2 lifecycle set {node.get_fully_qualified_name()} {label}"
                )
                return
        except Exception as error:
            if node.state_label != "finalized":  # told to end meanwhile
                node.get_logger().error(f"autostart stopped: {error}")
            return


class _Spinner:
    """The executor on its own thread. What a callback raises is logged; the node goes on."""

    def __init__(self, node: Any) -> None:
        from rclpy.executors import SingleThreadedExecutor

        self._log = node.throttled_log
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._spin, name="vlm-executor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End spinning."""
        self._ending.set()
        self._executor.wake()
        self._thread.join(1.0)
        self._executor.shutdown(0)

    def _spin(self) -> None:
        from rclpy.executors import ExternalShutdownException

        while not self._ending.is_set():
            try:
                self._executor.spin_once()
            except ExternalShutdownException:
                return
            except Exception as error:
                if not self._ending.is_set():
                    self._log.error(
                        repr(error),
                        f"a callback failed, the node goes on: {error!r}\n{traceback.format_exc()}",
                    )
                    self._ending.wait(0.01)  # a fault that comes back at once must not take the CPU


def _forward_logging(logger: Any) -> None:
    """Send what the rooms below log (they don't know ROS) to the node's log, by its level.

    The level is that of the start, `--log-level`: rooms ask it before they make costly texts.
    """
    # The numbers of both libraries are the same.
    level = int(logger.get_effective_level())

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = self.format(record)
            if record.levelno >= logging.ERROR:
                logger.error(text)
            elif record.levelno >= logging.WARNING:
                logger.warning(text)
            elif record.levelno >= logging.INFO:
                logger.info(text)
            else:
                logger.debug(text)

    ours = logging.getLogger("librobot_vlm_ros")
    ours.addHandler(Forward(level))
    ours.setLevel(level)
    ours.propagate = False


if __name__ == "__main__":
    sys.exit(main())
