"""Stage one of the recipe: the vision tower, taught by dense labels.

The tower's own output channels carry the answer, with no head on top: at each cell of stride 16,
channels 0..10 are the kind's logits (0 is background), 11..16 the colour's, 17..20 the distances
from the cell's centre to the box's left, top, right and bottom, in cells. The text model is
trained meanwhile on the same channels made from ground truth (``train_text``), so that the two
fit when they meet. A linear head at stride 8 helps the early layers and is thrown away.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from librobot_vlm_ros.tabletop.labels import COLOURS, KINDS
from librobot_vlm_ros.tabletop.network import CELLS, QUIET_X, QUIET_Y, build_model
from librobot_vlm_ros.tabletop.samples import MEAN, STD, FrameStream, Sample, parts

KIND = slice(0, len(KINDS) + 1)
COLOUR = slice(KIND.stop, KIND.stop + len(COLOURS))
BOX = slice(COLOUR.stop, COLOUR.stop + 4)
_CENTRES = (np.arange(CELLS, dtype=np.float32) + 0.5) / CELLS


def pixels_of(samples: list[Sample]) -> torch.Tensor:
    """Normalised images float32 [B, 3, S, S]."""
    stack = np.stack([sample.pixels for sample in samples]).astype(np.float32) / 255
    return torch.from_numpy((stack - MEAN) / STD).permute(0, 3, 1, 2)


def dense_targets(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """kind [B, C, C] (-100 undecided), colour [B, C, C] (-100 none), ltrb [B, C, C, 4] in cells."""
    kinds, colours, boxes = [], [], []
    for sample in samples:
        kind, colour, box = owner_targets(sample, sample.owner)
        kinds.append(kind), colours.append(colour), boxes.append(box)
    return tuple(torch.from_numpy(np.stack(part)) for part in (kinds, colours, boxes))  # type: ignore[return-value]


def owner_targets(sample: Sample, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The dense targets of one sample for its owner map [C, C]."""
    codes = np.array([parts(label) for label in sample.labels], np.int64).reshape(-1, 2)
    safe = np.maximum(owner, 0).astype(np.int64)
    on = owner >= 0
    kind = np.where(on, codes[safe, 0], np.where(owner == -1, 0, -100))
    colour = np.where(on & (codes[safe, 1] >= 0), codes[safe, 1], -100)
    cells = owner.shape[0]
    centres = (np.arange(cells, dtype=np.float32) + 0.5) / cells
    x, y = np.meshgrid(centres, centres)
    b = sample.boxes[safe]
    ltrb = np.stack([x - b[..., 0], y - b[..., 1], b[..., 2] - x, b[..., 3] - y], -1) * CELLS
    return kind, colour, np.where(on[..., None], ltrb, 0).astype(np.float32)


def tower_features(tower: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, D8, 24, 24] of the stride-8 stage and the output [B, D, 12, 12]."""
    hidden, kept = pixels, pixels
    for stage, (conv, blocks) in enumerate(zip(tower.convs, tower.blocks, strict=True)):  # type: ignore[arg-type]
        hidden = conv(hidden)
        for block in blocks:
            hidden = block(hidden)
        if stage == len(tower.convs) - 2:  # type: ignore[arg-type]
            kept = hidden
    return kept, hidden


def box_loss(pred: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Smooth L1 in cells plus 1 - IoU, for matched ltrb [N, 4]."""
    if len(true) == 0:
        return pred.sum() * 0
    positive = pred.clamp(min=-0.5)
    overlap = (
        (torch.minimum(positive[:, :2], true[:, :2]) + torch.minimum(positive[:, 2:], true[:, 2:]))
        .clamp(min=0)
        .prod(1)
    )
    area = (positive[:, :2] + positive[:, 2:]).clamp(min=0).prod(1)
    area_true = (true[:, :2] + true[:, 2:]).prod(1)
    iou = overlap / (area + area_true - overlap).clamp(min=1e-6)
    return F.smooth_l1_loss(pred, true, beta=0.2) * 2 + (1 - iou).mean()


