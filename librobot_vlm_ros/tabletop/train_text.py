"""Stage two of the recipe: the text model, taught on the tower's channels as they ought to be.

Layouts are drawn, not rendered: each cell's channels are made from ground truth with noise, in
the order that ``train_tower`` teaches the tower. What the tower leaves free is noise here, so
that the projection learns to disregard it until both are trained together.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from librobot_vlm_ros.tabletop.labels import LABELS
from librobot_vlm_ros.tabletop.network import CELLS, QUIET_X, QUIET_Y, build_model
from librobot_vlm_ros.tabletop.reader import Reader, cells_to_keep
from librobot_vlm_ros.tabletop.samples import Sample
from librobot_vlm_ros.tabletop.targets import (
    Question,
    caption_question,
    detect_question,
    ground_question,
)
from librobot_vlm_ros.tabletop.train_tower import (
    BOX,
    COLOUR,
    KIND,
    average_gradients,
    join_ranks,
    optimizers,
    owner_targets,
    rate_at,
    set_rate,
)  # fmt: skip

__all__ = ["questions_of", "random_layout", "truth_features"]


def random_layout(rng: np.random.Generator) -> Sample:
    """A drawn layout: 1 to 6 distinct labels with boxes and the cells they own, without pixels."""
    count = int(rng.integers(1, 7))
    labels = [str(label) for label in rng.choice(LABELS, count, replace=False)]
    boxes: list[tuple[float, float, float, float]] = []
    while len(boxes) < count:
        w, h = rng.uniform(0.055, 0.26), rng.uniform(0.07, 0.3)
        x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        centre = (x + w / 2, y + h / 2)
        if all(
            abs(centre[0] - (b[0] + b[2]) / 2) > 0.4 * (w + b[2] - b[0]) / 2
            or abs(centre[1] - (b[1] + b[3]) / 2) > 0.4 * (h + b[3] - b[1]) / 2
            for b in boxes
        ):
            boxes.append((x, y, x + w, y + h))
    array = np.array(boxes, np.float32)
    order = np.argsort(array[:, 0] + array[:, 2])
    array, labels = array[order], [labels[i] for i in order]
    at = (np.arange(CELLS) + 0.5) / CELLS
    x, y = np.meshgrid(at, at)
    owner = np.full((CELLS, CELLS), -1, np.int8)
    for number in rng.permutation(count):
        a, b, c, d = array[number]
        reach = ((x - (a + c) / 2) / ((c - a) / 2)) ** 2 + ((y - (b + d) / 2) / ((d - b) / 2)) ** 2
        owner[reach < rng.uniform(0.7, 1.1)] = number
        row, column = int((b + d) / 2 * CELLS), int((a + c) / 2 * CELLS)
        owner[row, column] = number
    return Sample(np.zeros((0, 0, 3), np.uint8), tuple(labels), array, owner, owner)


def truth_features(samples: list[Sample], width: int, rng: np.random.Generator) -> torch.Tensor:
    """[B, width, C, C]: the tower's channels made from ground truth, with noise elsewhere."""
    shape = (len(samples), CELLS, CELLS)
    free = rng.normal(0, rng.uniform(0.3, 1.5, (len(samples), 1, 1, 1)), (*shape, width))
    out = free.astype(np.float32)
    out[..., KIND] = rng.normal(-1, 1, out[..., KIND].shape)
    out[..., COLOUR] = rng.normal(0, 2, out[..., COLOUR].shape)
    out[..., BOX] = rng.normal(0.3, 1, out[..., BOX].shape)
    for quiet in (QUIET_X, QUIET_Y):
        out[..., quiet] = rng.normal(0, 0.1, out[..., quiet].shape)
    for number, sample in enumerate(samples):
        kind, colour, ltrb = owner_targets(sample, sample.owner)
        rows, columns = np.indices(kind.shape)
        sure = rng.uniform(4, 9, kind.shape)
        out[number, rows, columns, KIND.start + kind] += sure
        on = kind > 0
        tinted = colour >= 0
        cells = out[number]
        cells[tinted, COLOUR] = rng.normal(-1, 1, (int(tinted.sum()), COLOUR.stop - COLOUR.start))
        cells[rows[tinted], columns[tinted], COLOUR.start + colour[tinted]] += sure[tinted]
        cells[on, BOX] = ltrb[on] + rng.normal(0, 0.06, (int(on.sum()), 4))
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def questions_of(sample: Sample, rng: np.random.Generator) -> list[Question]:
    """Three questions on a frame: detection, a grounding, and a caption or another grounding."""
    third = (
        caption_question(sample.labels) if rng.random() < 0.6
        else ground_question(sample.labels, sample.boxes, rng)
    )  # fmt: skip
    return [
        detect_question(sample.labels, sample.boxes),
        ground_question(sample.labels, sample.boxes, rng),
        third,
    ]


def main() -> None:
    """``python -m librobot_vlm_ros.tabletop.train_text --out FILE --minutes M``."""
    parser = argparse.ArgumentParser(description="Train the text model on ground-truth channels.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", type=float, default=0.5, help="share of time on detection alone")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rank, ranks = join_ranks()
    model = build_model(attention="eager")
    width = model.config.vision_config.embed_dim[-1]
    reader = Reader(model)
    optims = optimizers([reader], args.rate, decay=0.01)
    spent, step = 0.0, 0
    if args.out.exists():
        state = torch.load(args.out, weights_only=True)
        reader.load_state_dict(state["reader"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        spent, step = state["spent"], state["step"]
    rng = np.random.default_rng([args.seed, rank, step])
    last, mean = time.monotonic(), dict[str, float]()
    while spent < args.minutes * 60:
        set_rate(optims, rate_at(spent, args.minutes * 60, args.rate, warm=0.05))
        # Detection alone first: it has most boxes for one pass of the encoder, and what it teaches
        # of reading cells and writing locations holds for the other questions.
        alone = spent < args.alone * args.minutes * 60
        layouts = [random_layout(rng) for _ in range(args.batch * (3 if alone else 1))]
        questions = [
            [detect_question(v.labels, v.boxes)] if alone else questions_of(v, rng) for v in layouts
        ]
        features = truth_features(layouts, width, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            keep = cells_to_keep([v.owner for v in layouts], rng, 60)
            loss, figures = reader(features, questions, spread=4.0, noise=2.0, keep=keep)
        for optim in optims:
            optim.zero_grad()
        loss.backward()
        average_gradients([reader], ranks)
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
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
        if step % 25 == 0 and rank == 0:
            shown = "  ".join(f"{k} {v:.3f}" for k, v in mean.items())
            print(
                f"step {step}  {spent / 60:.1f} min  {step * args.batch * ranks} scenes  {shown}",
                flush=True,
            )
        if rank == 0 and (step % 200 == 0 or spent >= args.minutes * 60):
            save = {"reader": reader.state_dict(), "spent": spent, "step": step,
                    "optims": [optim.state_dict() for optim in optims]}  # fmt: skip
            torch.save(save, args.out.with_suffix(".part"))
            args.out.with_suffix(".part").rename(args.out)


if __name__ == "__main__":
    main()
