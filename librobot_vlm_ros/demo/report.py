"""`report.html`: the whole run on one page that needs nothing else, no network, no script."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path

from PIL import Image

from librobot_vlm_ros.core import Region
from librobot_vlm_ros.core.drawing import colour_of, hexadecimal, ink_on
from librobot_vlm_ros.demo.data import DemoRun, FrameRecord
from librobot_vlm_ros.demo.pictures import duration
from librobot_vlm_ros.demo.plot import TASK_CLASSES, latency_plot, similarity_plot
from librobot_vlm_ros.demo.scores import Summary, answer_is_right, missed_objects, vocabulary

__all__ = ["STYLE", "save_report"]

STYLE = """
:root{color-scheme:light dark;--paper:#f8fafc;--card:#fff;--ink:#0f172a;--soft:#64748b;
--rule:#e2e8f0;--good:#15803d;--bad:#b91c1c;--s1:#2563eb;--s2:#d97706;--s3:#059669;--s4:#9333ea;
--s5:#64748b}
@media (prefers-color-scheme:dark){:root{--paper:#0b1220;--card:#131c2e;--ink:#e2e8f0;
--soft:#94a3b8;--rule:#263349;--good:#4ade80;--bad:#f87171;--s1:#60a5fa;--s2:#fbbf24;--s3:#34d399;
--s4:#c084fc;--s5:#94a3b8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:30px;margin:0 0 6px}h1 span{color:var(--soft);font-weight:400}
h2{font-size:20px;margin:40px 0 10px}
header p{max-width:75ch;color:var(--soft);margin:0}
.failures{color:var(--bad);font-weight:600}
.note{color:var(--soft);font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:12px;
margin-top:24px}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 16px}
.tile b{display:block;font-size:28px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile b small{font-size:15px;font-weight:400;color:var(--soft)}
.tile span{display:block;font-weight:600}.tile>small{color:var(--soft)}
.plot{width:100%;background:var(--card);border:1px solid var(--rule);border-radius:12px}
.plot text{fill:var(--soft);font-size:12px;paint-order:stroke;stroke:var(--card);
stroke-width:4px}
.plot.map{max-width:760px;color:var(--s1)}
.plot .grid{stroke:var(--rule)}
.plot .level{stroke:var(--soft);stroke-dasharray:5 4}
.plot .line{fill:none;stroke:currentColor;stroke-width:1.5;opacity:.55}
.plot .dot{fill:currentColor}
.plot .mark{fill:var(--bad)}
.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}.s4{color:var(--s4)}.s5{color:var(--s5)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:18px;padding:0;margin:0 0 8px}
.legend li::before{content:"\\25CF";margin-right:6px}
.legend .mark{color:var(--bad)}.legend .mark::before{content:"\\25B2"}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--rule);
border-radius:12px;overflow:hidden}
th,td{text-align:left;padding:7px 12px;border-top:1px solid var(--rule);vertical-align:top}
td.number{white-space:nowrap}
th{border-top:0;color:var(--soft);font-weight:600}
a{color:inherit}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.frames{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:12px;
overflow:hidden}
figure:target{outline:3px solid var(--s1)}
figure svg{display:block;width:100%}
figure text{font-family:system-ui,sans-serif;font-weight:600}
figure .found,figure .asked,figure .missed{fill:#fff;fill-opacity:0}
figure .found:hover,figure .asked:hover{fill-opacity:.25}
figure .missed{stroke-dasharray:5 4}
figure .asked,figure .missed{filter:drop-shadow(0 0 1.2px #000)}
figcaption{padding:10px 14px}figcaption p{margin:2px 0}
.caption{font-weight:600}
.right{color:var(--good);font-weight:700}.wrong{color:var(--bad);font-weight:700}
.unknown{color:var(--soft)}
details{margin-top:30px}summary{cursor:pointer}
footer{margin-top:36px;color:var(--soft);font-size:13px;max-width:80ch}
"""


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