def dense_loss(
    features: torch.Tensor, samples: list[Sample]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of the tower's output [B, D, C, C] against the samples, and its figures."""
    kind, colour, ltrb = dense_targets(samples)
    cells = features.float().permute(0, 2, 3, 1)
    kind_logits, colour_logits, boxes = cells[..., KIND], cells[..., COLOUR], cells[..., BOX]
    on, tinted = kind > 0, colour >= 0
    raw = F.cross_entropy(
        kind_logits.flatten(0, 2), kind.flatten(), ignore_index=-100, reduction="none"
    ).view(kind.shape)
    weight = torch.where(on, 1.0, 0.25) * (kind >= 0)
    kind_loss = (raw * weight).sum() / weight.sum()
    colour_loss = F.cross_entropy(colour_logits[tinted], colour[tinted])
    boxes_loss = box_loss(boxes[on], ltrb[on])
    quiet = cells[..., QUIET_X].square().mean() + cells[..., QUIET_Y].square().mean()
    with torch.no_grad():
        right = kind_logits.argmax(-1) == kind
        figures = {
            "kind": right[on].float().mean().item(),
            "empty": right[kind == 0].float().mean().item(),
            "colour": (colour_logits.argmax(-1) == colour)[tinted].float().mean().item(),
            "off": (boxes - ltrb)[on].abs().mean().item(), "quiet": quiet.item(),
        }  # fmt: skip
    return kind_loss * 2 + colour_loss + boxes_loss + 0.2 * quiet, figures


def optimizers(
    modules: list[nn.Module], rate: float, decay: float = 0.02
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                flat = (
                    parameter.ndim == 2
                    and "embed" not in name
                    and "shared" not in name
                    and "head8" not in name
                )
                (matrices if flat else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=rate, weight_decay=decay, betas=(0.9, 0.98)),
    ]  # fmt: skip


def join_ranks() -> tuple[int, int]:
    """(rank, how many) under torchrun, with the process group joined; (0, 1) otherwise."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    return int(os.environ.get("RANK", "0")), ranks


def average_gradients(modules: list[nn.Module], ranks: int) -> None:
    """Average the gradients over the ranks, in one flat tensor."""
    if ranks == 1:
        return
    grads = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat)
    shares = (flat / ranks).split([grad.numel() for grad in grads])
    for grad, part in zip(grads, shares, strict=True):
        grad.copy_(part.view_as(grad))


def set_rate(optims: list[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of every group."""
    for optim in optims:
        for group in optim.param_groups:
            group["lr"] = rate


def rate_at(elapsed: float, total: float, top: float, warm: float = 0.02) -> float:
    """Warm-up, plateau, then a linear fall over the last 40 % to 3 %: by share of the time used."""
    done = min(1.0, elapsed / total)
    if done < warm:
        return top * (0.05 + 0.95 * done / warm)
    return top if done < 0.6 else top * max(0.03, 1 - (done - 0.6) / 0.4)


def batches(stream: FrameStream, size: int) -> Iterator[list[Sample]]:
    """Batches made in a worker process, so that the trainer never waits for them."""
    loader: Any = torch.utils.data.DataLoader(
        _Iterable(stream), batch_size=size, num_workers=1, collate_fn=list, prefetch_factor=4
    )
    yield from loader


class _Iterable(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self, stream: FrameStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.stream)


def main() -> None:
    """``python -m librobot_vlm_ros.tabletop.train_tower --bank DIR --out FILE --minutes M``."""
    parser = argparse.ArgumentParser(description="Train the embedded model's vision tower.")
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rank, ranks = join_ranks()
    model = build_model(attention="eager")
    tower = model.model.vision_tower.to(memory_format=torch.channels_last)
    head8 = nn.ModuleDict({"head8": nn.Linear(tower.config.embed_dim[-2], BOX.start)})
    optims = optimizers([tower, head8], args.rate)
    spent, step = 0.0, 0
    if args.out.exists():
        state = torch.load(args.out, weights_only=True)
        tower.load_state_dict(state["tower"]), head8.load_state_dict(state["head8"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        spent, step = state["spent"], state["step"]
    stream = FrameStream(args.bank, args.seed * 1000 + rank + 7 * step)
    last = time.monotonic()
    mean: dict[str, float] = {}
    for samples in batches(stream, args.batch):
        set_rate(optims, rate_at(spent, args.minutes * 60, args.rate))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            kept, features = tower_features(tower, pixels_of(samples))
        loss, figures = dense_loss(features, samples)
        side = head8["head8"](kept.float().permute(0, 2, 3, 1))
        eighth = [owner_targets(sample, sample.owner8) for sample in samples]
        kind8 = torch.from_numpy(np.stack([e[0] for e in eighth]))
        colour8 = torch.from_numpy(np.stack([e[1] for e in eighth]))
        loss8 = F.cross_entropy(side[..., KIND].flatten(0, 2), kind8.flatten())
        loss8 = loss8 + F.cross_entropy(side[..., COLOUR].flatten(0, 2), colour8.flatten())
        for optim in optims:
            optim.zero_grad()
        (loss + 0.5 * loss8).backward()
        average_gradients([tower, head8], ranks)
        nn.utils.clip_grad_norm_(tower.parameters(), 2.0)
        for optim in optims:
            optim.step()
        step += 1
        now = time.monotonic()
        spent, last = spent + now - last, now
        figures["loss"] = loss.item()
        mean = {k: 0.95 * mean.get(k, v) + 0.05 * v for k, v in figures.items()}
        if ranks > 1:  # the ranks' clocks drift; all must take the same rate and stop together
            clock = torch.tensor([spent], dtype=torch.float64)
            torch.distributed.broadcast(clock, 0)
            spent = clock.item()
        if step % 25 == 0 and rank == 0:
            shown = "  ".join(f"{k} {v:.3f}" for k, v in mean.items())
            print(
                f"step {step}  {spent / 60:.1f} min  {step * args.batch * ranks} images  {shown}",
                flush=True,
            )
        if rank == 0 and (step % 100 == 0 or spent > args.minutes * 60):
            save = {"tower": tower.state_dict(), "head8": head8.state_dict(), "spent": spent,
                    "step": step, "optims": [optim.state_dict() for optim in optims]}  # fmt: skip
            torch.save(save, args.out.with_suffix(".part"))
            args.out.with_suffix(".part").rename(args.out)
        if spent > args.minutes * 60:
            return


if __name__ == "__main__":
    main()
