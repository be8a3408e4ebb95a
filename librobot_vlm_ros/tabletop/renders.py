"""Full renders kept as files for the last stage of training, and drawn for evaluation and bags."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from librobot_vlm_ros.tabletop.scenes import render_scene_with_masks
from librobot_vlm_ros.tabletop.world import World

__all__ = ["write_frames"]

#: Training renders take their seeds from here on; evaluation and the shipped bag stay below.
FIRST_TRAINING_SEED = 10_000_000


def write_frames(out: Path, first: int, count: int) -> None:
    """Render ``count`` scenes of seeds from ``first`` into ``frame_<seed>.npz``; resumable."""
    out.mkdir(parents=True, exist_ok=True)
    world = World()
    for seed in range(first, first + count):
        path = out / f"frame_{seed}.npz"
        if path.exists():
            continue
        scene, masks = render_scene_with_masks(world, seed)
        owner = np.full(scene.rgb.shape[:2], -1, np.int8)
        for number, mask in enumerate(masks):
            owner[mask] = number
        partial = path.with_suffix(".part")
        with open(partial, "wb") as file:
            np.savez_compressed(
                file, rgb=scene.rgb, owner=owner, boxes=np.array([o.box for o in scene.objects]),
                labels=np.array([o.label for o in scene.objects], dtype="U32"),
            )  # fmt: skip
        partial.rename(path)


def main() -> None:
    """``python -m librobot_vlm_ros.tabletop.renders --out DIR --frames N``."""
    parser = argparse.ArgumentParser(description="Render full frames for training.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--first", type=int, default=FIRST_TRAINING_SEED)
    args = parser.parse_args()
    write_frames(args.out, args.first, args.frames)


if __name__ == "__main__":
    main()
