"""Layered scenes: objects rendered alone in their place, then composed in any combination.

A full render costs a tenth of a second; composing one from layers about a millisecond. For each
of a few hundred views the bank holds the empty table and some thirty objects, each rendered alone
in that very view with its own shadow and depth. Any subset of them that does not collide makes a
new scene: shadows multiply, the nearest depth wins. What a composite lacks is one object's shadow
on another.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from librobot_vlm_ros.tabletop.labels import COLOURED_KINDS, COLOURS, PLAIN_KINDS
from librobot_vlm_ros.tabletop.scenes import (
    MAX_OBJECTS,
    Scene,
    random_placement,
    random_view,
    save_arrays,
    scene_of,
    set_stage,
)  # fmt: skip
from librobot_vlm_ros.tabletop.world import World


@dataclass(frozen=True)
class Layer:
    """One object alone: crop at (top, left), rgb uint8 [h, w, 3], mask, depth float32 [h, w]."""

    label: str
    top: int
    left: int
    rgb: np.ndarray
    mask: np.ndarray
    depth: np.ndarray
    shade: np.ndarray  # float16 [h, w], what its shadow leaves of the plate's light
    x: float
    y: float
    radius: float


def render_view(world: World, seed: int, layers: int) -> tuple[np.ndarray, list[Layer]]:
    """The plate uint8 [H, W, 3] and ``layers`` objects of the view of a seed."""
    rng = np.random.default_rng([seed, 7])
    view = random_view(rng)
    set_stage(world, view)
    empty = world.render(view.camera, view.light)
    every: list[tuple[str, str | None]] = [(k, c) for k in COLOURED_KINDS for c in COLOURS]
    every += [(kind, None) for kind in PLAIN_KINDS] * 2
    found: list[Layer] = []
    for index in rng.permutation(len(every))[:layers]:
        kind, colour = every[index]
        placement = random_placement(rng, world, view.camera, kind, colour)
        if placement is None:
            continue
        body = world.place(kind, colour, placement.pose, placement.tint)
        alone = world.render(view.camera, view.light)
        world.hide_last(kind, body)
        mask = alone.body == body
        changed = mask | (np.abs(alone.rgb.astype(int) - empty.rgb).max(-1) > 2)
        ys, xs = np.nonzero(changed)
        if mask.sum() < 40:
            continue
        top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
        crop = (slice(top, bottom), slice(left, right))
        before = empty.rgb[crop].astype(np.float32).sum(-1) + 1
        shade = np.clip((alone.rgb[crop].astype(np.float32).sum(-1) + 1) / before, 0, 1)
        found.append(Layer(
            placement.label, int(top), int(left), alone.rgb[crop].copy(), mask[crop].copy(),
            alone.depth[crop].astype(np.float32), shade.astype(np.float16), placement.pose.x,
            placement.pose.y, placement.radius,
        ))  # fmt: skip
    return empty.rgb, found


def compose(
    plate: np.ndarray, layers: list[Layer], rng: np.random.Generator, tries: int = 20
) -> Scene | None:
    """A scene of 1 to 6 of the layers, or None where no free combination was found in ``tries``."""
    for _ in range(tries):
        count = int(rng.integers(1, MAX_OBJECTS + 1))
        chosen: list[Layer] = []
        for index in rng.permutation(len(layers)):
            layer = layers[index]
            clash = any(
                layer.label == other.label
                or math.hypot(layer.x - other.x, layer.y - other.y)
                < layer.radius + other.radius + 0.004
                for other in chosen
            )
            if not clash:
                chosen.append(layer)
            if len(chosen) == count:
                break
        scene = _paint(plate, chosen)
        if scene is not None:
            return scene
    return None


def _paint(plate: np.ndarray, chosen: list[Layer]) -> Scene | None:
    height, width = plate.shape[:2]
    shade = np.ones((height, width, 1), np.float32)
    nearest = np.full((height, width), np.inf, np.float32)
    owner = np.full((height, width), -1, np.int8)
    colour = np.zeros_like(plate)
    for number, layer in enumerate(chosen):
        h, w = layer.mask.shape
        at = (slice(layer.top, layer.top + h), slice(layer.left, layer.left + w))
        shade[at] *= np.where(layer.mask, 1, layer.shade)[..., None]
        front = layer.mask & (layer.depth < nearest[at])
        nearest[at][front] = layer.depth[front]
        owner[at][front] = number
        colour[at][front] = layer.rgb[front]
    masks = [owner == number for number in range(len(chosen))]
    rgb = np.where((owner >= 0)[..., None], colour, (plate * shade).astype(np.uint8))
    own_pixels = [int(layer.mask.sum()) for layer in chosen]
    return scene_of(rgb, [layer.label for layer in chosen], masks, own_pixels)


class Bank:
    """Views kept in a folder, one ``view_NNNNN.npz`` each; loaded into memory whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.views: dict[Path, tuple[np.ndarray, list[Layer]]] = {}

    def refresh(self) -> None:
        """Load the views that have been written since."""
        for path in sorted(self.folder.glob("view_*.npz")):
            if path not in self.views:
                self.views[path] = load_view(path)

    def draw(self, rng: np.random.Generator) -> Scene:
        """A composed scene of a random view."""
        views = list(self.views.values())
        while True:
            plate, layers = views[int(rng.integers(len(views)))]
            scene = compose(plate, layers, rng) if layers else None
            if scene is not None:
                return scene


def save_view(path: Path, plate: np.ndarray, layers: list[Layer]) -> None:
    """Write a view."""
    arrays: dict[str, np.ndarray] = {"plate": plate}
    for number, layer in enumerate(layers):
        arrays[f"rgb{number}"], arrays[f"mask{number}"] = layer.rgb, layer.mask
        arrays[f"depth{number}"], arrays[f"shade{number}"] = layer.depth, layer.shade
    arrays["meta"] = np.array([(v.top, v.left, v.x, v.y, v.radius) for v in layers], np.float64)
    arrays["labels"] = np.array([layer.label for layer in layers], dtype="U32")
    save_arrays(path, arrays)


def load_view(path: Path) -> tuple[np.ndarray, list[Layer]]:
    """Read what ``save_view`` wrote (no pickle inside)."""
    with np.load(path, allow_pickle=False) as file:
        layers = [
            Layer(str(label), int(m[0]), int(m[1]), file[f"rgb{n}"], file[f"mask{n}"],
                  file[f"depth{n}"], file[f"shade{n}"], float(m[2]), float(m[3]), float(m[4]))
            for n, (label, m) in enumerate(zip(file["labels"], file["meta"], strict=True))
        ]  # fmt: skip
        return file["plate"], layers


def main() -> None:
    """Render the bank: ``python -m librobot_vlm_ros.tabletop.layers --out DIR --views N``."""
    parser = argparse.ArgumentParser(description="Render layered views of the tabletop.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, default=300)
    parser.add_argument("--layers", type=int, default=30, help="objects rendered alone a view")
    parser.add_argument("--first", type=int, default=0, help="seed of the first view")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    world = World()
    for seed in range(args.first, args.first + args.views):
        path = args.out / f"view_{seed:05d}.npz"
        if path.exists():
            continue  # resumed
        plate, layers = render_view(world, seed, args.layers)
        save_view(path, plate, layers)
        if seed % 10 == 0:
            print(f"view {seed}: {len(layers)} layers", flush=True)


if __name__ == "__main__":
    main()
