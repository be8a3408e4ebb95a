"""Images to pixel tensors as the published image processors do it, without torchvision."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from librobot_vlm_ros.core import ErrorCode, Frame, ImageError, RequestError
from librobot_vlm_ros.models.configuration import unreadable

#: What the option `resize` of a model may be.
RESIZE = ("auto", "exact", "fast")

# The filters that torch has too, antialiased; Pillow's are the others.
_MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
_CPU = torch.device("cpu")
_streams = threading.local()


@dataclass(frozen=True)
class Resizing:
    """How images are resized, and where."""

    fast: bool = False
    device: torch.device = _CPU


EXACT = Resizing()


def resizing(
    how: str, device: torch.device, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Resizing:
    """What the option `resize` means for a model on `device` that resizes by that filter.

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
    """uint8 [H, W, 3] to [height, width, 3], proportions not kept.

    An array, or a tensor on `how.device` where that is CUDA. `fast` leaves the channels one after
    the other in memory, as the model takes them.
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

    Rounded between the passes, halves up, as Pillow does: else every fifth value differs by one.
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
    """Whether Pillow resizes the rows first, because that spares work."""
    return height < size[0] and width > size[1]


@contextmanager
def ahead_of(device: torch.device) -> Iterator[None]:
    """For prefetching: on CUDA the block runs on a stream of the calling thread, beside the model's
    own, and is done when it ends.
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
    resized: npt.NDArray[np.uint8] = image[0].permute(1, 2, 0).numpy()
    return resized


