"""Stage three of the recipe: tower and text model together, end to end, and the finished folder.

Both arrive trained on the same channels, so the text model reads the tower from the first step.
The dense loss stays on, at a lower weight. Frames are composed layers first; full renders are
mixed in as soon as there are any, in the share asked for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from librobot_vlm_ros.tabletop.network import build_model, save_folder
from librobot_vlm_ros.tabletop.samples import FrameStream
from librobot_vlm_ros.tabletop.targets import questions_of
from librobot_vlm_ros.tabletop.train_text import TextTrainer, cells_to_keep
from librobot_vlm_ros.tabletop.train_tower import dense_loss, pixels_of, tower_features
from librobot_vlm_ros.tabletop.training import TrainingRun, batches, options


def main() -> None:
    """``python -m librobot_vlm_ros.tabletop.train_joint --bank … --tower … --text … --out DIR``."""
    parser = options(
        "Train the embedded model end to end.", minutes=40, batch=8, rate=8e-4, seed=11
    )
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--renders", type=Path, help="folder of full renders to mix in")
    parser.add_argument("--share", type=float, default=0.5, help="share of full renders")
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--state", type=Path, required=True, help="checkpoint, resumed if it exists"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model()
    tower = model.model.vision_tower.to(memory_format=torch.channels_last)
    trainer = TextTrainer(model)
    run = TrainingRun(
        args, args.state, {"tower": tower, "reader": trainer},
        clip={"tower": 1.0, "reader": 1.0}, decay=0.01,
    )  # fmt: skip
    if not run.resumed:
        tower.load_state_dict(torch.load(args.tower, weights_only=True)["tower"])
        trainer.load_state_dict(torch.load(args.text, weights_only=True)["reader"])
    seed = args.seed * 1000 + run.rank + 7 * run.steps
    stream = FrameStream(args.bank, seed, args.renders, args.share)
    rng = np.random.default_rng([args.seed, run.rank, run.steps])
    for samples in batches(stream, args.batch):
        late = run.share > 0.7  # at last, every cell and sharper targets
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            _, features = tower_features(tower, pixels_of(samples))
            questions = [questions_of(sample, rng) for sample in samples]
            keep = None if late else cells_to_keep([v.owner for v in samples], rng, 60)
            loss, figures = trainer(
                features, questions, spread=2.5 if late else 4.0, noise=2.0, keep=keep
            )
        dense, seen = dense_loss(features, samples)
        figures |= {"kind": seen["kind"], "off": seen["off"]}
        if run.step(loss + 0.3 * dense, figures):
            trainer.write_back()
            save_folder(args.out, model.state_dict())
        if run.done:
            return


if __name__ == "__main__":
    main()
