"""Images to another size, exactly as the published processors do it or nearly so and much faster.

`exact` is Pillow: fixed-point filters, one pass a direction, rounded to uint8 between the passes.
`fast` is the same filters by torch, in the same order. On a CPU its vector code differs from Pillow
by a level of 255 in a few pixels of a thousand; on CUDA the image goes up as uint8 and both passes
run there, in float32 and rounded where Pillow rounds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from librobot_vlm_ros.core import ErrorCode, RequestError

__all__ = ["EXACT", "RESIZE", "Resizing", "ahead_of", "resize", "resizing", "writable"]

#: What the option `resize` of a model may be.
RESIZE = ("auto", "exact", "fast")

# The filters that torch has too, antialiased; Pillow's are the others.
_MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
_CPU = torch.device("cpu")
_streams = threading.local()


@dataclass(frozen=True)
class Resizing:
    """How images change their size, and where."""

    fast: bool = False
    device: torch.device = _CPU


EXACT = Resizing()


def resizing(
    how: str, device: torch.device, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Resizing:
    """What the option `resize` means for a model on `device` whose images take that filter.

    `auto` is `fast` on CUDA, where the pixels are needed anyway, and `exact` elsewhere. Raises
    RequestError BAD_PARAMETER, also for `fast` with a filter that only Pillow has.
    """
    if how not in RESIZE:
        raise RequestError(
            ErrorCode.BAD_PARAMETER, f"resize is {how!r}, expected one of {', '.join(RESIZE)}"
        )
    on_cuda = device.type == "cuda"
    known = resample in _MODES
    if how == "exact" or (how == "auto" and not (on_cuda and known)):
        return EXACT
    if not known:
        raise RequestError(
            ErrorCode.BAD_PARAMETER,
            f"resize is 'fast', but the model's images are resized with {resample.name.lower()}",
            "use resize 'exact' or 'auto'",
        )
    return Resizing(fast=True, device=device if on_cuda else _CPU)


def resize(
    pixels: npt.NDArray[np.uint8],
    height: int,
    width: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    how: Resizing = EXACT,
) -> Any:
    """uint8 [H, W, 3] to [height, width, 3]: an array, or a tensor on `how.device` where that is
    CUDA. Proportions are not kept. Of `fast` the channels lie one after the other in memory, as the
    model takes them.
    """
    mode = _MODES[resample] if how.fast else None
    if mode is not None and how.device.type == "cuda":
        return on_device(_uploaded(pixels, how.device), height, width, mode)
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    if mode is not None:
        return _vectorised(pixels, height, width, mode)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), resample))


def on_device(pixels: Tensor, height: int, width: int, mode: str) -> Tensor:
    """uint8 [H, W, 3] to uint8 [height, width, 3] in float32 on the tensor's own device.

    Rounded between the passes, and halves up, as Pillow does it: without that every fifth value
    differs by one.
    """
    planes = pixels.permute(2, 0, 1)[None].to(torch.float32)
    rows, columns = pixels.shape[:2]
    between = (height, columns) if _rows_first(pixels.shape, height, width) else (rows, width)
    for size in (between, (height, width)):
        if size == planes.shape[2:]:
            continue
        planes = interpolate(planes, size, mode=mode, antialias=True)
        planes = planes.add_(0.5).floor_().clamp_(0, 255)
    return planes[0].permute(1, 2, 0).to(torch.uint8)


def _rows_first(size: Sequence[int], height: int, width: int) -> bool:
    """Whether Pillow takes the rows first, because that spares work."""
    return height < size[0] and width > size[1]


@contextmanager
def ahead_of(device: torch.device) -> Iterator[None]:
    """For work beside the model's own thread: on CUDA it runs on a stream of the calling thread,
    and is done when the block ends.
    """
    if device.type != "cuda":
        yield
        return
    stream = getattr(_streams, str(device), None)
    if stream is None:
        stream = torch.cuda.Stream(device)
        setattr(_streams, str(device), stream)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _vectorised(
    pixels: npt.NDArray[np.uint8], height: int, width: int, mode: str
) -> npt.NDArray[np.uint8]:
    # torch's vector code wants the channels of a pixel side by side, which a camera's image has.
    image = torch.from_numpy(writable(np.ascontiguousarray(pixels))).permute(2, 0, 1)[None]
    if _rows_first(pixels.shape, height, width):  # left to itself, it takes the columns first
        image = interpolate(image, (height, pixels.shape[1]), mode=mode, antialias=True)
    image = interpolate(image, (height, width), mode=mode, antialias=True)
    return image[0].permute(1, 2, 0).numpy()


def writable(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The same bytes as ones that may be written, for torch, which warns of others. Do not write.

    A frame's pixels are read-only, and copying them takes a sixth of the time of resizing them.
    """
    return pixels if pixels.flags.writeable else np.asarray(_Writable(pixels))


class _Writable:
    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        address, _ = pixels.__array_interface__["data"]
        self.__array_interface__ = {**pixels.__array_interface__, "data": (address, False)}
        self.pixels = pixels  # keeps the bytes alive


def _uploaded(pixels: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """The bytes on the device; pinned memory lets the copy run beside what the device does."""
    staging = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
    np.copyto(staging.numpy(), pixels)
    return staging.to(device, non_blocking=True)
