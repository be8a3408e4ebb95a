"""The plots of the report, as inline SVG."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from librobot_vlm_ros.demo.data import DemoRun
from librobot_vlm_ros.demo.pictures import duration

#: CSS classes of the series; the report's style sheet gives them their colours.
TASK_CLASSES = {"caption": "s1", "detect": "s2", "ground": "s3", "embed": "s4"}

_WIDTH, _HEIGHT = 920, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 44
_BESIDE = 4.0


def latency_plot(run: DemoRun, p50_s: float | None, p99_s: float | None) -> str:
    """Age of each frame when its results were published, over the time of the frame; a line a
    task, dashed lines at the median and the 99th percentile, a mark for each question's answer.
    """
    points = [
        (task, (frame.stamp_ns - run.frames[0].stamp_ns) / 1e9, answer.age_s * 1e3)
        for frame in run.frames
        for task, answer in sorted(frame.answers.items())
    ]
    first_ns = run.frames[0].stamp_ns if run.frames else 0
    asked = [
        ((item.stamp_ns - first_ns) / 1e9, item.took_s * 1e3)
        for item in run.questions
        if run.frame(item.stamp_ns) is not None
    ]
    if not points:
        return "<p>No results to plot.</p>"
    last_s = max(x for _, x, _ in points) or 1.0
    top_ms, tick_ms = _nice_top(max([y for _, _, y in points] + [y for _, y in asked]))

    def x_of(seconds: float) -> float:
        return _LEFT + seconds / last_s * (_WIDTH - _LEFT - _RIGHT)

    def y_of(milliseconds: float) -> float:
        return _HEIGHT - _BOTTOM - milliseconds / top_ms * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Age of each frame when its results were published">'
    ]
    for number in range(round(top_ms / tick_ms) + 1):
        y = y_of(number * tick_ms)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(_LEFT - 8, y + 4, f"{number * tick_ms:g}", "end"))
    for second in range(0, math.floor(last_s) + 1, max(1, round(last_s / 10))):
        parts.append(_text(x_of(second), _HEIGHT - _BOTTOM + 18, f"{second} s", "middle"))
    parts.append(_text(_LEFT, _HEIGHT - 6, "time in the bag", "start"))
    parts.append(
        f'<text transform="translate(14 {(_HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" '
        'text-anchor="middle">age, ms</text>'
    )
    tasks = sorted({task for task, _, _ in points})
    for place, task in enumerate(tasks):
        style = TASK_CLASSES.get(task, "s5")
        # Tasks that were answered together have one age: beside one another all can be seen.
        beside = _BESIDE * (place - (len(tasks) - 1) / 2)
        series = [(x_of(x) + beside, y_of(y)) for name, x, y in points if name == task]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in series)
        parts.append(f'<polyline class="line {style}" points="{path}"/>')
        for x, y in series:
            parts.append(f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    for x, y in asked:
        parts.append(
            f'<path class="mark" d="M{x_of(x):.1f} {y_of(y) - 6:.1f}l5 9h-10z">'
            f"<title>question, {duration(y / 1e3)}</title></path>"
        )
    for name, value in (("p50", p50_s), ("p99", p99_s)):
        if value is not None:
            y = y_of(value * 1e3)
            parts.append(
                f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/>'
            )
            parts.append(_text(_WIDTH - _RIGHT, y - 5, f"{name} {duration(value)}", "end"))
    parts.append("</svg>")
    return "".join(parts)


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _nice_top(most: float) -> tuple[float, float]:
    """End of the axis and distance of its ticks: 4 to 8 ticks at round numbers."""
    most = max(most, 1.0)
    power = 10.0 ** math.floor(math.log10(most))
    tick = next(
        step * power for step in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if most / (step * power) <= 8
    )
    return math.ceil(most / tick + 1e-9) * tick, tick


def similarity_plot(run: DemoRun) -> str:
    """How alike the embeddings of all pairs of frames are, as a map: frames down and across, dark
    where they are alike. "" where the model gave none.
    """
    known = [
        (frame.number, answer.vector)
        for frame in run.frames
        for answer in [frame.answers.get("embed")]
        if answer is not None and answer.vector is not None
    ]
    if len(known) < 2:
        return ""
    vectors = np.stack([vector for _, vector in known])
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    alike = vectors @ vectors.T
    low = float(alike.min())
    strength = (alike - low) / max(1.0 - low, 1e-6)
    cell = 420 / len(known)
    parts = [
        '<svg class="plot map s1" viewBox="0 0 920 440" role="img" '
        'aria-label="Cosine similarity of the embeddings of all pairs of frames">'
    ]
    for row, (above, _) in enumerate(known):
        for column, (across, _) in enumerate(known):
            parts.append(
                f'<rect x="{40 + column * cell:.1f}" y="{10 + row * cell:.1f}" width="{cell:.1f}" '
                f'height="{cell:.1f}" fill="currentColor" '
                f'fill-opacity="{min(1.0, max(0.0, strength[row, column])):.2f}"><title>frames '
                f"{above} and {across}: {alike[row, column]:.3f}</title></rect>"
            )
    words = (
        f"Cosine similarity of the embeddings ({vectors.shape[1]} numbers each)",
        "of every frame with every other, from",
        f"{low:.2f} (pale) to 1.00 (dark).",
        "A block is a run of frames that look alike",
        "to the model.",
    )
    parts += [_text(500, 40 + 20 * line, text, "start") for line, text in enumerate(words)]
    return "".join([*parts, "</svg>"])
