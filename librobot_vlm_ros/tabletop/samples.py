"""Training samples: a frame as the model sees it, its dense targets, and its objects.

Frames come from composed layers or from full renders; both are jittered here in the same way
(mirrored, cropped around all objects, light and noise) and squashed to the model's square with
Pillow's bicubic filter, which is what the model's preprocessing does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset

from librobot_vlm_ros.tabletop.labels import COLOURS, KINDS
from librobot_vlm_ros.tabletop.layers import Bank
from librobot_vlm_ros.tabletop.network import CELLS, IMAGE_SIZE

_COLOUR_NAMES = list(COLOURS)
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class Sample:
    """pixels uint8 [S, S, 3]; labels; boxes float32 [n, 4] in 0..1 of the frame, left to right;
    owner int8 [CELLS, CELLS] object of each cell (-1 none, -2 undecided); the same at stride 8."""

    pixels: np.ndarray
    labels: tuple[str, ...]
    boxes: np.ndarray
    owner: np.ndarray
    owner8: np.ndarray


def kind_and_colour(label: str) -> tuple[int, int]:
    """(kind, colour) as class numbers; kind from 1 (0 is background), colour -1 for plain kinds."""
    first, _, rest = label.partition(" ")
    if first in COLOURS:
        return KINDS.index(rest) + 1, _COLOUR_NAMES.index(first)
    return KINDS.index(label) + 1, -1


def _owners(masks: list[np.ndarray], cells: int) -> np.ndarray:
    """Which object owns each cell: the one covering most of it, where that is 30 % or more."""
    shares = np.stack(
        [
            cv2.resize(m.astype(np.float32), (cells, cells), interpolation=cv2.INTER_AREA)
            for m in masks
        ]
    )
    best, top = shares.argmax(0), shares.max(0)
    owner = np.where(top >= 0.3, best, np.where(top > 0.08, -2, -1)).astype(np.int8)
    for number in range(len(masks)):  # every object has a cell of its own, however small it is
        if not (owner == number).any():
            owner[np.unravel_index(shares[number].argmax(), owner.shape)] = number
    return owner


def jitter(
    rgb: np.ndarray, labels: list[str], boxes: np.ndarray, masks: list[np.ndarray],
    rng: np.random.Generator, strong: bool = True,
) -> Sample:  # fmt: skip
    """A sample from a frame uint8 [H, W, 3], boxes [n, 4] in pixels and masks [H, W]."""
    height, width = rgb.shape[:2]
    boxes = boxes.astype(np.float32).copy()
    if strong and rng.random() < 0.5:
        rgb, masks = rgb[:, ::-1], [mask[:, ::-1] for mask in masks]
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    x0, y0, x1, y1 = 0, 0, width, height
    if strong and rng.random() < 0.6:
        left, top = boxes[:, 0].min(), boxes[:, 1].min()
        right, bottom = boxes[:, 2].max(), boxes[:, 3].max()
        x0 = int(rng.uniform(0, max(0.0, min(left - 2, width * 0.2)) + 1e-3))
        y0 = int(rng.uniform(0, max(0.0, min(top - 2, height * 0.2)) + 1e-3))
        x1 = int(np.ceil(rng.uniform(min(width, max(right + 2, width * 0.8)), width)))
        y1 = int(np.ceil(rng.uniform(min(height, max(bottom + 2, height * 0.8)), height)))
    crop = (slice(y0, y1), slice(x0, x1))
    rgb, masks = np.ascontiguousarray(rgb[crop]), [np.ascontiguousarray(m[crop]) for m in masks]
    boxes = (boxes - [x0, y0, x0, y0]) / [x1 - x0, y1 - y0, x1 - x0, y1 - y0]
    square = (IMAGE_SIZE, IMAGE_SIZE)
    small = np.asarray(Image.fromarray(rgb).resize(square, Image.Resampling.BICUBIC))
    if strong:
        small = _relight(small, rng)
    centre = boxes[:, 0] + boxes[:, 2]
    order = np.argsort(centre, kind="stable")
    masks = [masks[i] for i in order]
    return Sample(
        small, tuple(labels[i] for i in order), np.clip(boxes[order], 0, 1).astype(np.float32),
        _owners(masks, CELLS), _owners(masks, CELLS * 2),
    )  # fmt: skip


def _relight(small: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    level = rng.uniform(0.8, 1.15) * rng.uniform(0.95, 1.05, 3)
    light = np.clip(small * level.astype(np.float32) + rng.uniform(-8, 8), 0, 255)
    if rng.random() < 0.5:
        light += rng.normal(0, rng.uniform(0, 6), small.shape).astype(np.float32)
    light = np.clip(light, 0, 255).astype(np.uint8)
    if rng.random() < 0.15:
        light = cv2.GaussianBlur(light, (3, 3), 0.6)
    if rng.random() < 0.2:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(55, 95))]
        jpeg = cv2.imencode(".jpg", light, quality)[1]
        return np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))
    return light


class FrameStream(IterableDataset):
    """An endless, seeded stream of samples; ``renders`` (full frames) are mixed in by ``share``."""

    def __init__(
        self, bank: Path, seed: int, renders: Path | None = None, share: float = 0.0
    ) -> None:
        self.bank, self.seed, self.renders, self.share = bank, seed, renders, share

    def __iter__(self) -> Iterator[Sample]:
        rng = np.random.default_rng(self.seed)
        bank = Bank(self.bank)
        files: list[Path] = []
        drawn = 0
        while True:
            if drawn % 2000 == 0:
                bank.refresh()
                files = sorted(self.renders.glob("frame_*.npz")) if self.renders else []
            drawn += 1
            if files and rng.random() < self.share:
                with np.load(files[int(rng.integers(len(files)))], allow_pickle=False) as file:
                    owner = file["owner"]
                    masks = [owner == n for n in range(len(file["labels"]))]
                    labels = [str(label) for label in file["labels"]]
                    yield jitter(file["rgb"], labels, file["boxes"], masks, rng)
                continue
            scene = bank.draw(rng)
            boxes = np.array([item.box for item in scene.objects])
            labels = [item.label for item in scene.objects]
            yield jitter(scene.rgb, labels, boxes, list(scene.masks), rng)
