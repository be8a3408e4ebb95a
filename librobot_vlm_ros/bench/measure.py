"""Time two ways of doing the same in turns; a row of figures for each such comparison."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Measurement:
    """One row. `ratio` says how many times less `ours` takes, and where `share` is set which
    part of the baseline ours is; its median over the pairs, and their smallest and largest.
    """

    name: str
    baseline: float
    ours: float
    ratio: float
    ratio_min: float
    ratio_max: float
    #: None where neither side writes tokens.
    identical_tokens: bool | None
    device: str
    unit: str = "s"
    #: What both numbers are of.
    note: str = ""
    share: bool = False
    #: What the ratio should reach, at most where `share` is set; None where nothing was aimed at.
    target: float | None = None

    @property
    def met(self) -> bool:
        """Whether the target is reached, with the same tokens on both sides."""
        if self.identical_tokens is False:
            return False
        if self.target is None:
            return True
        return self.ratio <= self.target if self.share else self.ratio >= self.target

    def as_json(self) -> dict[str, Any]:
        """For summary.json; numbers of four digits."""
        return {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


class Bench:
    """Where measurements are made and gathered."""

    def __init__(self, device: str, pairs: int = 5, say: Callable[[str], None] = print) -> None:
        self.device = device
        self.pairs = pairs
        self.rows: list[Measurement] = []
        self.failures: list[str] = []
        self._say = say

    @property
    def cuda(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.startswith("cuda")

    def seconds(self, work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
        """Time of `work(*given)` with what it gave, the device's own work included."""
        self._wait()
        started = time.perf_counter()
        result = work(*given)
        self._wait()
        return time.perf_counter() - started, result

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def paired(
        self,
        name: str,
        theirs: Callable[[Any], Any],
        ours: Callable[[Any], Any],
        inputs: Sequence[Any],
        **rest: Any,
    ) -> Measurement:
        """Run both on every input in turns; the first input is the warm-up.

        Each gives the tokens it wrote, as anything that can be compared, or None.
        """
        times: list[tuple[float, float]] = []
        same: bool | None = None
        for number, given in enumerate(inputs):
            a, expected = self.seconds(theirs, given)
            b, found = self.seconds(ours, given)
            if expected is not None:
                same = same is not False and expected == found
            if number:
                times.append((a, b))
        return self.add(name, times, same, **rest)

    def add(
        self,
        name: str,
        times: Sequence[tuple[float, float]],
        identical_tokens: bool | None = None,
        *,
        share: bool = False,
        **rest: Any,
    ) -> Measurement:
        """Gather pairs (baseline, ours) as a row."""
        ratios = [b / a if share else a / b for a, b in times if a > 0 and b > 0] or [math.nan]
        row = Measurement(
            name=name,
            baseline=statistics.median(a for a, _ in times),
            ours=statistics.median(b for _, b in times),
            ratio=statistics.median(ratios),
            ratio_min=min(ratios),
            ratio_max=max(ratios),
            identical_tokens=identical_tokens,
            device=self.device,
            share=share,
            **rest,
        )
        self.rows.append(row)
        tokens = {None: "", True: ", same tokens", False: ", TOKENS DIFFER"}[identical_tokens]
        self._say(
            f"{name}: {row.baseline:.4g} -> {row.ours:.4g} {row.unit}, ratio {row.ratio:.2f} "
            f"({row.ratio_min:.2f} to {row.ratio_max:.2f}){tokens}"
        )
        return row
