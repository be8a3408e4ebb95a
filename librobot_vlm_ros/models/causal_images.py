"""Images as rows of vectors, also where each image becomes as many vectors as its size asks for.

What a family overrides: `_pixels` brings one image into the family's own prepared form, `_count`
says how many vectors that becomes, `_see_all` computes them. A family of one size gives `_see`
alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from librobot_vlm_ros.core import ErrorCode, ImageError
from librobot_vlm_ros.models.making import Making
from librobot_vlm_ros.models.preprocess import as_pixels, normalise, to_views

__all__ = ["CausalImages", "Seen", "joined", "vectors_of"]


@dataclass(frozen=True)
class Seen:
    """What the vision side gives for one row of a batch: one image, or several views of it."""

    #: [N, D], the images one after the other.
    vectors: Tensor
    #: Vectors of each image, in order; their sum is N.
    counts: tuple[int, ...]
    #: What the family needs to number the places of each image, such as its grid.
    shapes: tuple[Any, ...] = ()
    #: [N, D] each: added to the image's places behind the first layers of the language model.
    deep: tuple[Tensor, ...] = ()


def joined(parts: Sequence[Seen]) -> Seen:
    """Several images as one row."""
    if len(parts) == 1:
        return parts[0]
    return Seen(
        torch.cat([part.vectors for part in parts]),
        tuple(count for part in parts for count in part.counts),
        tuple(shape for part in parts for shape in part.shapes),
        tuple(torch.cat(layer) for layer in zip(*(part.deep for part in parts), strict=True)),
    )


def vectors_of(rows: Sequence[Seen]) -> Tensor:
    """[B, N, D], rows of fewer vectors padded with zeros at the end."""
    return pad_sequence([row.vectors for row in rows], batch_first=True)


class CausalImages(Making):
    """The seeing half of `CausalTensors`."""

    images: Any
    #: Whether every image is brought to images.height x images.width.
    one_size = True

    # What a family fills in.

    @abstractmethod
    def _pixels(self, pixels: Any) -> Any:
        """uint8 [H, W, 3] of any size to the prepared form.

        Of a family of one size: uint8 [images.height, images.width, 3].
        """

    @property
    def image_tokens(self) -> int:
        """Vectors N that an image becomes, where all become as many."""
        raise NotImplementedError(f"{type(self).__name__} needs image_tokens or _count")

    def _count(self, prepared: Any) -> int:
        """Vectors N that a prepared image becomes."""
        return self.image_tokens

    def _shape(self, prepared: Any) -> Any:
        """What `_places` needs to know of a prepared image, see `Seen.shapes`."""
        return None

    def _see(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] to projected features [B, N, D], of a family of one size."""
        raise NotImplementedError(f"{type(self).__name__} needs _see or _see_all")

    def _see_all(self, prepared: Sequence[Any]) -> list[Tensor]:
        """Projected features [N_i, D] of each prepared image."""
        pixels = normalise(prepared, self.images, self.torch_device, self.torch_dtype)
        return list(self._see(pixels))

    def _look(self, prepared: Sequence[Any]) -> list[Seen]:
        """`_see_all` with what belongs to it; overridden where there are features a layer."""
        return [
            Seen(vectors, (len(vectors),), (self._shape(image),))
            for image, vectors in zip(prepared, self._see_all(prepared), strict=True)
        ]

    def _prepared(self, image: Tensor) -> Any:
        """A float image [3, H, W], normalised already, in the prepared form.

        Of a family of many sizes. Raises ImageError BAD_IMAGE for a size that it cannot take.
        """
        raise NotImplementedError(f"{type(self).__name__} needs _prepared")

    # What follows from it.

    def encode_image(self, images: Any) -> Tensor:
        """[B, N, D]; of several views the tokens stand one view after the other.

        Where images of a batch become different numbers of vectors, N is the largest, and the rows
        of others are padded with zeros at the end.
        """
        return vectors_of(self._seen(images))

    def _seen(self, images: Any) -> list[Seen]:
        """What is seen in each row of anything that holds images (see `encode_image`)."""
        if not self.one_size:
            rows = self._prepared_rows(images)
            found = iter(self._look([image for row in rows for image in row]))
            return [joined([next(found) for _ in row]) for row in rows]
        views = to_views(self._fitted(images), self.images, self.torch_device, self.torch_dtype)
        height, width = views.shape[-2:]
        if (height, width) != (self.images.height, self.images.width):
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"normalised images are {height}x{width}",
                f"{self.name} takes {self.images.height}x{self.images.width}; uint8 images of any "
                "size are resized",
            )
        features = self._see(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return [joined([Seen(view, (len(view),), (None,)) for view in row]) for row in features]

    def _prepared_rows(self, images: Any) -> list[list[Any]]:
        """Prepared images, a list of views a row; each of its own size.

        Float tensors [3, H, W], [B, 3, H, W] or [B, views, 3, H, W] count as normalised. Raises
        ImageError BAD_IMAGE.
        """
        if _is_array(images) and images.ndim > 3:
            images = list(images)
        if not isinstance(images, (list, tuple)):
            images = [images]
        rows = []
        for row in images:
            several = isinstance(row, (list, tuple)) or (_is_array(row) and row.ndim == 4)
            rows.append([self._prepare_one(image) for image in (row if several else [row])])
        if not rows or not all(rows):
            raise ImageError(ErrorCode.BAD_IMAGE, "there is a row without an image")
        return rows

    def _prepare_one(self, image: Any) -> Any:
        if not isinstance(image, Tensor) or not image.is_floating_point():
            return self._pixels(as_pixels(image))
        if image.dim() != 3 or image.shape[0] != 3:
            raise ImageError(
                ErrorCode.BAD_IMAGE,
                f"a float image is {list(image.shape)}",
                "expected [3, H, W], normalised",
            )
        return self._prepared(image)

    def _fitted(self, images: Any) -> Any:
        """The same lists of images, all of those in uint8 brought to the model's size."""
        if isinstance(images, Tensor) and images.is_floating_point():
            return images
        if (_is_array(images) and images.ndim > 3) or isinstance(images, (list, tuple)):
            return [self._fitted(image) for image in images]
        return self._pixels(as_pixels(images))


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))