def writable(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The same bytes, marked writable: torch warns of others. Do not write to them.

    A frame's pixels are read-only, and copying them takes a sixth of the time of resizing them.
    """
    if pixels.flags.writeable:
        return pixels
    same: npt.NDArray[np.uint8] = np.asarray(_Writable(pixels))
    return same


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


#: Mean and standard deviation of ImageNet, in the order red, green, blue.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: What CLIP was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILE = "preprocessor_config.json"
#: Bounds of a mean or deviation, far beyond those of colours from 0 to 1 or to 255: what they make
#: of a pixel stays a number in every dtype.
_SMALLEST, _LARGEST = 1e-4, 1e4


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes a tensor."""

    #: Rows and columns of the model's input, in pixels.
    height: int
    width: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def to_json(self) -> dict[str, Any]:
        """The settings as preprocessor_config.json holds them."""
        return {
            "do_resize": True,
            "size": {"height": self.height, "width": self.width},
            "resample": int(self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_center_crop": False,
        }


def image_settings(config: dict[str, Any]) -> ImageSettings:
    """The settings of a preprocessor_config.json. Raises ModelError BAD_CONFIG."""
    with unreadable(
        f"{_FILE} cannot be used",
        "it needs size {height, width}, image_mean and image_std of three numbers each",
    ):
        size = config["size"]
        height, width = int(size["height"]), int(size["width"])
        if height < 1 or width < 1:
            raise ValueError(f"size {height}x{width}")
        mean, std = channels(config["image_mean"]), deviations(config["image_std"])
        resample = Image.Resampling(int(config.get("resample", 3)))
    return ImageSettings(height, width, mean, std, resample)


def channels(values: Any) -> tuple[float, float, float]:
    """A number for each of red, green and blue. Raises TypeError or ValueError otherwise."""
    red, green, blue = (float(value) for value in values)
    if not all(abs(value) <= _LARGEST for value in (red, green, blue)):  # NaN is refused, too
        raise ValueError(f"{values} are no means or deviations of a colour")
    return red, green, blue


def deviations(values: Any) -> tuple[float, float, float]:
    """Like `channels`, of numbers to divide by."""
    found = channels(values)
    if min(found) < _SMALLEST:
        raise ValueError(f"image_std {values}")
    return found


def squash(pixels: npt.NDArray[np.uint8], settings: ImageSettings, how: Resizing = EXACT) -> Any:
    """uint8 [H, W, 3] of any size to [settings.height, settings.width, 3], proportions not kept.

    An array, or a tensor where `how` resizes on CUDA.
    """
    return resize(pixels, settings.height, settings.width, settings.resample, how)


def normalise(
    images: Sequence[Any],
    settings: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """uint8 [H, W, 3] arrays or tensors of one size to [B, 3, H, W] on the device.

    x / 255, minus mean, divided by std, in float32, in place: the planes are laid out once and
    nothing is copied after that. `settings` has `mean` and `std`.
    """
    height, width = images[0].shape[:2]
    values = torch.empty((len(images), 3, height, width), dtype=torch.float32, device=device)
    for place, image in enumerate(images):
        values[place].copy_(_planes(image, device))
    for channel, (mean, std) in enumerate(zip(settings.mean, settings.std, strict=True)):
        values[:, channel].mul_(1 / 255).sub_(mean).div_(std)
    return values.to(dtype)


def _planes(image: Any, device: torch.device) -> Tensor:
    """uint8 [3, H, W] on the device; of an array in the machine's memory, channel by channel."""
    if isinstance(image, Tensor):
        if image.is_cuda:  # made on another stream: its memory is ours until this one is done
            image.record_stream(torch.cuda.current_stream(image.device))
        return image.permute(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(writable(image).transpose(2, 0, 1))).to(device)


def as_pixels(image: Any) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] from a Frame, a PIL image, or uint8 array or tensor, channels first or last.

    Raises ImageError BAD_IMAGE.
    """
    if isinstance(image, Frame):
        return image.pixels
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array: Any = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    found = type(image).__name__
    if isinstance(array, np.ndarray):
        found = f"{array.dtype} {list(array.shape)}"
        if array.dtype == np.uint8 and array.ndim == 3 and 3 in (array.shape[0], array.shape[2]):
            pixels: npt.NDArray[np.uint8]
            pixels = array if array.shape[2] == 3 else array.transpose(1, 2, 0)
            return pixels
    raise ImageError(
        ErrorCode.BAD_IMAGE,
        f"an image is {found}",
        "expected a Frame, a PIL image or uint8 [H, W, 3] or [3, H, W]",
    )


def image_rows(images: Any) -> list[list[Any]]:
    """Anything that holds images as rows of single ones, several where a row has views.

    An image (a Frame, a PIL image, an array or tensor of three dimensions) is a row of its own; a
    list and the first dimension of a larger array is the batch, and in it a list or an array of
    four dimensions are the views of a row. Raises ImageError BAD_IMAGE for rows without images.
    """
    if _is_array(images) and images.ndim > 3:
        images = list(images)
    if not isinstance(images, (list, tuple)):
        images = [images]
    rows = [
        list(row) if isinstance(row, (list, tuple)) or (_is_array(row) and row.ndim == 4) else [row]
        for row in images
    ]
    if not rows or not all(rows):
        raise ImageError(ErrorCode.BAD_IMAGE, "there is a row without an image")
    return rows


def to_views(
    images: Any,
    settings: ImageSettings,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Callable[[Any], Any] | None = None,
) -> Tensor:
    """Anything that holds images (see `image_rows`) to [B, views, 3, H, W], ready for the model.

    Float tensors count as normalised already and keep their size, [3, H, W] each. Others are
    brought to the model's size by `prepare` (None: `squash`), and normalised. Raises ImageError
    BAD_IMAGE.
    """
    rows = image_rows(images)
    counts = {len(row) for row in rows}
    if len(counts) != 1:
        raise ImageError(
            ErrorCode.BAD_IMAGE, f"rows of {sorted(counts)} views", "give each row as many views"
        )
    flat = [image for row in rows for image in row]
    if all(isinstance(image, Tensor) and image.is_floating_point() for image in flat):
        shapes = sorted({tuple(image.shape) for image in flat})
        if len(shapes) > 1 or len(shapes[0]) != 3 or shapes[0][0] != 3 or 0 in shapes[0]:
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"float images are {' and '.join(str(list(shape)) for shape in shapes)}",
                "expected [B, 3, H, W] or [B, views, 3, H, W], normalised",
            )
        tensor = torch.stack(flat).to(device, dtype)
    else:
        squashed = prepare or (lambda pixels: squash(pixels, settings))
        prepared = [squashed(as_pixels(image)) for image in flat]
        tensor = normalise(prepared, settings, device, dtype)
    return tensor.unflatten(0, (len(rows), counts.pop()))


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))
