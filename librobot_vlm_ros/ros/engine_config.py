"""From the node's settings to what the engine is told."""

from __future__ import annotations

from librobot_vlm_ros.core import get_task
from librobot_vlm_ros.ros.inputs.instruction import Instruction
from librobot_vlm_ros.ros.parameters.settings import Settings
from librobot_vlm_ros.runtime import CameraConfig, EngineConfig, StandingTask


def engine_config(settings: Settings) -> EngineConfig:
    """Limits and modes of the engine."""
    return EngineConfig(
        queue_size=settings.queue_size,
        max_batch=settings.max_batch,
        max_frame_age_s=settings.max_frame_age_s,
        history_frames=settings.history_frames,
        lock_step=settings.lock_step,
        warm_up=settings.warm_up,
    )


def camera_configs(settings: Settings) -> list[CameraConfig]:
    """The cameras with their watchdogs; in lock-step a publisher may take its time."""
    timeout_s = 0.0 if settings.lock_step else settings.camera_timeout_s
    return [CameraConfig(camera.name, timeout_s) for camera in settings.camera_list()]


def standing_tasks(settings: Settings, instruction: Instruction) -> list[StandingTask]:
    """The standing tasks; those that need text and have none are given the instruction."""
    tasks = []
    for item in settings.task_list():
        asks_instruction = get_task(item.task).needs_text and not item.prompt
        tasks.append(
            StandingTask(
                task=item.task,
                prompt=instruction.text if asks_instruction else item.prompt,
                rate_hz=item.rate_hz,
                camera=item.camera,
                params=settings.generation(),
                instruction_id=instruction.number if asks_instruction else 0,
                name=item.text,
            )
        )
    return tasks


def waiting_tasks(settings: Settings, instruction: Instruction) -> list[str]:
    """Names of the standing tasks that run once there is an instruction."""
    return [
        task.name
        for task in standing_tasks(settings, instruction)
        if get_task(task.task).needs_text and not task.prompt
    ]
