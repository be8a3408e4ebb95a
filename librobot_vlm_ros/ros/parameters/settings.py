"""The node's parameters, declared here and nowhere else, and what they say once they are checked.

`Settings(**values)` validates every value and all of them together; `PARAMETERS` is the declaration
that the node, the launch file, `librobot-vlm run` and the documentation's table are made from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from librobot_vlm_ros.core import (
    GenerationParams,
    RequestError,
    bad_parameter,
    clean_prompt,
    shortened,
)
from librobot_vlm_ros.models import sha256_list
from librobot_vlm_ros.models.checkpoints.path_policy import allowed_folders, confined
from librobot_vlm_ros.ros.parameters.declaration import (
    Parameter,
    When,
    declared,
    parameter,
)
from librobot_vlm_ros.ros.parameters.parameter_syntax import (
    CameraSetting,
    parse_cameras,
    parse_tasks,
)
from librobot_vlm_ros.runtime import CameraConfig, EngineConfig, StandingTask

_TOPIC = r"(~/|/)?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*"
_DEVICE = r"auto|cpu|cuda(:\d+)?"


MAX_DIGESTS = 1000


@dataclass(frozen=True)
class Settings:
    """All parameters of the node, checked. Raises `RequestError` (BAD_PARAMETER, UNKNOWN_TASK,
    UNKNOWN_CAMERA) and `BagError` (PATH_NOT_ALLOWED).
    """

    model: str = parameter(
        "florence-2-base",
        "Registered model; `~/list_models` lists them.",
        When.CONFIGURE,
        pattern=r"[^\s]{1,128}",
        expected="a name without spaces",
    )
    # Before `weights`, so that it holds already when that is checked at start.
    weights_folders: tuple[str, ...] = parameter(
        (),
        "Absolute folders below which folders of weights may lie. Empty: `weights` given at start "
        "may be anywhere; later changes and `~/switch_model` reach its siblings, the shipped "
        "weights and the hub's cache.",
        When.START,
    )
    weights: str = parameter(
        "",
        "Folder or hub id of the weights; empty takes the model's own.",
        When.CONFIGURE,
        examples=("/path/to/folder",),
    )
    weights_sha256: tuple[str, ...] = parameter(
        (),
        "Allowed sha256 of the weights, checked before loading, also by `~/switch_model`; "
        "`librobot-vlm models --sha256 FOLDER` prints one. Empty allows any.",
        When.CONFIGURE,
    )
    model_config: str = parameter(
        "",
        "JSON object of settings for the model's own configuration; empty takes the published one.",
        When.CONFIGURE,
        examples=('{"latency_s": 0.05}',),
    )
    device: str = parameter(
        "auto",
        "Where the model runs. An explicit device is used or refused, never replaced. mps and xpu "
        "are refused: no model was tested there.",
        When.CONFIGURE,
        pattern=_DEVICE,
        expected="auto, cpu, cuda or cuda:N",
        reason="on mps, xpu and others no model was tested",
    )
    dtype: str = parameter(
        "auto",
        "What the weights are held in.",
        When.CONFIGURE,
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    attention: str = parameter(
        "auto",
        "Attention implementation.",
        When.CONFIGURE,
        choices=("auto", "flash_attention_2", "sdpa", "eager"),
    )
    quantization: str = parameter(
        "none",
        "Weight quantisation, where the model family has it.",
        When.CONFIGURE,
        choices=("none", "int8", "nf4"),
    )
    resize: str = parameter(
        "auto",
        "How images come to the model's size: `exact`, as its published processor does it; `fast`, "
        "several times faster and within two of 255 levels of that; `auto`, fast on CUDA only.",
        When.CONFIGURE,
        choices=("auto", "exact", "fast"),
    )
    load_timeout_s: float = parameter(
        600.0, "Seconds that configuring may take.", When.CONFIGURE, low=0.1, high=86400.0
    )
    warm_up: bool = parameter(
        True,
        "Run the model once while configuring, so that the first frame is fast.",
        When.CONFIGURE,
    )
    image_topic: str = parameter(
        "/camera/image_raw",
        "Topic of the camera named `camera`; not used when `cameras` is set.",
        When.CONFIGURE,
        pattern=_TOPIC,
        expected="a topic name",
    )
    image_transport: str = parameter(
        "raw",
        "What the cameras send: `compressed` subscribes to `<topic>/compressed`.",
        When.CONFIGURE,
        choices=("raw", "compressed"),
    )
    cameras: tuple[str, ...] = parameter(
        (),
        "Several cameras: `name=/topic` each; `name=/topic:compressed` or `:raw` overrides "
        "`image_transport`.",
        When.CONFIGURE,
        examples=("front=/front/image_raw, wrist=/wrist/image_raw:compressed",),
    )
    camera_timeout_s: float = parameter(
        2.0,
        "Silence in seconds after which a camera is reported stale and its last frame answers no "
        "query; 0 never.",
        When.LIVE,
        low=0.0,
        high=3600.0,
    )
    max_frame_age_s: float = parameter(
        1.0,
        "Standing tasks refuse a frame that arrived longer ago, in seconds; 0 takes any.",
        When.LIVE,
        low=0.0,
        high=3600.0,
    )
    history_frames: int = parameter(
        8, "Recent frames kept per camera for queries by stamp.", When.CONFIGURE, low=0, high=1000
    )
    qos_reliability: str = parameter(
        "auto",
        "Reliability of camera subscriptions; `auto` follows the publishers.",
        When.CONFIGURE,
        choices=("auto", "best_effort", "reliable"),
    )
    allow_depth: bool = parameter(
        False, "Take 16UC1 and 32FC1 depth images, scaled to grey.", When.LIVE
    )
    jpeg_margin: int = parameter(
        0,
        "0 decodes JPEG whole; else at 1/2, 1/4 or 1/8 of its size where that leaves at least so "
        "many times the model's input on both sides (2 is hardly seen in answers). Boxes stay "
        "those of the whole image.",
        When.LIVE,
        low=0,
        high=16,
    )
    tasks: tuple[str, ...] = parameter(
        ("caption@1.0", "detect@2.0", "ground@2.0", "embed@1.0"),
        "Standing tasks: `[camera:]task[@rate in Hz][=prompt]`; no rate means every frame "
        "that the model has time for. A task that needs text and has no prompt of its own uses "
        "the instruction.",
        When.LIVE,
        examples=("caption@1, front:detect@5, ground@5=red cube", "[]"),
    )
    instruction: str = parameter(
        "",
        "What standing tasks look for; `~/instruction` sets it too.",
        When.LIVE,
        examples=("the red cup",),
    )
    min_score: float = parameter(
        0.0,
        "Regions with a lower score are left out; regions without a score stay.",
        When.LIVE,
        low=0.0,
        high=1.0,
    )
    max_new_tokens: int = parameter(
        0, "Most tokens of one answer; 0 takes the model's own limit.", When.LIVE, low=0, high=1024
    )
    num_beams: int = parameter(
        0, "Beams of the decoding; 0 takes the model's own.", When.LIVE, low=0, high=32
    )
    request_timeout_s: float = parameter(
        30.0,
        "Deadline in seconds of a query or goal that names none.",
        When.LIVE,
        low=0.01,
        high=3600.0,
    )
    queue_size: int = parameter(
        8,
        "Queries and goals that may wait, beside those that the model works on; beyond, the answer "
        "is BUSY.",
        When.LIVE,
        low=1,
        high=1024,
    )
    max_batch: int = parameter(
        8, "Most requests the model answers together.", When.CONFIGURE, low=1, high=64
    )
    annotated: bool = parameter(
        True, "Offer `~/annotated`; drawn only while somebody subscribes.", When.CONFIGURE
    )
    lock_step: bool = parameter(
        False,
        "Process every frame in order and drop none (replay); not for live cameras.",
        When.CONFIGURE,
    )
    autostart: bool = parameter(
        False, "Configure and activate at start, without a lifecycle manager.", When.START
    )

    def __post_init__(self) -> None:
        for name, item in PARAMETERS.items():
            object.__setattr__(self, name, item.checked(getattr(self, name)))
        if len(self.weights_sha256) > MAX_DIGESTS:  # each change of a parameter looks at them
            raise bad_parameter(
                f"weights_sha256 has {len(self.weights_sha256)} entries, "
                f"expected at most {MAX_DIGESTS}"
            )
        object.__setattr__(self, "weights_sha256", sha256_list(self.weights_sha256))
        if self.weights_folders:
            confined(self.weights, allowed_folders(self.weights_folders))
        self.model_options()
        clean_prompt(self.instruction, required=False)
        self.task_list()

    def camera_list(self) -> tuple[CameraSetting, ...]:
        """The cameras to subscribe to; at least one."""
        return parse_cameras(self.cameras, self.image_topic, self.image_transport)

    def task_list(self) -> tuple[StandingTask, ...]:
        """The standing tasks, without instruction; each decodes as `generation` says."""
        tasks = parse_tasks(self.tasks, tuple(camera.name for camera in self.camera_list()))
        return tuple(dataclasses.replace(task, params=self.generation()) for task in tasks)

    def engine_config(self) -> EngineConfig:
        """Limits and modes of the engine."""
        names = (field.name for field in dataclasses.fields(EngineConfig))
        return EngineConfig(**{name: getattr(self, name) for name in names})

    def camera_configs(self) -> list[CameraConfig]:
        """The cameras with their watchdogs; in lock-step a publisher may take its time."""
        timeout_s = 0.0 if self.lock_step else self.camera_timeout_s
        return [CameraConfig(camera.name, timeout_s) for camera in self.camera_list()]

    def generation(self) -> GenerationParams:
        """How standing tasks and requests without wishes of their own decode."""
        return GenerationParams(
            max_new_tokens=self.max_new_tokens or None, num_beams=self.num_beams or None
        )

    def model_options(self) -> Mapping[str, Any] | None:
        """`model_config` as a mapping, None where it is empty."""
        if not self.model_config.strip():
            return None
        try:
            options = json.loads(self.model_config)
        except (ValueError, RecursionError) as error:
            raise self._config_error(str(error)) from error
        if not isinstance(options, dict):
            raise self._config_error("it is no object")
        return options

    def _config_error(self, why: str) -> RequestError:
        return bad_parameter(
            f"parameter model_config is {shortened(self.model_config)}: {why}",
            'Write a JSON object, such as {"latency_s": 0.05}.',
        )

    def changed(self, **values: Any) -> Settings:
        """A copy with these values, checked as a whole."""
        return dataclasses.replace(self, **values)


PARAMETERS: Mapping[str, Parameter] = declared(Settings)
