"""Rewrites the generated tables of the documentation from the one place each fact is declared in.

    tools/run python tools/docs_tables.py           rewrite
    tools/run python tools/docs_tables.py --check   say which page is out of date, exit 1

A generated table stands in a page of docs/ between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
FIGURES = ROOT / "librobot_vlm_ros/models/checkpoints/shipped/florence_2_tabletop/evaluation.json"
TORTURE = ROOT / "docs/torture.json"
BENCHES = [ROOT / "docs/bench.json", ROOT / "docs/bench_gpu.json"]
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)


def parameters() -> str:
    """The node's parameters."""
    from librobot_vlm_ros.ros.parameters.declaration import parameter_table
    from librobot_vlm_ros.ros.parameters.settings import PARAMETERS

    return parameter_table(PARAMETERS)


def models() -> str:
    """The registered models."""
    from librobot_vlm_ros.models import list_vlms, model_info

    rows = ["| model | parameters | licence | weights from | tasks |", "| --- " * 5 + "|"]
    for name in list_vlms():
        info = model_info(name)
        size = f"{info.parameters / 1e6:,.1f} M" if info.parameters else "none"
        source = f"`{info.default_pretrained}`" if info.default_pretrained else "in the package"
        tasks = ", ".join(info.tasks)
        rows.append(f"| `{name}` | {size} | {info.licence} | {source} | {tasks} |")
    return "\n".join(rows) + "\n"


def errors() -> str:
    """The error codes, by hundreds."""
    from librobot_vlm_ros.core import ErrorCode

    groups = {
        1: "the image", 2: "the request", 3: "the model and its weights", 4: "inference",
        5: "the engine", 6: "bags and files", 7: "the node", 9: "a defect of ours",
    }  # fmt: skip
    rows = ["| about | codes |", "| --- | --- |"]
    for hundred, about in groups.items():
        codes = [code for code in ErrorCode if code // 100 == hundred]
        rows.append(f"| {about} | " + ", ".join(f"`{c.name}` {c.value}" for c in codes) + " |")
    return "\n".join(rows) + "\n"


def quality() -> str:
    """What `make evaluate` measured of the embedded model that ships."""
    figures = json.loads(FIGURES.read_text())
    wanted = {
        "precision": ("detection precision, IoU ≥ 0.5 and label correct", 0.90),
        "recall": ("detection recall, likewise", 0.90),
        "mean_iou": ("mean IoU of the matches", 0.80),
        "ap": ("COCO AP, mean over IoU 0.50 to 0.95 and over labels", None),
        "ap50": ("COCO AP at IoU 0.50", None),
        "grounding_hit": ("phrase grounding hit rate", 0.92),
        "caption_exact": ("captions that name exactly the objects there", 0.85),
    }
    rows = [
        f"`make evaluate SEED={figures['seed']} FRAMES={figures['frames']}`, "
        f"{figures['objects']} objects in {figures['frames']} frames never trained on:",
        "",
        "| measure | measured | aimed at |",
        "| --- | --- | --- |",
    ]
    rows += [
        f"| {what} | {figures[key]:.3f} | {f'{aim:.2f}' if aim else ''} |"
        for key, (what, aim) in wanted.items()
    ]
    return "\n".join(rows) + "\n"


def reliability() -> str:
    """What `make torture` measured, from the committed copy of its summary."""
    results = json.loads(TORTURE.read_text(encoding="utf-8"))
    rows = [
        f"`make torture`, {results['machine']}:",
        "",
        "| row | what must hold | cases | failures | measured (allowed) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in results["rows"]:
        figures = ", ".join(
            f"{_figure(name)} {value:,.4g} (≤ {entry[name + '_limit']:g})"
            for name, value in entry.items()
            if name + "_limit" in entry
        )
        others = ", ".join(
            f"{_figure(name)} {entry[name]:,.4g}"
            for name in _SHOWN
            if name in entry and f"{name}_limit" not in entry
        )
        priority = f"{entry['priority']} priority" if "priority" in entry else ""
        measured = ", ".join(text for text in (figures, others, priority) if text)
        rows.append(
            f"| {entry['name'].replace('_', ' ')} | {entry['what']} | {entry['cases']:,} "
            f"| {entry['failures']:,} | {measured} |"
        )
    return "\n".join(rows) + "\n"


_SHOWN = ("minutes", "lost", "calls_per_s", "kills", "goal_handles_left", "slope_mib_per_h")
_UNITS = {"mib_per_h": "[MiB/h]", "per_s": "[1/s]", "mib": "[MiB]", "ms": "[ms]", "s": "[s]"}


def _figure(name: str) -> str:
    """`busy_p99_ms` as `busy p99 [ms]`."""
    for ending, unit in _UNITS.items():
        if name.endswith("_" + ending):
            return f"{name.removesuffix('_' + ending).replace('_', ' ')} {unit}"
    return name.replace("_", " ")


def performance() -> str:
    """What `make bench` measured, from the committed copies of its summaries."""
    from librobot_vlm_ros.bench.report import markdown

    return "\n".join(markdown(json.loads(path.read_text())) for path in BENCHES if path.is_file())


PARTS: dict[str, Callable[[], str]] = {
    "parameters": parameters,
    "models": models,
    "errors": errors,
    "quality": quality,
    "reliability": reliability,
    "performance": performance,
}


def rendered(text: str) -> str:
    """A page's text with every generated table as it should be."""
    return _PART.sub(lambda match: match[1] + PARTS[match[2]]() + match[3], text)


def main() -> int:
    """Rewrite or check."""
    check = "--check" in sys.argv[1:]
    stale = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = rendered(text)
        if fresh == text:
            continue
        stale += 1
        if check:
            name = page.relative_to(ROOT)
            print(f"{name} is out of date: run `tools/run python tools/docs_tables.py`")
        else:
            page.write_text(fresh, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
