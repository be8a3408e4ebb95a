"""`librobot-vlm annotate` as its user meets it: bags in, a bag with originals and results out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rectangle_bag import START_NS, write_rectangle_bag

from librobot_vlm_ros.annotate import run as annotate_run
from librobot_vlm_ros.annotate.job import open_bags
from librobot_vlm_ros.annotate.workers import run_here
from librobot_vlm_ros.bags import BagReader, BagWriter, shipped_bag
from librobot_vlm_ros.cli.main import main

pytestmark = pytest.mark.ros
Captured = pytest.CaptureFixture[str]
FRAMES = 40  # on each of two cameras: five segments
RAW, JPEG = "/camera/image_raw", "/camera_jpeg/image_raw/compressed"
TASKS = ["--tasks", "caption", "ground", "--model", "fake"]
#: Runs the command after `PATCH`, which may end the process at a chosen point.
PROGRAM = """
import os, resource, signal, sys
from librobot_vlm_ros.annotate import journal as annotate_journal, run as annotate_run
from librobot_vlm_ros.bags import BagWriter
from librobot_vlm_ros.cli.main import main

def die_at(owner, name, call, after=False):
    original, calls = getattr(owner, name), []
    def wrapped(*args, **kwargs):
        calls.append(0)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return value
    setattr(owner, name, wrapped)

if __name__ == "__main__":
    exec(os.environ["PATCH"])
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("in") / "bag"
    write_rectangle_bag(path, FRAMES)
    return path


