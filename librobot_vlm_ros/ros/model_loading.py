"""Getting a model into the engine: at configuring, and in place of another while the node works."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot_vlm_ros import models
from librobot_vlm_ros.core import ErrorCode, ModelError, as_vlm_error
from librobot_vlm_ros.models import model_info
from librobot_vlm_ros.models.checkpoints.hub import shipped_folder
from librobot_vlm_ros.models.checkpoints.path_policy import confined, confined_to
from librobot_vlm_ros.ros.parameters.settings import Settings
from librobot_vlm_ros.runtime import Engine, LoadReport, settle

if TYPE_CHECKING:  # it needs rclpy
    from librobot_vlm_ros.ros.parameters.live_parameters import LiveParameters


def create_backend(name: str, *, open_folders: Sequence[Path] | None = None, **options: Any) -> Any:
    """The engine's factory. `open_folders`: where checkpoints may name folders; None: anywhere."""
    with confined_to(open_folders):
        return models.create_backend(name, **options)


def load_options(settings: Settings) -> dict[str, Any]:
    """What `create_vlm` is given besides the name."""
    # A model of somebody else's need not know it, so that only an explicit wish is passed on.
    wish = {} if settings.resize == "auto" else {"resize": settings.resize}
    return wish | {
        "config": settings.model_options(),
        "pretrained": settings.weights or _own_weights(settings),
        "weights_sha256": settings.weights_sha256,
        "device": settings.device,
        "dtype": settings.dtype,
        "attention": settings.attention,
        "quantization": settings.quantization,
    }


def _own_weights(settings: Settings) -> str | None:
    """What `create_vlm` must be told where there is a `model_config`: with a config alone it would
    build the model with random weights. Raises ModelError UNKNOWN_MODEL.
    """
    if settings.model_options() is None:
        return None
    info = model_info(settings.model)
    if info.shipped_folder is not None:
        return str(shipped_folder() / info.shipped_folder)
    return info.default_pretrained


def load_model(engine: Engine, parameters: LiveParameters) -> LoadReport:
    """Load what the parameters name, waiting at most `load_timeout_s`. Raises `VlmError`."""
    settings = parameters.settings
    future = engine.load(
        settings.model, **load_options(settings), open_folders=parameters.folders_of_checkpoints()
    )
    try:
        return future.result(settings.load_timeout_s)
    except concurrent.futures.TimeoutError:
        engine.cancel_load(future)
        raise ModelError(
            ErrorCode.LOAD_CANCELLED,
            f"loading '{settings.model}' took longer than {settings.load_timeout_s:g} s",
            "Raise load_timeout_s.",
        ) from None


def loaded_text(report: LoadReport) -> str:
    """One line for the log."""
    return (
        f"model '{report.model}' ({report.revision}) on {report.device} in {report.dtype}, "
        f"loaded in {report.load_s:.2f} s"
    )


def required_bytes(wanted: Settings, present: LoadReport | None) -> int | None:
    """Memory that the weights of the `wanted` model take; None where the catalogue cannot say."""
    dtype = wanted.quantization if wanted.quantization != "none" else wanted.dtype
    if dtype == "auto":  # float32 on a CPU, half precision elsewhere: as what is loaded now
        dtype = present.dtype if present is not None else "float32"
    return model_info(wanted.model).memory_bytes(dtype) or None


def switch_model(
    engine: Engine,
    parameters: LiveParameters,
    asked: Mapping[str, str],
    timeout_s: float,
    logger: Any,
) -> Future[LoadReport]:
    """Change the model; log and parameters tell the outcome before the future does.

    `asked` holds model, weights, device and dtype; "" is as now, for weights the model's own.
    Weights may lie where `open_to_clients` says. Raises `VlmError` when the change cannot be tried;
    the future raises it when it fails, and the model before is in place again.
    """
    now = parameters.settings
    values = {
        "model": model_info(asked["model"] or now.model).name,
        "weights": confined(asked["weights"], parameters.open_folders()),
        "model_config": "",
        "device": asked["device"] or now.device,
        "dtype": asked["dtype"] or now.dtype,
    }
    wanted = now.changed(**values)
    loading = engine.load(
        values["model"],
        required_bytes=required_bytes(wanted, engine.loaded),
        **load_options(wanted),
        open_folders=parameters.open_folders(),
    )
    answer: Future[LoadReport] = Future()

    def done(finished: Future[LoadReport]) -> None:
        timer.cancel()
        error = finished.exception()
        if error is not None:
            logger.error(f"switching to '{values['model']}' failed: {error}")
            answer.set_exception(as_vlm_error(error))
            return
        parameters.force(values)
        logger.info(loaded_text(finished.result()))
        settle()
        answer.set_result(finished.result())

    timer = threading.Timer(timeout_s, engine.cancel_load, [loading])
    timer.daemon = True
    timer.start()
    loading.add_done_callback(done)
    return answer
