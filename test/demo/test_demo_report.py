"""The report and the pictures: complete, self-contained, safe to open."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from librobot_vlm_ros.demo.data import Answer, DemoRun
from librobot_vlm_ros.demo.pictures import annotated, save_frames, save_overview
from librobot_vlm_ros.demo.report import latency_plot, save_report, similarity_plot
from librobot_vlm_ros.demo.scores import summarize

_VOID = {"meta", "image", "rect", "line", "circle", "polyline", "path", "br"}


class Page(HTMLParser):
    """Collects links and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("href", "src", "xlink:href")
        ]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: DemoRun, path: Path) -> Page:
    save_report(run, summarize(run, 1.0), path)
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_report_needs_nothing_but_itself(run: DemoRun, tmp_path: Path) -> None:
    page = page_of(run, tmp_path / "report.html")
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.links
    assert all(link.startswith(("data:image/jpeg;base64,", "#f")) for link in page.links)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "url(" not in text
    assert "prefers-color-scheme" in text


def test_the_report_shows_every_frame_caption_and_box(run: DemoRun, tmp_path: Path) -> None:
    page = page_of(run, tmp_path / "report.html")
    assert page.tags.count("figure") == len(run.frames)
    for words in ("a red cube and a duck", "a duck and a mug", "missed: red cube", "mug 0.40"):
        assert words in page.text


@pytest.mark.parametrize(
    "evil",
    [
        "<script>alert(1)</script>",
        """"/><script>alert('1')</script>""",
        "'></title></svg><script>alert(1)</script>",
        "{{ run }}{% raw %}<script>&lt;",
    ],
)
def test_text_from_models_and_bags_is_not_taken_for_html(
    run: DemoRun, tmp_path: Path, answer: Callable[..., Answer], evil: str
) -> None:
    run.frames[0].answers["caption"] = answer("caption", 1000, evil)
    box = (1.0, 1.0, 9.0, 9.0)
    run.frames[0].answers["detect"] = answer("detect", 1000, regions=[(evil, box, 0.5)])
    run.questions = [answer("ground", 1000, prompt=evil), answer("detect", 1000, error=evil)]
    run.instructions = [(1, evil)]
    run.failures = [evil]
    run.frames[1].answers["ground"] = answer("ground", 1001, prompt=evil, error=evil)
    run.model, run.bag, run.image_topic = evil, Path(evil.replace("/", "")), evil
    page = page_of(run, tmp_path / "report.html")
    assert "script" not in page.tags
    assert page.text.count(evil) >= 11


def test_a_run_without_results_still_gives_a_report(run: DemoRun, tmp_path: Path) -> None:
    for frame in run.frames:
        frame.answers = {}
    run.results = []
    page = page_of(run, tmp_path / "report.html")
    assert "No results to plot" in page.text


def test_the_plot_has_a_point_for_every_result(run: DemoRun) -> None:
    plot = latency_plot(run, 0.2, 0.3)
    assert plot.count("<circle") == 6
    assert plot.count("<polyline") == 3
    assert "p99 300 ms" in plot


def test_the_map_of_embeddings_shows_which_frames_are_alike(run: DemoRun) -> None:
    assert similarity_plot(run) == ""
    vectors = (np.array([3.0, 4.0], np.float32), np.array([4.0, 3.0], np.float32))
    for frame, vector in zip(run.frames, vectors, strict=True):
        asked = dataclasses.replace(frame.answers["caption"], task="embed", vector=vector)
        frame.answers["embed"] = asked
    shown = similarity_plot(run)
    assert shown.count("<rect") == 4
    assert "frames 0 and 1: 0.960" in shown
    assert "frames 1 and 1: 1.000" in shown


def test_a_picture_shows_boxes_where_they_are(run: DemoRun) -> None:
    picture = np.asarray(annotated(run.frames[0], 600)).astype(int)
    scale = 600 / 100
    red = picture[round(25 * scale), round(80 * scale) - 2 : round(80 * scale) + 3]
    assert any(pixel[0] > 200 and pixel[1] < 110 for pixel in red)  # the cube's right edge
    assert np.abs(picture[round(25 * scale), round(65 * scale)] - 90).max() < 5  # inside: as it was


def test_pictures_are_written_for_all_frames_and_an_overview(run: DemoRun, tmp_path: Path) -> None:
    paths = save_frames(run, tmp_path / "frames")
    assert [path.name for path in paths] == ["frame_0000.png", "frame_0001.png"]
    save_overview(run, tmp_path / "overview.png")
    with Image.open(tmp_path / "overview.png") as overview, Image.open(paths[0]) as frame:
        assert overview.width > 2 * 500
        assert frame.width == 640
