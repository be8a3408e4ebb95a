"""`report.html`: the whole run on one page that needs nothing else, no network, no script."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path

from PIL import Image

from librobot_vlm_ros.cli.demo.data import DemoRun, FrameRecord
from librobot_vlm_ros.cli.demo.plot import TASK_CLASSES, latency_plot, similarity_plot
from librobot_vlm_ros.cli.demo.scores import Summary, answer_is_right, missed_objects, vocabulary
from librobot_vlm_ros.cli.demo.style import STYLE
from librobot_vlm_ros.cli.demo.words import duration
from librobot_vlm_ros.core import Region
from librobot_vlm_ros.core.colours import colour_of, hexadecimal, ink_on

__all__ = ["save_report"]

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
    words = vocabulary(run)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>librobot_vlm_ros: {escape(run.model)} on {escape(run.bag.name)}</title>",
        f"<style>{STYLE}</style></head><body><main>",
        _head(run, summary),
        _tiles(run, summary),
        f"<h2>Latency</h2>{_legend(run)}",
        latency_plot(run, _number(summary["frame_age_p50_s"]), _number(summary["frame_age_p99_s"])),
        _questions(run, words),
        f"<h2>Embeddings</h2>{alike}" if (alike := similarity_plot(run)) else "",
        "<h2>Every frame</h2><p class='note'>Coloured: what the model detected, with its "
        "score. White: what the instruction asked for. Dashed: what it missed. Point at a box for "
        "its numbers.</p><div class='frames'>",
        *(_card(run, frame, words) for frame in run.frames),
        "</div>",
        _foot(run, summary),
        "</main></body></html>",
    ]
    path.write_text("".join(parts), encoding="utf-8")


def _head(run: DemoRun, summary: Summary) -> str:
    failed = "".join(f"<li>{escape(text)}</li>" for text in run.failures)
    verdict = f"<ul class='failures'>{failed}</ul>" if failed else ""
    equal = "every" if summary["stamps_equal"] else "<b>not every</b>"
    return (
        f"<header><h1>{escape(run.model)} <span>watching {escape(run.bag.name)}</span></h1>"
        f"<p>{summary['frames']} frames of {escape(run.image_topic)} were played to the node over "
        f"DDS; it published {summary['results']} results, {equal} one under the stamp, frame and "
        f"size of its source image. The model was ready after {run.load_s:.1f} s, the bag took "
        f"{run.play_s:.1f} s.</p>{verdict}</header>"
    )


def _tiles(run: DemoRun, summary: Summary) -> str:
    tiles = []
    for key, name, meaning in _TILES:
        value = summary[key]
        if value is None:
            shown = "–"
        elif key.endswith("_s"):
            number, unit = duration(float(value)).split()
            shown = f"{number}<small> {unit}</small>"
        elif key == "queries_ok":
            shown = f"{value}<small> of {len(run.questions)}</small>"
        else:
            shown = f"{float(value):.3f}"
        tiles.append(
            f"<div class='tile'><b>{shown}</b><span>{name}</span><small>{meaning}</small></div>"
        )
    return f"<section class='tiles'>{''.join(tiles)}</section>"


def _legend(run: DemoRun) -> str:
    tasks = sorted({task for frame in run.frames for task in frame.answers})
    keys = "".join(
        f"<li class='{TASK_CLASSES.get(task, 's5')}'>{escape(task)}</li>" for task in tasks
    )
    return f"<ul class='legend'>{keys}<li class='mark'>question (sent to answered)</li></ul>"


def _questions(run: DemoRun, words: frozenset[str]) -> str:
    rows = []
    for answer in run.questions:
        frame = run.frame(answer.stamp_ns)
        found = ", ".join(_in_words(region) for region in answer.regions)
        said = answer.error or found or (answer.text if answer.task == "caption" else "")
        shown = "–" if frame is None else f"<a href='#f{frame.number}'>{frame.number}</a>"
        rows.append(
            f"<tr><td><code>{escape(answer.task)}</code></td>"
            f"<td>{escape(answer.prompt) or '–'}</td>"
            f"<td>{escape(said) or 'nothing found'}</td><td>{shown}</td>"
            f"<td class='number'>{duration(answer.took_s)}</td>"
            f"<td>{_mark(answer_is_right(run, answer, words))}</td></tr>"
        )
    if not rows:
        return ""
    head = "".join(f"<th>{n}</th>" for n in ("task", "asked", "answer", "frame", "took", "right"))
    return (
        "<h2>Questions asked while it played</h2><div class='scroll'><table>"
        f"<tr>{head}</tr>{''.join(rows)}</table></div>"
    )


def _card(run: DemoRun, frame: FrameRecord, words: frozenset[str]) -> str:
    caption = frame.answers.get("caption")
    ground = frame.answers.get("ground")
    lines = []
    if caption is not None:
        right = _mark(answer_is_right(run, caption, words))
        lines.append(f"<p class='caption'>{escape(caption.error or caption.text)} {right}</p>")
    if ground is not None:
        right = _mark(answer_is_right(run, ground, words))
        found = ", ".join(_in_words(region) for region in ground.regions) or "not found"
        lines.append(
            f"<p>asked for <i>{escape(ground.prompt)}</i>: {escape(ground.error or found)} "
            f"{right}</p>"
        )
    seconds = (frame.stamp_ns - run.frames[0].stamp_ns) / 1e9
    ages = [answer.age_s for answer in frame.answers.values()]
    age = f", {duration(max(ages))} old when its last result came" if ages else ", no results"
    return (
        f"<figure id='f{frame.number}'>{_picture(frame)}<figcaption>{''.join(lines)}"
        f"<p class='note'>frame {frame.number} at {seconds:.2f} s{age}</p></figcaption></figure>"
    )


def _picture(frame: FrameRecord) -> str:
    """The frame as JPEG with the boxes as SVG over it, sharp at any size."""
    height, width = frame.pixels.shape[:2]
    buffer = io.BytesIO()
    Image.fromarray(frame.pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    unit = width / 320
    parts = [
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='frame {frame.number}'>",
        f"<image width='{width}' height='{height}' href='data:image/jpeg;base64,{data}'/>",
    ]
    detected, ground = frame.answers.get("detect"), frame.answers.get("ground")
    for region in missed_objects(frame) if detected is not None else ():
        parts.append(_box(region, "missed", "#fff", unit, "missed: "))
    for region in ground.regions if ground is not None else ():
        parts.append(_box(region, "asked", "#fff", unit, "asked for: ", grow=2.5 * unit))
    for region in detected.regions if detected is not None else ():
        parts.append(_box(region, "found", hexadecimal(colour_of(region.label)), unit))
    for region in detected.regions if detected is not None else ():
        parts.append(_tag(region, width, unit))
    return "".join([*parts, "</svg>"])


def _box(
    region: Region, kind: str, colour: str, unit: float, prefix: str = "", grow: float = 0.0
) -> str:
    x, y = region.x_min - grow, region.y_min - grow
    wide, high = region.x_max - region.x_min + 2 * grow, region.y_max - region.y_min + 2 * grow
    return (
        f"<rect class='{kind}' x='{x:.1f}' y='{y:.1f}' width='{wide:.1f}' height='{high:.1f}' "
        f"rx='{1.5 * unit:.1f}' stroke='{colour}' stroke-width='{1.5 * unit:.1f}'>"
        f"<title>{escape(prefix + _in_words(region))}</title></rect>"
    )


def _tag(region: Region, width: int, unit: float) -> str:
    colour = colour_of(region.label)
    score = "" if math.isnan(region.score) else f" {region.score:.2f}"
    text = f"{region.label}{score}"
    wide, high = (len(text) * 4.4 + 5) * unit, 10 * unit
    x = max(0.0, min(region.x_min, width - wide))
    y = region.y_min - high if region.y_min >= high else region.y_min
    return (
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{wide:.1f}' height='{high:.1f}' rx='{2 * unit:.1f}' "
        f"fill='{hexadecimal(colour)}'/><text x='{x + 2.5 * unit:.1f}' y='{y + 7.6 * unit:.1f}' "
        f"textLength='{wide - 5 * unit:.1f}' lengthAdjust='spacingAndGlyphs' "
        f"font-size='{8 * unit:.1f}' fill='{hexadecimal(ink_on(colour))}'>{escape(text)}</text>"
    )


def _in_words(region: Region) -> str:
    box = " ".join(f"{edge:.0f}" for edge in region.box)
    score = "" if math.isnan(region.score) else f" {region.score:.2f}"
    return f"{region.label}{score} [{box}]"


def _mark(right: bool | None) -> str:
    if right is None:
        return "<span class='unknown' title='cannot be said from the ground truth'>·</span>"
    return "<span class='right'>✓</span>" if right else "<span class='wrong'>✗</span>"


def _foot(run: DemoRun, summary: Summary) -> str:
    told = "".join(f"<li>{escape(text)}</li>" for _, text in run.instructions)
    given = f"<h2>Instructions on the way</h2><ol>{told}</ol>" if told else ""
    rows = "".join(f"<tr><td><code>{k}</code></td><td>{v}</td></tr>" for k, v in summary.items())
    return (
        f"{given}<details><summary>summary.json</summary><table>{rows}</table></details>"
        "<footer>Lock-step replay: each frame was sent when the one before had been answered, at "
        "most at the speed it was recorded with. Figures come from comparing every result with the "
        "ground truth in the bag.</footer>"
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
