"""The demo from its first check to its last line: play, record, compare, report."""

from __future__ import annotations

import heapq
import json
import operator
import shutil
import textwrap
import time
from pathlib import Path

from librobot_vlm_ros.bags import BagReader, BagWriter, shipped_bag
from librobot_vlm_ros.client.ros_domain import isolated_ros
from librobot_vlm_ros.console import Console
from librobot_vlm_ros.core import BagError, ErrorCode, ModelError, as_vlm_error
from librobot_vlm_ros.demo.data import Answer, DemoRun
from librobot_vlm_ros.demo.pictures import save_frames, save_overview
from librobot_vlm_ros.demo.play import read_frames, run_live
from librobot_vlm_ros.demo.report import save_report
from librobot_vlm_ros.demo.scores import Summary, answer_is_right, summarize, vocabulary
from librobot_vlm_ros.models import model_info
from librobot_vlm_ros.models.backend import ModelInfo

_TASKS = ("caption", "detect", "ground", "embed")

#: What the embedded model is held to on the bag that ships.
TARGETS = {
    "precision": 0.90,
    "recall": 0.90,
    "mean_iou": 0.80,
    "caption_exact": 0.85,
    "grounding_hit": 0.92,
}


def run_demo(model: str, bag: Path | None, image_topic: str, rate: float, out: Path) -> int:
    """Everything; the exit code. Raises `VlmError` for what keeps it from starting or ending."""
    console = Console()
    began_s = time.monotonic()
    info = model_info(model)
    _require_weights(info)
    path = bag or shipped_bag()
    tasks = [task for task in _TASKS if task in info.tasks]
    _clear(out)
    run = DemoRun(model=info.name, bag=path, image_topic=image_topic)
    with BagReader(path) as reader:
        run.frames = read_frames(reader, image_topic)
        if not run.frames:
            raise BagError(ErrorCode.BAG_UNREADABLE, f"{path} has no message on {image_topic}")
        with isolated_ros() as domain:
            console.stage(f"ROS domain {domain}, on this machine only")
            run_live(run, reader, tasks, rate, out / "node.log", console)
        console.stage(f"writing {out}")
        _save_bag(run, reader, out / "output_bag")
    save_frames(run, out / "frames")
    save_overview(run, out / "overview.png")
    summary = summarize(run, time.monotonic() - began_s)
    if not summary["stamps_equal"]:
        run.failures.append(
            f"{run.unmatched} of {len(run.results)} results carried a stamp, frame or size that is "
            "not that of an image that was sent"
        )
    save_report(run, summary, out / "report.html")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _show(console, run, summary, out)
    return 1 if run.failures else 0


def _require_weights(info: ModelInfo) -> None:
    from librobot_vlm_ros.models.checkpoints.hub import weights_present

    if weights_present(info):
        return
    if info.shipped_folder is not None:
        file = f"models/checkpoints/shipped/{info.shipped_folder}/model.safetensors"
        why = f"in this installation ({file})"
        hint = "Use a complete checkout or installation; or name another model with --model."
    else:
        why = "on this machine, and the demo downloads nothing"
        hint = f"Fetch them first: huggingface-cli download {info.default_pretrained}"
    raise ModelError(ErrorCode.WEIGHTS_NOT_FOUND, f"the weights of {info.name} are not {why}", hint)


def _clear(out: Path) -> None:
    """Remove what an earlier run left, and nothing else, so that no old figure passes for new."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "report.html", "overview.png", "node.log"):
            (out / name).unlink(missing_ok=True)
        for picture in (out / "frames").glob("frame_*.png"):
            picture.unlink()
        old = out / "output_bag"
        if (old / "metadata.yaml").exists():
            shutil.rmtree(old)
    except OSError as error:
        raise as_vlm_error(error) from error


def _save_bag(run: DemoRun, reader: BagReader, path: Path) -> None:
    """Write the input's topics unchanged and every result, in order of time.

    A result is recorded as long after its frame as it took to arrive. Raises `BagError`.
    """
    late_ns = {frame.stamp_ns: frame.bag_ns - round(frame.sent_s * 1e9) for frame in run.frames}
    results = [
        (round(item.arrived_s * 1e9) + late_ns[item.stamp_ns], item.topic, item.data)
        for item in run.results
        if item.stamp_ns in late_ns
    ]
    recorded = ((item.stamp_ns, item.topic, item.data) for item in reader.messages())
    when = operator.itemgetter(0)
    rows = heapq.merge(recorded, sorted(results, key=when), key=when)
    with BagWriter(path, overwrite=True, types=reader.typestore) as bag:
        for topic in reader.topics:
            bag.add_topic(topic.name, topic.type, topic.qos)
        for result in run.results:
            bag.add_topic(result.topic, result.type)
        for stamp_ns, name, data in rows:
            bag.write(name, stamp_ns, data)


def _show(console: Console, run: DemoRun, summary: Summary, out: Path) -> None:
    words = vocabulary(run)
    console.line()
    rows = [
        (
            answer.task,
            answer.prompt or "-",
            textwrap.shorten(answer.error or _said(answer), 60, placeholder="…"),
            f"{answer.took_s * 1e3:.0f}",
            {True: "yes", False: "no", None: "-"}[answer_is_right(run, answer, words)],
        )
        for answer in run.questions
    ]
    if rows:
        header = ("question", "about", "answer", "ms", "right")
        console.table(rows, header=header, right="lllrl")
        console.line()
    held = run.model == "florence-2-tabletop"
    figures = []
    for key, value in summary.items():
        target = TARGETS.get(key) if held else None
        note = ""
        if target is not None and isinstance(value, float):
            reached = value >= target
            note = f"{'≥' if reached else 'below'} {target:.2f}"
            note = console.paint(note, "green" if reached else "bold red")
        figures.append((key, "-" if value is None else str(value), note))
    console.table(figures, header=("figure", "value", "target"))
    console.line()
    for failure in run.failures[:20]:
        console.line(f"{console.paint('failed:', 'bold red')} {failure}")
    console.line(f"{console.paint('report:', 'bold')} {(out / 'report.html').resolve()}")


def _said(answer: Answer) -> str:
    """The answer in words; the text of a region task is the model's own notation."""
    if answer.regions:
        return ", ".join(region.label for region in answer.regions)
    return answer.text if answer.task == "caption" and answer.text else "nothing"
