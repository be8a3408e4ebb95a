"""Random tabletop scenes: seeded, repeatable, with ground truth from the segmentation mask.

``random_view`` draws what stays the same in a scene (camera, light, table, clutter, arm),
``random_placement`` one object of it, ``render_scene`` a whole frame with its objects. Run as a
program it keeps whole frames as files, for the last stage of training.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from librobot_vlm_ros.tabletop.labels import COLOURED_KINDS, COLOURS, PLAIN_KINDS, label_of
from librobot_vlm_ros.tabletop.world import (
    SHAPES,
    TABLE_TOP,
    Camera,
    Light,
    Pose,
    World,
    shape_extent,
)

#: Training renders take their seeds from here on; evaluation and the shipped bag stay below.
FIRST_TRAINING_SEED = 10_000_000
MAX_OBJECTS = 6
MIN_VISIBLE = 0.6  # share of an object's own pixels that must be seen, or the scene is drawn anew
MIN_SIDE = 9  # pixels of the box's shorter side at 320x240


@dataclass(frozen=True)
class View:
    """All of a scene but its objects."""

    camera: Camera
    light: Light
    table_rgb: tuple[float, float, float]
    floor_rgb: tuple[float, float, float]
    mat_rgb: tuple[float, float, float] | None
    slabs: tuple[tuple[tuple[float, float, float], tuple[float, float], float, float], ...]
    arm: tuple[tuple[float, float, float], float, tuple[float, ...]] | None


@dataclass(frozen=True)
class Placement:
    """One object: what it is, where it stands, how bright it is painted, its reach in metres."""

    kind: str
    colour: str | None
    pose: Pose
    tint: float
    radius: float

    @property
    def label(self) -> str:
        """The object's label, such as ``"red cube"``."""
        return label_of(self.kind, self.colour)


