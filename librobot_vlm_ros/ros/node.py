"""The lifecycle node `vlm`: what the parameters say is subscribed, asked of the model and
published.

What the transitions do:
    configure   loads the model on the engine's thread
    activate    subscribes to the cameras and works
    deactivate  leaves the cameras, keeps the model
    cleanup     frees the model
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from rclpy.clock import Clock, ClockType
from rclpy.logging import LoggingSeverity

from librobot_vlm_ros.core import (
    EngineError,
    ErrorCode,
    Frame,
    ModelError,
    Result,
    VlmError,
    escape_for_log,
)
from librobot_vlm_ros.ros.dds import give_back_memory
from librobot_vlm_ros.ros.inputs.camera import Camera
from librobot_vlm_ros.ros.inputs.instruction import (
    Instruction,
    InstructionTopic,
    standing_tasks,
    waiting_tasks,
)
from librobot_vlm_ros.ros.latest_worker import LatestWorker
from librobot_vlm_ros.ros.lifecycle import GuardedLifecycleNode
from librobot_vlm_ros.ros.model_loading import create_backend, load_model, loaded_text, switch_model
from librobot_vlm_ros.ros.monitoring.diagnostics import (
    DiagnosticsPublisher,
    camera_status,
    engine_status,
    model_status,
)
from librobot_vlm_ros.ros.monitoring.duplicate_node import DuplicateNodeCheck
from librobot_vlm_ros.ros.monitoring.log_throttle import guarded
from librobot_vlm_ros.ros.outputs.annotated import Annotator
from librobot_vlm_ros.ros.outputs.results import ResultPublisher, result_text
from librobot_vlm_ros.ros.parameters.live_parameters import LiveParameters, guard_parameter_services
from librobot_vlm_ros.ros.parameters.settings import Settings
from librobot_vlm_ros.ros.rcl_errors import coded_rcl_error
from librobot_vlm_ros.ros.services.executor_barrier import ExecutorBarrier
from librobot_vlm_ros.ros.services.generate import GenerateAction
from librobot_vlm_ros.ros.services.node_services import NodeServices
from librobot_vlm_ros.ros.services.request_conversion import RequestContext, not_active, timeout_of
from librobot_vlm_ros.runtime import CameraEvent, Engine, LoadReport, settle
from librobot_vlm_ros.runtime.pending_request import busy

_INSTRUCTIONS_LOGGED = 20  # in 5 s: what comes faster is a flood
_PAUSE_S = 5.0
_FREE_S = 15.0
_CHECK_PERIOD_S = 0.5
_DIAGNOSTICS_PERIOD_S = 1.0


class VlmNode(GuardedLifecycleNode):
    """See the module. Made once per process; `shut_down` ends it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("vlm", **kwargs)
        # Made by `configure` and freed by `cleanup`; cameras while active.
        self._engine: Engine | None = None
        self._instruction_topic: InstructionTopic | None = None
        self._annotator: Annotator | None = None
        self._cameras: dict[str, Camera] = {}
        self._load_error: VlmError | None = None
        self._free_s = _FREE_S
        self._engine_ended = True

        self._live = LiveParameters(
            self,
            is_unconfigured=lambda: self.state_label == "unconfigured",
            on_change=self._on_parameters,
        )
        guard_parameter_services(self)
        self._instruction = Instruction(self.settings.instruction)
        self._decoder = LatestWorker("vlm-decode")
        self._results = ResultPublisher(self, lambda: self.settings.min_score)

        self._barrier = ExecutorBarrier(self, self._decoder)
        self._node_services = NodeServices(self)
        self._generate = GenerateAction(self)

        self._diagnostics = DiagnosticsPublisher(self)
        self._duplicates = DuplicateNodeCheck(self)
        # Watchdogs must tick when the robot's clock stands still or jumps (simulation, bag loops).
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        for period_s, work in (
            (_DIAGNOSTICS_PERIOD_S, self._publish_diagnostics),
            (_CHECK_PERIOD_S, self._check_topics),
        ):
            self.create_timer(period_s, guarded(work, self.throttled_log), clock=steady)
        self.service_thread.start()

    # -- what the services and the action need

    @property
    def settings(self) -> Settings:
        """Parameters now."""
        return self._live.settings

    def request_context(self) -> RequestContext:
        """Engine and cameras; raises `EngineError` NOT_ACTIVE while there are none."""
        engine, state = self._engine, self.state_label
        if engine is None:
            raise not_active(state)
        return RequestContext(engine, self.settings, dict(self._cameras), state)

    def check_room(self) -> None:
        """Raises `EngineError` where a request would be refused: BUSY, NOT_ACTIVE."""
        if self._engine is None:
            raise not_active(self.state_label)
        if self._engine.full:
            raise busy(self.settings.queue_size)

    def catch_up(self, timeout_s: float) -> bool:
        """Wait for the images that have arrived; False where that takes longer."""
        return self._barrier.wait(timeout_s)

    def active_model(self) -> str:
        """Name of the loaded model, "" when none is."""
        engine = self._engine
        loaded = None if engine is None else engine.loaded
        return "" if loaded is None else loaded.model

    def switch(self, asked: Mapping[str, str], timeout_s: float) -> Future[LoadReport]:
        """Change the model without leaving the state; see `switch_model`."""
        engine = self._engine
        if engine is None or self.state_label not in ("active", "inactive"):
            raise ModelError(
                ErrorCode.MODEL_NOT_LOADED,
                f"the node is {self.state_label}",
                "Configure it first: that loads the model named by the parameter.",
            )
        limit_s = timeout_of(timeout_s, self.settings.load_timeout_s)
        return switch_model(engine, self._live, asked, limit_s, self.get_logger())

    # -- lifecycle hooks, on the transition thread

    def configure(self) -> None:
        """Load the model; everything that a wrong parameter can spoil is found here."""
        for error in self._live.errors.values():
            raise error
        settings = self.settings
        self._load_error = None
        self._instruction.set(settings.instruction)
        engine = Engine(
            create_backend,
            config=settings.engine_config(),
            on_result=self._on_result,
            on_fatal=self.raise_error,
            on_camera=self._on_camera,
        )
        self._engine = engine
        try:
            engine.set_cameras(settings.camera_configs())
            engine.set_standing_tasks(standing_tasks(settings, self._instruction))
            self.get_logger().info(f"loading model '{settings.model}'")
            report = load_model(engine, self._live)
            self.get_logger().info(loaded_text(report))
            self._instruction_topic = InstructionTopic(self, self._live, self.throttled_log)
            if settings.annotated:
                self._annotator = Annotator(self)
                self._results.set_annotator(self._annotator)
        except Exception as error:
            self._load_error = coded_rcl_error(error)
            self._free()
            raise
        settle()

    def cancel_configure(self) -> None:
        """End a load that is under way."""
        engine = self._engine
        if engine is not None:
            engine.cancel_load()

    def activate(self) -> None:
        """Start the engine and subscribe to the cameras."""
        engine, settings = self._engine, self.settings
        assert engine is not None
        engine.start()
        cameras: dict[str, Camera] = {}
        try:
            for setting in settings.camera_list():
                cameras[setting.name] = Camera(
                    self,
                    setting,
                    engine,
                    self._decoder,
                    settings=lambda: self.settings,
                    jpeg_margin=self._jpeg_margin_now,
                    throttled_log=self.throttled_log,
                )
        except Exception:  # the node stays inactive: nothing of this may go on
            for camera in cameras.values():
                camera.close()
            engine.pause(_PAUSE_S)
            raise
        self._cameras = cameras
        topics = ", ".join(camera.link.topic for camera in cameras.values())
        waiting = waiting_tasks(settings, self._instruction)
        for name, why in engine.stats().idle_tasks:
            if name not in waiting:
                self.get_logger().warning(f"standing task '{name}' does not run: {why}")
        tasks = ", ".join(map(escape_for_log, settings.tasks)) or "no standing tasks"
        self.get_logger().info(f"{tasks} on {topics}")

    def deactivate(self) -> None:
        """Leave the cameras, stop the model at its next token."""
        self._leave_cameras()
        if self._engine is not None and not self._engine.pause(_PAUSE_S):
            raise EngineError(ErrorCode.INTERNAL, f"the model did not stop within {_PAUSE_S:g} s")

    def cleanup(self) -> None:
        """Free the model and everything that `configure` made."""
        if not self._free():
            raise EngineError(
                ErrorCode.INTERNAL, f"the model's thread did not end within {self._free_s:g} s"
            )

    def recover(self) -> None:
        """Free everything, whatever the state was."""
        self._leave_cameras()
        self._free()

    def _leave_cameras(self) -> None:
        cameras, self._cameras = self._cameras, {}
        for camera in cameras.values():
            camera.close()

    def _free(self) -> bool:
        engine, self._engine = self._engine, None
        topic, self._instruction_topic = self._instruction_topic, None
        annotator, self._annotator = self._annotator, None
        self._results.set_annotator(None)
        if topic is not None:
            topic.close()
        if annotator is not None:
            annotator.close()
        self._engine_ended = engine is None or engine.stop(self._free_s)
        give_back_memory()
        return self._engine_ended

    def shut_down(self, timeout_s: float) -> bool:
        """End everything the node runs, within the time; true when all threads have ended."""
        self._free_s = 0.6 * timeout_s
        self._node_services.close()
        ending = self.request_transition("shutdown")
        concurrent.futures.wait([ending], 0.7 * timeout_s)
        ended = self.stop_transitions(0.1 * timeout_s)
        self._free_s = 0.1 * timeout_s
        self.recover()  # where the transition was refused, or did not get that far
        served = self.service_thread.stop(0.1 * timeout_s)
        return self._decoder.close(0.1 * timeout_s) and ended and served and self._engine_ended

    # -- events of the engine, on its threads

    def _on_result(self, result: Result, frame: Frame) -> None:
        engine = self._engine
        if engine is None:
            return
        if result.error is not None:
            task, code = result.info.task, result.error.code
            self.throttled_log.error(f"{task}/{code}", f"{task}: {result.error}")
        self._results.publish(result, frame, engine.now_ns())
        if self.get_logger().is_enabled_for(LoggingSeverity.DEBUG):
            self.get_logger().debug(result_text(result, frame, engine.now_ns()))

    def _on_camera(self, event: CameraEvent) -> None:
        camera = self._cameras.get(event.camera)
        if camera is not None and camera.link.problem:
            return  # the camera itself says that its topic is missing, with the fix
        if event.stale:
            self.get_logger().error(
                f"TOPIC_TIMEOUT({int(ErrorCode.TOPIC_TIMEOUT)}): camera '{event.camera}' "
                f"has sent nothing for {event.silent_s:.1f} s"
            )
        else:
            self.get_logger().info(f"camera '{event.camera}' sends frames")

    def _jpeg_margin_now(self) -> int:
        """0, the whole image, also while somebody looks at the annotated ones."""
        annotator = self._annotator
        watched = annotator is not None and annotator.watched
        return 0 if watched else self.settings.jpeg_margin

    # -- changes of parameters, on the thread that made them

    def _on_parameters(self, before: Settings, after: Settings) -> None:
        if after.instruction != before.instruction:
            number = self._instruction.set(after.instruction)
            told = f"instruction {number}: '{self._instruction.shown}'"
            self.throttled_log.info("instruction set", told, _INSTRUCTIONS_LOGGED)
        engine = self._engine
        if engine is None:
            return
        engine.reconfigure(max_frame_age_s=after.max_frame_age_s, queue_size=after.queue_size)
        if after.camera_timeout_s != before.camera_timeout_s:
            engine.set_cameras(after.camera_configs())
        engine.set_standing_tasks(standing_tasks(after, self._instruction))

    # -- timers, on the executor

    def _check_topics(self) -> None:
        for camera in list(self._cameras.values()):
            camera.check()
        topic = self._instruction_topic
        if topic is not None:
            topic.check()

    def _publish_diagnostics(self) -> None:
        self._duplicates.check()
        engine = self._engine
        stats = engine.stats() if engine is not None else None
        problems = [*self._live.errors.values()]
        if self._load_error is not None:
            problems.append(self._load_error)
        state, settings = self.state_label, self.settings
        statuses = [
            model_status(state, settings.model, problems, stats, warning=self._duplicates.problem)
        ]
        if stats is not None and state == "active":
            statuses.append(engine_status(stats, waiting_tasks(settings, self._instruction)))
            statuses += [
                camera_status(camera, stats.cameras.get(name))
                for name, camera in list(self._cameras.items())
            ]
        self._diagnostics.publish(statuses)
