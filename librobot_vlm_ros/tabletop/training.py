"""What the three stages of training share: options, ranks, optimizers, and a resumable run.

A stage trains for a number of minutes, not of steps: the learning rate follows the share of the
time that is used up. Under ``torchrun`` its processes average their gradients and keep one clock.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from librobot_vlm_ros.tabletop.samples import FrameStream, Sample


def options(
    description: str, *, minutes: float, batch: int, rate: float, seed: int
) -> argparse.ArgumentParser:
    """A parser with the options that every stage has; the arguments are their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    return parser


class TrainingRun:
    """The modules of a stage in training, with optimizers, clock and checkpoint.

    ``modules`` are trained, and saved at ``path`` under their names with the optimizers' state and
    the time spent; what is found there is gone on with (``resumed``). ``clip`` gives the largest
    norm of the gradient for the modules that have one.
    """

    def __init__(
        self, args: argparse.Namespace, path: Path, modules: dict[str, nn.Module], *,
        clip: dict[str, float], decay: float, warm: float = 0.02, unit: str = "frames",
    ) -> None:  # fmt: skip
        self.path, self.modules, self.clip, self.warm, self.unit = path, modules, clip, warm, unit
        self.total_s: float = args.minutes * 60
        self.rate, self.batch = args.rate, args.batch
        self.rank, self.ranks = _join_ranks()
        self.optims = _optimizers(list(modules.values()), args.rate, decay)
        self.spent_s, self.steps = 0.0, 0
        self.resumed = path.exists()
        if self.resumed:
            state = torch.load(path, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(state[name])
            for optim, saved in zip(self.optims, state["optims"], strict=True):
                optim.load_state_dict(saved)
            self.spent_s, self.steps = state["spent"], state["step"]
        self._last = time.monotonic()
        self._means: dict[str, float] = {}

    @property
    def done(self) -> bool:
        """Whether the time is up."""
        return self.spent_s >= self.total_s

    @property
    def share(self) -> float:
        """Of the time that is used up, 0..1."""
        return self.spent_s / self.total_s if self.total_s else 1.0

    def step(self, loss: torch.Tensor, figures: dict[str, float], every: int = 100) -> bool:
        """Learn from a loss, tell of the figures' running means now and then.

        Returns whether a checkpoint was written: after ``every`` steps and at the end, by rank 0.
        """
        for optim in self.optims:
            optim.zero_grad()
            for group in optim.param_groups:
                group["lr"] = rate_at(self.share, self.rate, self.warm)
        loss.backward()
        if self.ranks > 1:
            self._average_gradients()
        for name, norm in self.clip.items():
            nn.utils.clip_grad_norm_(self.modules[name].parameters(), norm)
        for optim in self.optims:
            optim.step()
        self._tick()
        self._means = {k: 0.95 * self._means.get(k, v) + 0.05 * v for k, v in figures.items()}
        if self.rank:
            return False
        if self.steps % 25 == 0:
            shown = "  ".join(f"{name} {mean:.3f}" for name, mean in self._means.items())
            seen = f"{self.steps * self.batch * self.ranks} {self.unit}"
            print(f"step {self.steps}  {self.spent_s / 60:.1f} min  {seen}  {shown}", flush=True)
        if self.steps % every and not self.done:
            return False
        self._save()
        return True

    def _tick(self) -> None:
        self.steps += 1
        now = time.monotonic()
        self.spent_s, self._last = self.spent_s + now - self._last, now
        if self.ranks > 1:  # the ranks' clocks drift; all must take the same rate and stop together
            clock = torch.tensor([self.spent_s], dtype=torch.float64)
            torch.distributed.broadcast(clock, 0)
            self.spent_s = clock.item()

    def _average_gradients(self) -> None:
        """Over the ranks, in one flat tensor."""
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        shares = (flat / self.ranks).split([grad.numel() for grad in grads])
        for grad, part in zip(grads, shares, strict=True):
            grad.copy_(part.view_as(grad))

    def _save(self) -> None:
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"spent": self.spent_s, "step": self.steps}
        state["optims"] = [optim.state_dict() for optim in self.optims]
        partial = self.path.with_suffix(".part")
        torch.save(state, partial)
        partial.rename(self.path)


def rate_at(share: float, top: float, warm: float = 0.02) -> float:
    """Learning rate by share of the time used: warm-up, plateau, and over the last 40 % a linear
    fall to 3 % of ``top``.
    """
    if share < warm:
        return top * (0.05 + 0.95 * share / warm)
    return top if share < 0.6 else top * max(0.03, 1 - (share - 0.6) / 0.4)


def _join_ranks() -> tuple[int, int]:
    """(rank, how many) under torchrun, with the process group joined; (0, 1) otherwise."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    return int(os.environ.get("RANK", "0")), ranks


def _optimizers(modules: list[nn.Module], rate: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            kept_apart = any(part in name for part in ("embed", "shared", "head8"))
            (matrices if parameter.ndim == 2 and not kept_apart else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=rate, weight_decay=decay, betas=(0.9, 0.98)),
    ]


def batches(stream: FrameStream, size: int) -> Iterator[list[Sample]]:
    """Batches made in a worker process, so that the trainer never waits for them."""
    loader: Any = torch.utils.data.DataLoader(
        stream, batch_size=size, num_workers=1, collate_fn=list, prefetch_factor=4
    )
    yield from loader
