"""Images to pixel tensors, as the published image processors do it, without torchvision.

Resizing is antialiased bicubic on uint8, the arithmetic that the models were trained with (see
`resize.py` for how exactly); then x / 255, minus mean, divided by std, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from librobot_vlm_ros.core import ErrorCode, Frame, ImageError
from librobot_vlm_ros.models.config_values import unreadable
from librobot_vlm_ros.models.resize import EXACT, Resizing, resize, writable

__all__ = [
    "ImageSettings",
    "as_pixels",
    "channels",
    "deviations",
    "image_settings",
    "normalise",
    "squash",
    "to_views",
]

#: Mean and standard deviation of ImageNet, in the order red, green, blue.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
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
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 3:
        if array.shape[2] == 3:
            return array
        if array.shape[0] == 3:
            return array.transpose(1, 2, 0)
    found = (
        f"{array.dtype} {list(array.shape)}"
        if isinstance(array, np.ndarray)
        else type(image).__name__
    )
    raise ImageError(
        ErrorCode.BAD_IMAGE,
        f"an image is {found}",
        "expected a Frame, a PIL image or uint8 [H, W, 3] or [3, H, W]",
    )


def to_views(
    images: Any, settings: ImageSettings, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Anything that holds images to [B, views, 3, H, W], ready for the model.

    Float tensors [3, H, W], [B, 3, H, W] or [B, views, 3, H, W] count as normalised already and
    keep their size. uint8 tensors and arrays, PIL images, Frames,
    and lists of them are resized and normalised; a list of lists is a batch of views.
    Raises ImageError BAD_IMAGE.
    """
    if isinstance(images, Tensor) and images.is_floating_point():
        if images.dim() not in (3, 4, 5) or images.shape[-3] != 3 or not images.numel():
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"float images are {list(images.shape)}",
                "expected [B, 3, H, W] or [B, views, 3, H, W], normalised",
            )
        while images.dim() < 4:
            images = images[None]
        images = images if images.dim() == 5 else images[:, None]
        return images.to(device, dtype)
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim > 3:
        images = list(images)
    if not isinstance(images, (list, tuple)):
        images = [images]
    if images and isinstance(images[0], Tensor) and images[0].is_floating_point():
        return to_views(torch.stack(list(images)), settings, device, dtype)
    rows = [_views(row) for row in images]
    counts = {len(row) for row in rows}
    if len(counts) != 1 or 0 in counts:
        raise ImageError(
            ErrorCode.BAD_IMAGE, f"rows of {sorted(counts)} views", "give each row as many views"
        )
    flat = [squash(as_pixels(image), settings) for row in rows for image in row]
    tensor = normalise(flat, settings, device, dtype)
    return tensor.unflatten(0, (len(rows), counts.pop()))


def _views(row: Any) -> list[Any]:
    """The views of one row: a list, the first dimension of a 4-D array, or one image alone."""
    if isinstance(row, (list, tuple)):
        return list(row)
    if isinstance(row, (Tensor, np.ndarray)) and row.ndim == 4:
        return list(row)
    return [row]
