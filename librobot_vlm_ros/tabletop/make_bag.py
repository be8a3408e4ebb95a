"""The shipped camera bag: ten seconds over a tabletop, with what is on it told beside every frame.

The camera moves slowly along an arc while the objects stand still, and the scene changes twice.
``python -m librobot_vlm_ros.tabletop.make_bag --out librobot_vlm_ros/bags/tabletop`` made the one
in the package; it needs PyBullet.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from librobot_vlm_ros.bags import TruthObject, write_camera_bag
from librobot_vlm_ros.tabletop.scenes import Scene, draw_placements, random_view, render_placements
from librobot_vlm_ros.tabletop.world import World

RATE_HZ = 3.0
SECONDS = 10.0
START_NS = 1_700_000_000_000_000_000


def shot(world: World, seed: int, frames: int) -> list[Scene]:
    """A camera arc of ``frames`` frames over one scene; drawn anew until every frame is clear."""
    rng = np.random.default_rng([seed, 23])
    while True:
        view = random_view(rng)
        placements = draw_placements(world, view, rng, int(rng.integers(3, 6)))
        if len(placements) < 3:
            continue
        scenes = []
        for number in range(frames):
            along = number / max(1, frames - 1) - 0.5
            camera = replace(
                view.camera, yaw=view.camera.yaw + 24 * along,
                pitch=view.camera.pitch + 4 * math.sin(3 * along),
            )  # fmt: skip
            scene = render_placements(world, replace(view, camera=camera), placements)
            if scene is None:
                break
            scenes.append(scene)
        if len(scenes) == frames:
            return scenes


def main() -> None:
    """Render the shots and write the bag."""
    parser = argparse.ArgumentParser(description="Render the camera bag that ships.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args()
    world = World()
    total = int(RATE_HZ * SECONDS)
    scenes = [s for part in range(3) for s in shot(world, args.seed + part, total // 3)]
    period = int(1e9 / RATE_HZ)
    frames, instructions = [], []
    for number, scene in enumerate(scenes):
        stamp = START_NS + number * period
        truth = [TruthObject(item.label, item.box) for item in scene.objects]
        frames.append((stamp, scene.rgb, truth))
        if number % 5 == 0:
            wanted = scene.objects[(number // 5) % len(scene.objects)].label
            instructions.append((stamp - period // 2, f"pick up the {wanted}"))
    write_camera_bag(args.out, frames, instructions, overwrite=True)
    print(f"{len(frames)} frames, {len(instructions)} instructions in {args.out}")


if __name__ == "__main__":
    main()
