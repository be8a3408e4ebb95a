"""Stage one of the recipe: the vision tower, taught by dense labels.

The tower's own output channels carry the answer, with no head on top: at each cell of stride 16,
channels 0..10 are the kind's logits (0 is background), 11..16 the colour's, 17..20 the distances
from the cell's centre to the box's left, top, right and bottom, in cells. The text model is
trained meanwhile on the same channels made from ground truth (``train_text``), so that the two
fit when they meet. A linear head at stride 8 helps the early layers and is thrown away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from librobot_vlm_ros.tabletop.labels import COLOURS, KINDS
from librobot_vlm_ros.tabletop.network import CELLS, QUIET_X, QUIET_Y, build_model
from librobot_vlm_ros.tabletop.samples import MEAN, STD, FrameStream, Sample, kind_and_colour
from librobot_vlm_ros.tabletop.training import TrainingRun, batches, options

KIND = slice(0, len(KINDS) + 1)
COLOUR = slice(KIND.stop, KIND.stop + len(COLOURS))
BOX = slice(COLOUR.stop, COLOUR.stop + 4)


def pixels_of(samples: list[Sample]) -> torch.Tensor:
    """Normalised images float32 [B, 3, S, S]."""
    stack = np.stack([sample.pixels for sample in samples]).astype(np.float32) / 255
    return torch.from_numpy((stack - MEAN) / STD).permute(0, 3, 1, 2)


def dense_targets(
    samples: list[Sample], owners: list[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each sample's owner map [C, C]: kind [B, C, C] (-100 undecided), colour [B, C, C] (-100
    none), ltrb [B, C, C, 4] in cells.
    """
    targets = zip(*map(owner_targets, samples, owners), strict=True)
    kinds, colours, boxes = (torch.from_numpy(np.stack(part)) for part in targets)
    return kinds, colours, boxes


def owner_targets(sample: Sample, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The dense targets of one sample for its owner map [C, C]."""
    codes = np.array([kind_and_colour(label) for label in sample.labels], np.int64).reshape(-1, 2)
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


def tower_features(tower: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, D8, 24, 24] of the stride-8 stage and the output [B, D, 12, 12]."""
    hidden, kept = pixels, pixels
    for stage, (conv, blocks) in enumerate(zip(tower.convs, tower.blocks, strict=True)):
        hidden = conv(hidden)
        for block in blocks:
            hidden = block(hidden)
        if stage == len(tower.convs) - 2:
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
    kind, colour, ltrb = dense_targets(samples, [sample.owner for sample in samples])
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


def head8_loss(head8: nn.Module, kept: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
    """Loss of a linear head on the features [B, D8, 24, 24] of stride 8: kind and colour."""
    said = head8(kept.float().permute(0, 2, 3, 1))
    kind, colour, _ = dense_targets(samples, [sample.owner8 for sample in samples])
    loss = F.cross_entropy(said[..., KIND].flatten(0, 2), kind.flatten())
    return loss + F.cross_entropy(said[..., COLOUR].flatten(0, 2), colour.flatten())


def main() -> None:
    """``python -m librobot_vlm_ros.tabletop.train_tower --bank DIR --out FILE --minutes M``."""
    parser = options(
        "Train the embedded model's vision tower.", minutes=60, batch=16, rate=2e-3, seed=1
    )
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, resumed if it exists")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(attention="eager")
    tower = model.model.vision_tower.to(memory_format=torch.channels_last)
    # Named so that the optimizers tell it from a layer's matrix.
    head8 = nn.ModuleDict({"head8": nn.Linear(tower.config.embed_dim[-2], BOX.start)})
    run = TrainingRun(
        args, args.out, {"tower": tower, "head8": head8}, clip={"tower": 2.0}, decay=0.02
    )
    stream = FrameStream(args.bank, args.seed * 1000 + run.rank + 7 * run.steps)
    for samples in batches(stream, args.batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            kept, features = tower_features(tower, pixels_of(samples))
        loss, figures = dense_loss(features, samples)
        figures["loss"] = loss.item()
        run.step(loss + 0.5 * head8_loss(head8["head8"], kept, samples), figures)
        if run.done:
            return


if __name__ == "__main__":
    main()
