"""The bench: pairs in turns, honest summaries, and memory that stays within its bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from librobot_vlm_ros.bench import report
from librobot_vlm_ros.bench.__main__ import main
from librobot_vlm_ros.bench.measure import Bench, Measurement
from librobot_vlm_ros.bench.memory import growth, loading
from librobot_vlm_ros.bench.structured import structured


def quiet(pairs: int = 3) -> Bench:
    return Bench("cpu", pairs, say=lambda text: None)


def test_both_sides_run_in_turns_and_the_first_pair_is_not_counted() -> None:
    order: list[str] = []
    bench = quiet()
    row = bench.paired(
        "row",
        lambda given: order.append(f"a{given}") or [given],
        lambda given: order.append(f"b{given}") or [given],
        [0, 1, 2],
    )
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert row.identical_tokens is True
    assert row.ratio_min <= row.ratio <= row.ratio_max
    assert bench.rows == [row]


def test_one_answer_that_differs_is_a_difference_even_in_the_warm_up() -> None:
    row = quiet().paired("row", lambda n: [n], lambda n: [n or 9], [0, 1, 2], target=0.0)
    assert row.identical_tokens is False
    assert not row.met


def test_ratios_are_medians_over_the_pairs() -> None:
    times = [(4.0, 1.0), (9.0, 3.0), (2.0, 1.0)]
    row = quiet().add("row", times, target=3.5)
    assert (row.ratio, row.ratio_min, row.ratio_max) == (3.0, 2.0, 4.0)
    assert not row.met
    share = quiet().add("row", times, share=True, target=0.4)
    assert share.ratio == pytest.approx(1 / 3)
    assert share.met


def test_a_summary_can_be_read_again(tmp_path: Path) -> None:
    bench = quiet()
    bench.add("fast <row>", [(4.0, 1.0)], True, note="a note", target=2.0)
    bench.add("slow row", [(1.0, 2.0)], None, share=True, target=1.4)
    report.write(tmp_path, bench.rows, "cpu", ["other: broke"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [Measurement(**row) for row in summary["measurements"]] == bench.rows
    assert summary["failures"] == ["other: broke"]
    assert summary["machine"]["torch"]
    table = (tmp_path / "table.txt").read_text()
    assert "4.00" in table and "≤ 1.4 MISSED" in table  # noqa: PT018
    assert "fast &lt;row&gt;" in (tmp_path / "plot.svg").read_text()
    assert "| fast <row>: a note | 4.00 × |" in report.markdown(summary)


def test_the_command_leaves_its_results_and_fails_where_nothing_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    words = ["bench", "--only", "preprocessing", "--pairs", "1", "--out", out]
    monkeypatch.setattr("sys.argv", words)
    assert main() == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["name"] for row in summary["measurements"]] == [
        f"preprocessing 1920x1080 to 768x768, {how}" for how in ("exact", "fast")
    ]
    monkeypatch.setattr("sys.argv", [*words, "--only", "nothing"])
    assert main() == 1


def test_loading_takes_little_more_memory_than_the_weights() -> None:
    bench = quiet()
    loading(bench)
    (row,) = bench.rows
    assert row.baseline > 150
    assert row.ratio <= 1.15, row


def test_memory_does_not_grow_with_the_number_of_inferences() -> None:
    bench = quiet()
    growth(bench, 80)
    (row,) = bench.rows
    assert row.ratio <= 1.03, row


def test_a_structured_answer_is_the_same_for_less() -> None:
    bench = quiet(1)
    structured(bench)
    (row,) = bench.rows
    assert row.name == "structured answer"
    assert row.identical_tokens is True
    assert "54 % less of the output layer" in row.note