@dataclass(frozen=True)
class SceneObject:
    """Ground truth: label and box (x_min, y_min, x_max, y_max) in pixels."""

    label: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A frame: rgb uint8 [H, W, 3], the objects in it, left to right, and in that order each one's
    mask of visible pixels, bool [H, W].
    """

    rgb: np.ndarray
    objects: tuple[SceneObject, ...]
    masks: tuple[np.ndarray, ...] = ()


def _uniform3(rng: np.random.Generator, low: float, high: float) -> tuple[float, float, float]:
    a, b, c = rng.uniform(low, high, 3)
    return float(a), float(b), float(c)


def _muted(rng: np.random.Generator) -> tuple[float, float, float]:
    """A colour of little saturation, so that a table or mat is not taken for a painted object."""
    grey, spread = rng.uniform(0.25, 1.0), rng.uniform(-0.09, 0.09, 3)
    r, g, b = np.clip(grey + spread, 0.05, 1.0)
    return float(r), float(g), float(b)


def random_view(rng: np.random.Generator) -> View:
    """Draw camera, light, table, clutter and arm."""
    camera = Camera(
        target=(float(rng.uniform(-0.08, 0.08)), float(rng.uniform(-0.08, 0.08)), TABLE_TOP + 0.02),
        distance=float(rng.uniform(0.40, 0.64)), yaw=float(rng.uniform(-180, 180)),
        pitch=float(rng.uniform(-66, -27)), roll=float(rng.normal(0, 2)),
        fov=float(rng.uniform(43, 54)),
    )  # fmt: skip
    azimuth, height = rng.uniform(0, 2 * math.pi), rng.uniform(0.7, 2.5)
    warm = float(rng.uniform(-0.08, 0.08))
    level = float(rng.uniform(0.82, 1.0))
    light = Light(
        direction=(math.cos(azimuth), math.sin(azimuth), float(height)),
        colour=(level * (1 + warm), level, level * (1 - warm)),
        ambient=float(rng.uniform(0.45, 0.7)), diffuse=float(rng.uniform(0.3, 0.6)),
        specular=float(rng.uniform(0.0, 0.3)), shadow=bool(rng.random() < 0.8),
    )  # fmt: skip
    slabs = []
    for _ in range(int(rng.choice([0, 0, 1, 1, 2, 3]))):
        flat = rng.random() < 0.6
        size = (
            (float(rng.choice([0.10, 0.16, 0.22])), float(rng.choice([0.07, 0.12])), 0.006)
            if flat
            else (float(rng.choice([0.14, 0.2])), 0.012, 0.012)
        )
        xy = (float(rng.uniform(-0.35, 0.35)), float(rng.uniform(-0.3, 0.3)))
        slabs.append((size, xy, float(rng.uniform(0, math.pi)), float(rng.uniform(0.35, 0.95))))
    arm = None
    if rng.random() < 0.35:
        side = rng.uniform(0, 2 * math.pi)
        base = (0.62 * math.cos(side), 0.45 * math.sin(side), TABLE_TOP)
        joints = (
            rng.uniform(-0.5, 0.5), rng.uniform(-0.9, -0.1), rng.uniform(-0.3, 0.3),
            rng.uniform(-2.6, -1.9), 0.0, rng.uniform(1.4, 2.4), 0.8,
        )  # fmt: skip
        facing = math.atan2(-base[1], -base[0])
        arm = (base, facing, tuple(float(joint) for joint in joints))
    mat = _muted(rng) if rng.random() < 0.55 else None
    return View(camera, light, _muted(rng), _muted(rng), mat, tuple(slabs), arm)


def set_stage(world: World, view: View) -> None:
    """Clear the world and put up everything of the view but objects."""
    world.clear()
    world.dress(view.table_rgb, view.floor_rgb, view.mat_rgb)
    for size, xy, yaw, grey in view.slabs:
        world.place_slab(size, xy, yaw, (grey, grey * 0.97, grey * 0.93))
    if view.arm is not None:
        base, yaw, joints = view.arm
        world.place_arm(base, yaw, list(joints))


def draw_labels(rng: np.random.Generator, count: int) -> list[tuple[str, str | None]]:
    """Draw ``count`` distinct (kind, colour); coloured kinds twice as often as plain ones."""
    chosen: list[tuple[str, str | None]] = []
    while len(chosen) < count:
        if rng.random() < 0.6:
            pick: tuple[str, str | None] = (
                str(rng.choice(COLOURED_KINDS)), str(rng.choice(list(COLOURS)))
            )  # fmt: skip
        else:
            pick = (str(rng.choice(PLAIN_KINDS)), None)
        if pick not in chosen:
            chosen.append(pick)
    return chosen


def random_placement(
    rng: np.random.Generator, world: World, camera: Camera, kind: str, colour: str | None
) -> Placement | None:
    """Stand an object somewhere in the camera's view, wholly inside the frame; None if no luck."""
    shape = SHAPES[kind]
    for _ in range(40):
        weights = np.array([rest[2] for rest in shape.rests])
        roll, pitch, _ = shape.rests[int(rng.choice(len(weights), p=weights / weights.sum()))]
        euler = (roll, pitch, float(rng.uniform(-math.pi, math.pi)))
        if shape.round:
            euler = _uniform3(rng, -math.pi, math.pi)
        x, y = rng.uniform(-0.30, 0.30), rng.uniform(-0.27, 0.27)
        low, high = shape_extent(kind, euler, world.data)
        corners = np.array(
            [[x + cx, y + cy, TABLE_TOP + cz]
             for cx in (low[0], high[0]) for cy in (low[1], high[1])
             for cz in (0.0, high[2] - low[2])]
        )  # fmt: skip
        pixels = world.project(camera, corners)
        inside = (pixels > 1).all() and (pixels < [world.width - 1, world.height - 1]).all()
        if inside:
            radius = float(np.abs(np.concatenate([low[:2], high[:2]])).max())
            pose = Pose(float(x), float(y), euler)
            return Placement(kind, colour, pose, float(rng.uniform(0.85, 1.0)), radius)
    return None


def too_close(a: Placement, b: Placement) -> bool:
    """Whether two objects would stand into each other (with 4 mm to spare)."""
    reach = a.radius + b.radius + 0.004
    return math.hypot(a.pose.x - b.pose.x, a.pose.y - b.pose.y) < reach


def visible_objects(
    labels: list[str], visible: list[np.ndarray], own_pixels: list[int]
) -> tuple[SceneObject, ...] | None:
    """Ground truth from masks of visible pixels [H, W] and each object's unoccluded pixel count.

    None where an object is too hidden or too small to be asked for: such a scene is drawn anew.
    """
    found = []
    for label, mask, own in zip(labels, visible, own_pixels, strict=True):
        ys, xs = np.nonzero(mask)
        if own == 0 or len(xs) < MIN_VISIBLE * own:
            return None
        box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
        if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
            return None
        found.append(SceneObject(label, box))
    return tuple(sorted(found, key=lambda o: (o.box[0] + o.box[2], o.box[1] + o.box[3])))


