"""`report.html`: the whole run on one page that needs nothing else, no network, no script.

What the page looks like stands in the template `report.html.jinja` and the style sheet `report.css`
beside this file; here is what it shows. The template escapes every text that comes from a model or
a bag; only the plots, which are our own SVG, are marked safe.
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.core.drawing import colour_of, hexadecimal, ink_on
from librobot_vlm_ros.demo.data import DemoRun, FrameRecord
from librobot_vlm_ros.demo.pictures import duration
from librobot_vlm_ros.demo.plot import TASK_CLASSES, latency_plot, similarity_plot
from librobot_vlm_ros.demo.scores import Summary, answer_is_right, missed_objects, vocabulary

_JPEG_QUALITY = 88
_TILES = (
    ("precision", "detection precision", "boxes with the right name at IoU ≥ 0.5"),
    ("recall", "detection recall", "objects in view that were found"),
    ("mean_iou", "mean IoU", "overlap of the boxes that match"),
    ("grounding_hit", "grounding hit rate", "the object asked for was met"),
    ("caption_exact", "captions exact", "named exactly what is in view"),
    ("frame_age_p50_s", "frame age, median", "from arrival to publication"),
    ("frame_age_p99_s", "frame age, p99", "the slowest of a hundred"),
    ("queries_ok", "questions answered", "asked by service while playing"),
)


def save_report(run: DemoRun, summary: Summary, path: Path) -> None:
    """Write the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    words = vocabulary(run)
    tasks = sorted({task for frame in run.frames for task in frame.answers})
    ages = (_number(summary["frame_age_p50_s"]), _number(summary["frame_age_p99_s"]))
    page = environment.get_template("report.html.jinja").render(
        run=run,
        summary=summary,
        tiles=[_tile(run, summary, *tile) for tile in _TILES],
        legend=[(task, TASK_CLASSES.get(task, "s5")) for task in tasks],
        latency=latency_plot(run, *ages),
        similarity=similarity_plot(run),
        questions=_questions(run, words),
        cards=[_card(run, frame, words) for frame in run.frames],
    )
    path.write_text(page + "\n", encoding="utf-8")


def _tile(
    run: DemoRun, summary: Summary, key: str, name: str, meaning: str
) -> dict[str, str | None]:
    figure, unit = summary[key], ""
    if figure is None:
        value = "–"
    elif key.endswith("_s"):
        value, unit = duration(float(figure)).split()
    elif key == "queries_ok":
        value, unit = str(figure), f"of {len(run.questions)}"
    else:
        value = f"{float(figure):.3f}"
    return {"value": value, "unit": unit, "name": name, "meaning": meaning}


def _questions(run: DemoRun, words: frozenset[str]) -> list[dict[str, Any]]:
    rows = []
    for answer in run.questions:
        frame = run.frame(answer.stamp_ns)
        found = ", ".join(_in_words(region) for region in answer.regions)
        rows.append(
            {
                "task": answer.task,
                "prompt": answer.prompt,
                "said": answer.error or found or (answer.text if answer.task == "caption" else ""),
                "frame": None if frame is None else frame.number,
                "took": duration(answer.took_s),
                "right": answer_is_right(run, answer, words),
            }
        )
    return rows


def _card(run: DemoRun, frame: FrameRecord, words: frozenset[str]) -> dict[str, Any]:
    """A frame with its answers. The picture is a JPEG under boxes as SVG, sharp at any size."""
    height, width = frame.pixels.shape[:2]
    unit = width / 320
    buffer = io.BytesIO()
    Image.fromarray(frame.pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    caption, ground = frame.answers.get("caption"), frame.answers.get("ground")
    detect = frame.answers.get("detect")
    detected = detect.regions if detect is not None else ()
    asked = ground.regions if ground is not None else ()
    missed = missed_objects(frame) if detect is not None else ()
    ages = [answer.age_s for answer in frame.answers.values()]
    return {
        "number": frame.number,
        "seconds": f"{(frame.stamp_ns - run.frames[0].stamp_ns) / 1e9:.2f}",
        "age": duration(max(ages)) if ages else "",
        "width": width,
        "height": height,
        "jpeg": base64.b64encode(buffer.getvalue()).decode("ascii"),
        "boxes": [
            *(_box(region, "missed", "#fff", unit, "missed: ") for region in missed),
            *(_box(region, "asked", "#fff", unit, "asked for: ", 2.5 * unit) for region in asked),
            *(
                _box(region, "found", hexadecimal(colour_of(region.label)), unit)
                for region in detected
            ),
        ],
        "tags": [_tag(region, width, unit) for region in detected],
        "caption": caption,
        "caption_right": answer_is_right(run, caption, words),
        "ground": ground,
        "found": ", ".join(_in_words(region) for region in asked),
        "ground_right": answer_is_right(run, ground, words),
    }


def _box(
    region: Region, kind: str, colour: str, unit: float, prefix: str = "", grow: float = 0.0
) -> dict[str, str]:
    return {
        "kind": kind,
        "x": f"{region.x_min - grow:.1f}",
        "y": f"{region.y_min - grow:.1f}",
        "width": f"{region.x_max - region.x_min + 2 * grow:.1f}",
        "height": f"{region.y_max - region.y_min + 2 * grow:.1f}",
        "line": f"{1.5 * unit:.1f}",
        "colour": colour,
        "title": prefix + _in_words(region),
    }


def _tag(region: Region, width: int, unit: float) -> dict[str, str]:
    """The label's plate above its box, or inside where there is no room."""
    colour = colour_of(region.label)
    text = _label_and_score(region)
    wide, high = (len(text) * 4.4 + 5) * unit, 10 * unit
    x = max(0.0, min(region.x_min, width - wide))
    y = region.y_min - high if region.y_min >= high else region.y_min
    return {
        "x": f"{x:.1f}",
        "y": f"{y:.1f}",
        "width": f"{wide:.1f}",
        "height": f"{high:.1f}",
        "round": f"{2 * unit:.1f}",
        "colour": hexadecimal(colour),
        "text": text,
        "text_x": f"{x + 2.5 * unit:.1f}",
        "text_y": f"{y + 7.6 * unit:.1f}",
        "text_width": f"{wide - 5 * unit:.1f}",
        "size": f"{8 * unit:.1f}",
        "ink": hexadecimal(ink_on(colour)),
    }


def _label_and_score(region: Region) -> str:
    return region.label if math.isnan(region.score) else f"{region.label} {region.score:.2f}"


def _in_words(region: Region) -> str:
    return f"{_label_and_score(region)} [{' '.join(f'{edge:.0f}' for edge in region.box)}]"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
