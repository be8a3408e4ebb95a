"""`report.html`: the whole run on one page that needs nothing else, no network, no script.

What the page and its plots look like stands in the templates and the style sheet beside this file;
here is what they show. The templates escape every text that comes from a model or a bag.
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.core.drawing import colour_of, hexadecimal, ink_on, region_words
from librobot_vlm_ros.demo.data import DemoRun, duration
from librobot_vlm_ros.demo.scores import Summary, answer_is_right, missed_objects, vocabulary

#: CSS classes of the tasks; the style sheet gives them their colours.
_TASK_CLASSES = {"caption": "s1", "detect": "s2", "ground": "s3", "embed": "s4"}


def save_report(run: DemoRun, summary: Summary, path: Path) -> None:
    """Write the page."""
    words = vocabulary(run)
    page = _rendered(
        "report.html.jinja",
        run=run,
        summary=summary,
        tasks=_tasks(run),
        latency=latency_plot(run, summary["frame_age_p50_s"], summary["frame_age_p99_s"]),
        similarity=similarity_plot(run),
        is_right=lambda answer: answer_is_right(run, answer, words),
        missed_objects=missed_objects,
        jpeg=_jpeg,
    )
    path.write_text(page + "\n", encoding="utf-8")


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "colour": lambda region: hexadecimal(colour_of(region.label)),
        "ink": lambda region: hexadecimal(ink_on(colour_of(region.label))),
        "duration": duration,
        "words": region_words,
        "in_words": _in_words,
        "task_class": lambda task: _TASK_CLASSES.get(task, "s5"),
    }
    return environment.get_template(template).render(**values)


def _tasks(run: DemoRun) -> list[str]:
    return sorted({task for frame in run.frames for task in frame.answers})


def _in_words(region: Region) -> str:
    return f"{region_words(region)} [{' '.join(f'{edge:.0f}' for edge in region.box)}]"


def _jpeg(pixels: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def latency_plot(run: DemoRun, p50_s: Any, p99_s: Any) -> str:
    """Age of each frame when its results were published, over the time of the frame, as SVG: a line
    a task, dashed lines at the median and the 99th percentile, a mark for each question's answer.
    """
    if not _tasks(run):
        return "<p>No results to plot.</p>"
    first_ns = run.frames[0].stamp_ns
    ages = {
        task: [
            ((frame.stamp_ns - first_ns) / 1e9, frame.answers[task].age_s)
            for frame in run.frames
            if task in frame.answers
        ]
        for task in _tasks(run)
    }
    asked = [
        ((item.stamp_ns - first_ns) / 1e9, item.took_s)
        for item in run.questions
        if run.frame(item.stamp_ns) is not None
    ]
    points = [point for series in ages.values() for point in series]
    most_ms = 1e3 * max(y for _, y in [*points, *asked])
    top_ms, tick_ms = _nice_top(most_ms)
    return _rendered(
        "latency.svg.jinja",
        ages=ages,
        asked=asked,
        last_s=max(x for x, _ in points) or 1.0,
        top_ms=top_ms,
        tick_ms=tick_ms,
        levels={name: age for name, age in (("p50", p50_s), ("p99", p99_s)) if age is not None},
    )


def _nice_top(most: float) -> tuple[float, float]:
    """End of the axis and distance of its ticks: 4 to 8 ticks at round numbers."""
    most = max(most, 1.0)
    power = 10.0 ** math.floor(math.log10(most))
    tick = next(
        step * power for step in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if most / (step * power) <= 8
    )
    return math.ceil(most / tick + 1e-9) * tick, tick


def similarity_plot(run: DemoRun) -> str:
    """How alike the embeddings of all pairs of frames are, as a map in SVG: frames down and across,
    dark where they are alike. "" where the model gave none.
    """
    embeds = {frame.number: frame.answers.get("embed") for frame in run.frames}
    known = {
        number: answer.vector
        for number, answer in embeds.items()
        if answer is not None and answer.vector is not None
    }
    if len(known) < 2:
        return ""
    vectors = np.stack(list(known.values()))
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    alike = vectors @ vectors.T
    low = float(alike.min())
    return _rendered(
        "similarity.svg.jinja",
        frames=list(known),
        alike=alike.tolist(),
        strength=np.clip((alike - low) / max(1.0 - low, 1e-6), 0.0, 1.0).tolist(),
        low=low,
        dimensions=vectors.shape[1],
    )