@pytest.fixture(scope="module")
def reference(bag: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a run gives that nothing interrupts."""
    out = tmp_path_factory.mktemp("reference") / "out"
    assert main(["annotate", str(bag), str(out), *TASKS]) == 0
    return contents(out)


def contents(path: Path) -> list[Any]:
    """All messages in order, results without what differs from run to run: their timings."""
    found = []
    with BagReader(path) as reader:
        for message in reader.messages():
            data: Any = message.data
            if message.topic.startswith("/vlm"):
                value = reader.deserialize(message)
                info = value.info
                info.preprocess_s = info.inference_s = info.age_s = 0.0
                data = repr(value)
            found.append((message.stamp_ns, message.topic, data))
    return found


def start(folder: Path, patch: str, *words: object) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, str(program), "annotate", *map(str, words)],
        env={**os.environ, "PATCH": patch, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_originals_and_results_are_there_in_order_of_time(reference: list[Any], bag: Path) -> None:
    originals = [row for row in reference if not row[1].startswith("/vlm")]
    assert originals == contents(bag)
    assert [row[0] for row in reference] == sorted(row[0] for row in reference)
    counts: dict[str, int] = {}
    for _, topic, _ in reference:
        counts[topic] = counts.get(topic, 0) + 1
    assert counts["/vlm/caption"] == counts["/vlm/grounding"] == 2 * FRAMES
    place = {row: number for number, row in enumerate(reference)}
    results = [row for row in reference if row[1] == "/vlm/caption"]
    images = [row for row in reference if row[1] in (RAW, JPEG)]
    for image in images:  # none before its image, one for each
        mine = [row for row in results if row[0] == image[0]]
        assert len(mine) == 2
        assert min(place[image], place[images[0]]) < place[mine[-1]]


def test_results_are_the_nodes_own_messages(
    reference: list[Any], bag: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [str(bag), str(out), *TASKS, "--topics", RAW, "--storage", "db3"]
    assert main(["annotate", *words]) == 0
    with BagReader(bag) as source, BagReader(out) as results:
        first = source.deserialize(next(source.messages([RAW])))
        grounding = [results.deserialize(m) for m in results.messages(["/vlm/grounding"])]
        assert results.require_topic("/vlm/caption").type == "librobot_vlm_ros/msg/Caption"
    answer = grounding[0]
    assert answer.header == first.header
    assert (answer.image_width, answer.image_height) == (first.width, first.height)
    assert (answer.info.model, answer.info.camera, answer.info.task) == ("fake", "camera", "ground")
    # the instruction of the bag changes in the middle
    asked = [(item.info.prompt, item.info.instruction_id) for item in grounding]
    half = FRAMES // 2
    assert asked == [("red box", 1)] * half + [("blue box", 2)] * half
    assert all(region.label == "red box" for region in answer.regions)


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_with_nothing_lost_or_doubled(
    bag: Path, reference: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    points = [
        "die_at(annotate_journal.FramePlan, '__getitem__', 30)",  # in the middle of the plan
        "die_at(annotate_run.Journal, 'commit', 2)",
        "die_at(annotate_run.Journal, 'commit', 2, after=True)",
        "die_at(BagWriter, 'write', 100)",
        "die_at(annotate_run, 'put_in_place', 1)",
    ]
    for point in points:
        killed = start(tmp_path, point, bag, out, *TASKS)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
        assert not out.exists()
    done = start(tmp_path, "", bag, out, *TASKS, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_frames"] == 2 * FRAMES
    assert contents(out) == reference
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith("out")] == ["out"]


def test_killed_after_the_last_step_but_one_it_is_finished(
    bag: Path, reference: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    point = "die_at(annotate_run, 'put_in_place', 1, after=True)"
    assert start(tmp_path, point, bag, out, *TASKS).returncode == -signal.SIGKILL
    assert contents(out) == reference
    assert main(["annotate", str(bag), str(out), *TASKS, "--resume"]) == 0
    assert not (tmp_path / "out.partial").exists()
    assert contents(out) == reference


@pytest.mark.slow
def test_two_workers_from_db3_killed_and_resumed(reference: list[Any], tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "bag"
    write_rectangle_bag(source, FRAMES, storage="db3")
    words = [source, out, *TASKS, "--workers", 2]
    killed = start(tmp_path, "die_at(annotate_run.Journal, 'commit', 2)", *words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = start(tmp_path, "", *words, "--json")
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["resumed_frames"] < 2 * FRAMES
    assert " left" in done.stderr
    with BagReader(out) as reader:
        assert {file.suffix for file in out.iterdir()} == {".db3", ".yaml"}
        assert reader.message_count == len(reference)
    assert sorted(map(str, contents(out))) == sorted(map(str, reference))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [75_000, 300_000])
def test_a_full_disk_is_said_and_what_was_complete_is_kept(
    bag: Path, reference: list[Any], tmp_path: Path, limit: int
) -> None:
    """The lower limit stops the journal, the higher one the writing of the bag."""
    out = tmp_path / "out"
    words = [bag, out, *TASKS, "--storage", "db3"]
    full = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    failed = start(tmp_path, full, *words)
    assert failed.returncode == 1
    assert "DISK_FULL(603)" in failed.stderr
    assert failed.stderr.count("cannot grow") == 1
    assert "are kept in" in failed.stderr
    assert not (tmp_path / "out.partial" / "bag").exists()
    assert "Traceback" not in failed.stderr
    assert not out.exists()
    done = start(tmp_path, "", *words, "--json")
    resumed = json.loads(done.stdout)["resumed_frames"]
    assert 0 < resumed < 2 * FRAMES if limit < 200_000 else resumed == 2 * FRAMES
    assert sorted(map(str, contents(out))) == sorted(map(str, reference))


def test_bad_frames_are_counted_and_end_nothing(tmp_path: Path, capsys: Captured) -> None:
    with BagWriter(tmp_path / "bag") as bag:
        bag.add_topic(JPEG, "sensor_msgs/msg/CompressedImage")
        bag.add_topic(RAW, "sensor_msgs/msg/Image")
        bag.write(RAW, START_NS, b"\x00\x01\x00\x00no image")
        good = shipped_frame()
        bag.write(RAW, START_NS + 1, good)
        bag.write(RAW, START_NS + 2, good[:-100])
        bag.write(JPEG, START_NS + 3, good)
    words = [str(tmp_path / "bag"), str(tmp_path / "out"), *TASKS[:2], *TASKS[3:], "--json"]
    assert main(["annotate", *words]) == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert (summary["frames"], summary["bad_frames"], summary["results"]) == (4, 3, 1)
    assert sum(summary["bad_frames_by_code"].values()) == 3
    assert "bad frame on /camera/image_raw" in shown.err


def shipped_frame() -> bytes:
    with BagReader(shipped_bag()) as reader:
        return next(reader.messages([RAW])).data


def test_failing_answers_are_results_with_their_code(bag: Path, tmp_path: Path) -> None:
    config = ["--model-config", '{"fail_every": 4}']
    assert main(["annotate", str(bag), str(tmp_path / "out"), *TASKS, *config]) == 0
    with BagReader(tmp_path / "out") as reader:
        codes = [
            reader.deserialize(message).error_code
            for message in reader.messages(["/vlm/caption", "/vlm/grounding"])
        ]
    assert codes.count(400) == len(codes) // 4 == FRAMES


def test_several_bags_become_one(bag: Path, tmp_path: Path, capsys: Captured) -> None:
    later = tmp_path / "later"
    write_rectangle_bag(later, 3, jpeg_topic=None)
    words = [str(bag), str(later), str(tmp_path / "out"), *TASKS, "--topics", RAW, "--json"]
    assert main(["annotate", *words]) == 0
    topics = json.loads(capsys.readouterr().out)["topics"]
    assert topics[RAW] == topics["/vlm/caption"] == FRAMES + 3
    stamps = [row[0] for row in contents(tmp_path / "out")]
    assert stamps == sorted(stamps)


@pytest.mark.parametrize(
    ("words", "frames"),
    [
        (["--every", "10"], 4),
        (["--rate", "2"], 8),
        (["--tasks", "caption@5"], 20),
        (["--tasks", "front:caption", "--topics", f"front={RAW}"], 40),
    ],
)
def test_fewer_frames_on_request(
    bag: Path, tmp_path: Path, capsys: Captured, words: list[str], frames: int
) -> None:
    """40 frames at 10 Hz."""
    base = [str(bag), str(tmp_path / "out"), "--model", "fake", "--json"]
    assert main(["annotate", *base, "--tasks", "caption", "--topics", RAW, *words]) == 0
    assert json.loads(capsys.readouterr().out)["topics"]["/vlm/caption"] == frames


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--topics", "/instruction"], "WRONG_TYPE(602)"),
        (["--topics", "/nothing"], "TOPIC_NOT_IN_BAG(601)"),
        (["--instruction-topic", RAW], "WRONG_TYPE(602)"),
        (["--tasks", "juggle"], "UNKNOWN_TASK(202)"),
        (["--tasks", "answer", "--model", "florence-2-tabletop"], "TASK_NOT_SUPPORTED(203)"),
        (["--tasks", "ground", "--instruction-topic", ""], "EMPTY_PROMPT(200)"),
        (["--model", "fakee"], "UNKNOWN_MODEL(300)"),
        (["--model-config", '{"load_error": 302}'], "WEIGHTS_CORRUPT(302)"),
        (["--batch", "65"], "BAD_PARAMETER(204)"),
    ],
)
def test_what_does_not_fit_is_refused(
    bag: Path, tmp_path: Path, capsys: Captured, words: list[str], code: str
) -> None:
    assert main(["annotate", str(bag), str(tmp_path / "out"), *TASKS, *words]) == 1
    shown = capsys.readouterr().err
    assert code in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_an_existing_bag_is_replaced_only_on_request(
    bag: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    write_rectangle_bag(out, 1)
    words = ["annotate", str(bag), str(out), *TASKS, "--every", "20"]
    assert main(words) == 1
    assert main([*words, "--resume"]) == 1
    assert "PATH_NOT_ALLOWED(605)" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    with BagReader(out) as reader:
        assert reader.require_topic("/vlm/caption").count == 4
    assert main(["annotate", str(out), str(out), *TASKS, "--overwrite"]) == 1
    assert main(["annotate", str(out), str(tmp_path / "next"), *TASKS]) == 1
    assert "holds /vlm/caption, /vlm/grounding already" in capsys.readouterr().err


def everything(folder: Path) -> dict[str, bytes]:
    return {str(item): item.read_bytes() for item in folder.rglob("*") if item.is_file()}


@pytest.mark.parametrize("linked", [False, True])
def test_a_bag_in_the_place_of_the_work_is_left_alone(
    tmp_path: Path, capsys: Captured, linked: bool
) -> None:
    place = tmp_path / "zz.partial"
    write_rectangle_bag(tmp_path / "bag" if linked else place, 2)
    if linked:
        place.symlink_to(tmp_path / "bag")
    before = everything(tmp_path)
    for words in ([], ["--overwrite"]):
        assert main(["annotate", str(place), str(tmp_path / "zz"), *TASKS, *words]) == 1
        assert "PATH_NOT_ALLOWED(605)" in capsys.readouterr().err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("what", ["file", "link", "foreign", "journal", "lock"])
def test_what_is_not_of_annotate_in_the_place_of_the_work_is_left_alone(
    bag: Path, tmp_path: Path, capsys: Captured, what: str
) -> None:
    place, precious = tmp_path / "out.partial", tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_text("x")
    if what in ("foreign", "journal", "lock"):
        place.mkdir()
    if what == "file":
        place.write_text("x")
    elif what == "link":
        place.symlink_to(precious)
    elif what == "foreign":
        (place / "x").write_text("x")
    elif what == "journal":
        (place / "journal.db").mkdir()
    else:
        (place / "lock").symlink_to(precious / "x")
    before = everything(tmp_path)
    for words in ([], ["--overwrite"]):
        assert main(["annotate", str(bag), str(tmp_path / "out"), *TASKS, *words]) == 1
        shown = capsys.readouterr().err
        assert "PATH_NOT_ALLOWED(605)" in shown
        assert "Traceback" not in shown
    assert everything(tmp_path) == before


@pytest.mark.parametrize("words", [["--node", "bad name!"], ["--workers", "65"]])
def test_wrong_names_and_numbers_are_wrong_usage(
    bag: Path, tmp_path: Path, words: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["annotate", str(bag), str(tmp_path / "out"), *TASKS, *words])
    assert ended.value.code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("frames", "expected"), [(24, 2), (8, 1)])
def test_no_more_processes_than_segments_are_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, expected: int
) -> None:
    write_rectangle_bag(tmp_path / "bag", frames, jpeg_topic=None)
    asked: list[int] = []

    def instead(count: int, job: Any, instructions: Any, segments: Any, *told: Any) -> Any:
        asked.append(count)
        with open_bags(job.options.bags, salvage=False) as readers:
            yield from run_here(job, readers, instructions, segments, *told)

    monkeypatch.setattr(annotate_run, "run_in_processes", instead)
    words = [str(tmp_path / "bag"), str(tmp_path / "out"), *TASKS, "--workers", "12"]
    assert main(["annotate", *words]) == 0
    assert asked == ([expected] if expected > 1 else [])


def test_an_unfinished_run_is_not_mixed_with_another(
    bag: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "out"
    point = "die_at(annotate_run.Journal, 'commit', 2)"
    assert start(tmp_path, point, bag, out, *TASKS).returncode == -signal.SIGKILL
    assert main(["annotate", str(bag), str(out), *TASKS, "--every", "2"]) == 1
    assert "unfinished run with other every" in capsys.readouterr().err
    assert main(["annotate", str(bag), str(out), *TASKS, "--every", "2", "--overwrite"]) == 0


def test_a_run_that_did_not_get_to_its_first_frame_is_in_nobodys_way(
    bag: Path, tmp_path: Path, capsys: Captured
) -> None:
    words = ["annotate", str(bag), str(tmp_path / "out"), "--tasks", "caption"]
    assert main([*words, "--model", "fake", "--model-config", '{"load_error": 301}']) == 1
    assert "WEIGHTS_NOT_FOUND(301)" in capsys.readouterr().err
    assert main([*words, "--model", "fake"]) == 0


def test_of_a_bag_that_is_cut_off_the_whole_part_is_annotated_on_request(
    tmp_path: Path, capsys: Captured
) -> None:
    write_rectangle_bag(tmp_path / "bag", 200, jpeg_topic=None, compress=False)
    file = tmp_path / "bag" / "bag.mcap"
    os.truncate(file, file.stat().st_size * 3 // 4)
    words = ["annotate", str(tmp_path / "bag"), str(tmp_path / "out"), *TASKS, "--json"]
    assert main(words) == 1
    assert "BAG_TRUNCATED(607)" in capsys.readouterr().err
    assert main([*words, "--salvage"]) == 0
    shown = capsys.readouterr()
    topics = json.loads(shown.out)["topics"]
    assert 100 <= topics[RAW] == topics["/vlm/caption"] < 200
    assert "is not whole, lost is" in shown.err


def test_of_a_bag_that_is_damaged_all_but_a_chunk_is_annotated_on_request(
    tmp_path: Path, capsys: Captured
) -> None:
    write_rectangle_bag(tmp_path / "bag", 200, jpeg_topic=None, compress=False)
    file = tmp_path / "bag" / "bag.mcap"
    bad = bytearray(file.read_bytes())
    bad[len(bad) // 2] ^= 0xFF
    file.write_bytes(bytes(bad))
    words = ["annotate", str(tmp_path / "bag"), str(tmp_path / "out"), *TASKS, "--json"]
    assert main(words) == 1
    refused = capsys.readouterr().err
    assert "BAG_UNREADABLE(600)" in refused
    assert "--salvage" in refused
    assert main([*words, "--salvage"]) == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert 50 <= summary["topics"][RAW] == summary["topics"]["/vlm/caption"] < 200
    assert "a damaged chunk at byte" in summary["lost"][str(tmp_path / "bag")]
    with BagReader(tmp_path / "out") as out, BagReader(tmp_path / "bag", salvage=True) as source:
        assert [m.data for m in source.messages([RAW])] == [m.data for m in out.messages([RAW])]


@pytest.mark.slow
def test_the_shipped_model_annotates_the_shipped_bag(tmp_path: Path, capsys: Captured) -> None:
    words = [str(shipped_bag()), str(tmp_path / "out"), "--model", "florence-2-tabletop", "--json"]
    tasks = ["--tasks", "caption", "embed", "--topics", RAW, "--every", "10"]
    assert main(["annotate", *words, *tasks]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["frames"], summary["failed_results"]) == (3, 0)
    with BagReader(tmp_path / "out") as reader:
        captions = [reader.deserialize(m) for m in reader.messages(["/vlm/caption"])]
    assert all(caption.text and 0 < caption.score <= 1 for caption in captions)
