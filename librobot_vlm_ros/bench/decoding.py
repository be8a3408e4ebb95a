"""Rows about decoding alone: small models of every family, both ways."""

from __future__ import annotations

from librobot_vlm_ros.bench.measure import Bench
from librobot_vlm_ros.bench.models import TINY, pair_of

__all__ = ["deep_decoder", "families", "florence"]


def deep_decoder(bench: Bench) -> None:
    """A decoder of 24 layers, as deep as a 2B model's, small enough that only overhead counts."""
    text = {**TINY["llava-v1.5-7b"]["text_config"], "num_hidden_layers": 24}
    pair = pair_of("llava-v1.5-7b", bench.device, 64, text_config=text)
    bench.paired(
        "24-layer decoder",
        pair.theirs,
        pair.ours,
        pair.inputs(bench.pairs + 1),
        note="64 tokens, greedy, batch 1, hidden size 128",
        target=2.5,
    )


def families(bench: Bench) -> None:
    """Eight layers of each family."""
    for name in sorted(set(TINY) - {"florence-2-base"}):
        pair = pair_of(name, bench.device, 48)
        bench.paired(
            f"{name}, tiny",
            pair.theirs,
            pair.ours,
            pair.inputs(max(3, bench.pairs // 2) + 1),
            note="48 tokens, greedy, batch 1, 8 layers",
        )


def florence(bench: Bench) -> None:
    """A small Florence-2, greedy and with three beams."""
    pair = pair_of("florence-2-base", bench.device, 48)
    for beams in (1, 3):
        pair.beams = beams
        bench.paired(
            f"florence-2, tiny, {'greedy' if beams == 1 else f'{beams} beams'}",
            pair.theirs,
            pair.ours,
            pair.inputs(max(3, bench.pairs // 2) + 1),
            note="48 tokens, batch 1, 6 decoder layers, the published rules",
        )