def scene_of(
    rgb: np.ndarray, labels: list[str], visible: list[np.ndarray], own_pixels: list[int]
) -> Scene | None:
    """A frame with its `visible_objects`; None where there is one that cannot be asked for."""
    objects = visible_objects(labels, visible, own_pixels)
    if objects is None:
        return None
    by_label = dict(zip(labels, visible, strict=True))
    return Scene(rgb, objects, tuple(by_label[item.label] for item in objects))


def draw_placements(
    world: World, view: View, rng: np.random.Generator, count: int
) -> list[Placement]:
    """Up to ``count`` distinct objects standing clear of each other in the camera's view."""
    placements: list[Placement] = []
    for kind, colour in draw_labels(rng, count):
        for _ in range(8):
            placement = random_placement(rng, world, view.camera, kind, colour)
            if placement is not None and not any(too_close(placement, p) for p in placements):
                placements.append(placement)
                break
    return placements


def render_placements(world: World, view: View, placements: list[Placement]) -> Scene | None:
    """Render objects in a view; None where one is too hidden or too small."""
    set_stage(world, view)
    bodies = [world.place(p.kind, p.colour, p.pose, p.tint) for p in placements]
    full = world.render(view.camera, view.light)
    masks = [full.body == body for body in bodies]
    crowd = set(bodies) | ({world.arm} if world.arm is not None else set())
    # How much of an object is hidden shows only in a render of it alone; that is made only where
    # something else borders it.
    own = [
        _own_pixels(world, view, placement) if _touched(full.body, body, crowd) else int(mask.sum())
        for placement, body, mask in zip(placements, bodies, masks, strict=True)
    ]
    return scene_of(full.rgb, [p.label for p in placements], masks, own)


def _touched(bodies: np.ndarray, body: int, crowd: set[int]) -> bool:
    """Whether anything that could hide the body borders it: only then is it rendered alone."""
    mask = bodies == body
    near = mask.copy()
    for axis in (0, 1):
        for step in (-2, 2):
            near |= np.roll(mask, step, axis)
    return bool(np.isin(bodies[near], list(crowd - {body})).any())


def _own_pixels(world: World, view: View, placement: Placement) -> int:
    world.clear()
    body = world.place(placement.kind, placement.colour, placement.pose)
    dark = replace(view.light, shadow=False)
    return int((world.render(view.camera, dark).body == body).sum())


def render_scene(world: World, seed: int) -> Scene:
    """Render the scene of a seed: 1 to 6 distinct objects, each at least 60 % visible.

    The same seed gives the same frame with the same version of PyBullet.
    """
    rng = np.random.default_rng(seed)
    while True:
        view = random_view(rng)
        placements = draw_placements(world, view, rng, int(rng.integers(1, MAX_OBJECTS + 1)))
        drawn = render_placements(world, view, placements) if placements else None
        if drawn is not None:
            return drawn


def save_arrays(path: Path, arrays: dict[str, np.ndarray], *, compress: bool = False) -> None:
    """Write arrays as .npz; the file appears whole or not at all."""
    partial = path.with_suffix(".part")
    with open(partial, "wb") as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)  # type: ignore[arg-type]
    partial.rename(path)


def write_frames(out: Path, first: int, count: int) -> None:
    """Render ``count`` scenes of seeds from ``first`` into ``frame_<seed>.npz``; resumable."""
    out.mkdir(parents=True, exist_ok=True)
    world = World()
    for seed in range(first, first + count):
        path = out / f"frame_{seed}.npz"
        if path.exists():
            continue
        scene = render_scene(world, seed)
        owner = np.full(scene.rgb.shape[:2], -1, np.int8)
        for number, mask in enumerate(scene.masks):
            owner[mask] = number
        arrays = {
            "rgb": scene.rgb,
            "owner": owner,
            "boxes": np.array([item.box for item in scene.objects]),
            "labels": np.array([item.label for item in scene.objects], dtype="U32"),
        }
        save_arrays(path, arrays, compress=True)


def main() -> None:
    """``python -m librobot_vlm_ros.tabletop.scenes --out DIR --frames N``."""
    parser = argparse.ArgumentParser(description="Render full frames for training.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--first", type=int, default=FIRST_TRAINING_SEED)
    args = parser.parse_args()
    write_frames(args.out, args.first, args.frames)


if __name__ == "__main__":
    main()
