"""Images as InternVL2 takes them: cut into square tiles, and seen once more as a whole.

The arithmetic of the original `dynamic_preprocess` (OpenGVLab/InternVL), without torchvision: of
all grids of `min_tiles` to `max_tiles` tiles the one whose proportions come closest; the image is
stretched over it, cut, and a thumbnail of all of it comes last where there is more than one tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from librobot_vlm_ros.core import ErrorCode, ImageError, ModelError
from librobot_vlm_ros.models.config_values import unreadable
from librobot_vlm_ros.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, channels, deviations
from librobot_vlm_ros.models.resize import EXACT, Resizing, resize

__all__ = ["InternVLImages", "float_tiles", "grid", "internvl_images", "tiles"]

#: The published models were tried with up to 40 tiles.
_MOST_TILES = 40


@dataclass(frozen=True)
class InternVLImages:
    """How an image becomes tiles."""

    #: Pixels of a tile's side.
    side: int
    max_tiles: int = 12
    min_tiles: int = 1
    thumbnail: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        counts = (self.min_tiles, self.max_tiles)
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in counts)
        if not whole or not 1 <= self.min_tiles <= self.max_tiles <= _MOST_TILES:
            raise ModelError(
                ErrorCode.BAD_CONFIG,
                f"an image may become {self.min_tiles} to {self.max_tiles} tiles",
                f"expected 1 <= min_tiles <= max_tiles <= {_MOST_TILES}",
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as transformers' InternVL folders hold them in preprocessor_config.json."""
        return {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": True,
            "min_patches": self.min_tiles,
            "max_patches": self.max_tiles,
            "use_thumbnail": self.thumbnail,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.side, "width": self.side},
            "resample": int(self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def internvl_images(
    config: dict[str, Any], stated: dict[str, Any], default: InternVLImages
) -> InternVLImages:
    """The settings of a folder, from config.json and preprocessor_config.json ({} without one).

    The official config.json states tiles, transformers' preprocessor_config.json patches; what
    neither states is as in `default`. Raises ModelError BAD_CONFIG.
    """
    if config.get("pad2square"):
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            "config.json asks for images padded to squares (pad2square)",
            "InternVL2 was published without it: use the files that came with the weights",
        )
    most = config.get("max_dynamic_patch", stated.get("max_patches", default.max_tiles))
    least = config.get("min_dynamic_patch", stated.get("min_patches", default.min_tiles))
    if config.get("dynamic_image_size") is False:
        most = least = 1
    size = stated.get("size", default.side)
    with unreadable(
        "preprocessor_config.json cannot be used",
        "it needs size, image_mean and image_std of three numbers each",
    ):
        sides = {*size.values()} if isinstance(size, dict) else {size}
        found = InternVLImages(
            side=default.side,
            max_tiles=most,
            min_tiles=least,
            thumbnail=bool(
                config.get("use_thumbnail", stated.get("use_thumbnail", default.thumbnail))
            ),
            mean=channels(stated.get("image_mean", default.mean)),
            std=deviations(stated.get("image_std", default.std)),
            resample=Image.Resampling(int(stated.get("resample", default.resample))),
        )
    if sides != {default.side}:
        raise ModelError(
            ErrorCode.BAD_CONFIG,
            f"preprocessor_config.json states tiles of {sorted(map(str, sides))} pixels, "
            f"config.json of {default.side}",
            "use the files that came with the weights",
        )
    return found


@functools.lru_cache(maxsize=8)
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Columns and rows of every grid, those of fewer tiles first.

    The original takes grids of one size in the order of a Python set. The order among them makes
    no difference where one tile is allowed: between a grid and another of its size there is always
    a third that comes closer.
    """
    found = (
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if columns * rows >= least
    )
    return tuple(sorted(found, key=lambda shape: shape[0] * shape[1]))


def grid(width: int, height: int, images: InternVLImages) -> tuple[int, int]:
    """Columns and rows of the tiles that a width x height image becomes, no thumbnail counted.

    Among grids of equal proportions a larger one is taken where the image has more than half of
    its pixels. Compared as floats, like the original. Raises ImageError BAD_IMAGE for an image
    without pixels.
    """
    if min(width, height) < 1:
        raise ImageError(ErrorCode.BAD_IMAGE, f"an image of {width}x{height} pixels has none")
    wanted = width / height
    best, smallest = (1, 1), float("inf")
    for columns, rows in _grids(images.min_tiles, images.max_tiles):
        apart = abs(wanted - columns / rows)
        if apart < smallest:
            best, smallest = (columns, rows), apart
        elif apart == smallest and width * height > 0.5 * images.side**2 * columns * rows:
            best = (columns, rows)
    return best


def tiles(
    pixels: npt.NDArray[np.uint8], images: InternVLImages, how: Resizing = EXACT
) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] of any size to tiles [N, side, side, 3], row by row, the thumbnail last.

    Resized in the machine's memory, `fast` or not: the tiles are cut there.
    """
    how = replace(how, device=torch.device("cpu"))
    columns, rows = grid(pixels.shape[1], pixels.shape[0], images)
    side = images.side
    whole = resize(pixels, rows * side, columns * side, images.resample, how)
    cells = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    if len(cells) > 1 and images.thumbnail:
        small = resize(pixels, side, side, images.resample, how)
        cells = np.concatenate([cells, small[None]])
    return np.asarray(cells)


def float_tiles(image: Tensor, images: InternVLImages) -> Tensor:
    """A normalised image [3, H, W] of any size to tiles [N, 3, side, side], as `tiles` does it.

    Gradients pass through. Values are resized as they are, not rounded to 256 levels before.
    """
    columns, rows = grid(image.shape[2], image.shape[1], images)
    side = images.side

    def resized(height: int, width: int) -> Tensor:
        if image.shape[1:] == (height, width):
            return image
        return functional.interpolate(
            image[None].to(torch.float32), (height, width), mode="bicubic", antialias=True
        )[0]

    whole = resized(rows * side, columns * side)
    cells = whole.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
    if len(cells) > 1 and images.thumbnail:
        cells = torch.cat([cells, resized(side, side)[None].to(cells.dtype)])
    return cells
