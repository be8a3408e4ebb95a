"""Stage three of the recipe: tower and text model together, end to end, and the finished folder.

Both arrive trained on the same channels, so the text model reads the tower from the first step.
The dense loss stays on, at a lower weight. Frames are composed layers first; full renders are
mixed in as soon as there are any, in the share asked for.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from librobot_vlm_ros.tabletop.network import build_model, save_folder
from librobot_vlm_ros.tabletop.reader import Reader, cells_to_keep
from librobot_vlm_ros.tabletop.samples import FrameStream
from librobot_vlm_ros.tabletop.train_text import questions_of
from librobot_vlm_ros.tabletop.train_tower import (
    average_gradients,
    batches,
    dense_loss,
    join_ranks,
    optimizers,
    pixels_of,
    rate_at,
    set_rate,
    tower_features,
)  # fmt: skip


def main() -> None:
    """``python -m librobot_vlm_ros.tabletop.train_joint --bank … --tower … --text … --out DIR``."""
    parser = argparse.ArgumentParser(description="Train the embedded model end to end.")
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--renders", type=Path, help="folder of full renders to mix in")
    parser.add_argument("--share", type=float, default=0.5, help="share of full renders")
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--state", type=Path, required=True, help="checkpoint, resumed if it exists"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rank, ranks = join_ranks()
    model = build_model()
    tower = model.model.vision_tower.to(memory_format=torch.channels_last)
    reader = Reader(model)
    both: list[nn.Module] = [tower, reader]
    optims = optimizers(both, args.rate, decay=0.01)
    spent, step = 0.0, 0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        tower.load_state_dict(state["tower"]), reader.load_state_dict(state["reader"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        spent, step = state["spent"], state["step"]
    else:
        tower.load_state_dict(torch.load(args.tower, weights_only=True)["tower"])
        reader.load_state_dict(torch.load(args.text, weights_only=True)["reader"])
    stream = FrameStream(args.bank, args.seed * 1000 + rank + 7 * step, args.renders, args.share)
    rng = np.random.default_rng([args.seed, rank, step])
    last, mean = time.monotonic(), dict[str, float]()
    for samples in batches(stream, args.batch):
        set_rate(optims, rate_at(spent, args.minutes * 60, args.rate))
        late = spent > args.minutes * 60 * 0.7  # at last, every cell and sharper targets
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            _, features = tower_features(tower, pixels_of(samples))
            questions = [questions_of(sample, rng) for sample in samples]
            keep = None if late else cells_to_keep([v.owner for v in samples], rng, 60)
            loss, figures = reader(
                features, questions, spread=2.5 if late else 4.0, noise=2.0, keep=keep
            )
        dense, seen = dense_loss(features, samples)
        figures |= {"kind": seen["kind"], "off": seen["off"]}
        for optim in optims:
            optim.zero_grad()
        (loss + 0.3 * dense).backward()
        average_gradients(both, ranks)
        for module in both:
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optim in optims:
            optim.step()
        step += 1
        now = time.monotonic()
        spent, last = spent + now - last, now
        if ranks > 1:
            clock = torch.tensor([spent], dtype=torch.float64)
            torch.distributed.broadcast(clock, 0)
            spent = clock.item()
        mean = {k: 0.95 * mean.get(k, v) + 0.05 * v for k, v in figures.items()}
        if rank == 0 and step % 25 == 0:
            shown = "  ".join(f"{k} {v:.3f}" for k, v in mean.items())
            print(
                f"step {step}  {spent / 60:.1f} min  {step * args.batch * ranks} frames  {shown}",
                flush=True,
            )
        done = spent > args.minutes * 60
        if rank == 0 and (step % 100 == 0 or done):
            save = {"tower": tower.state_dict(), "reader": reader.state_dict(), "spent": spent,
                    "step": step, "optims": [optim.state_dict() for optim in optims]}  # fmt: skip
            torch.save(save, args.state.with_suffix(".part"))
            args.state.with_suffix(".part").rename(args.state)
            reader.write_back()
            save_folder(args.out, model.state_dict())
        if done:
            return


if __name__ == "__main__":
    main()
