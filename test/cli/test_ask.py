"""`librobot-vlm ask`: a picture from a file, the answer printed and drawn."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from librobot_vlm_ros.cli.main import main
from librobot_vlm_ros.core import ErrorCode, ImageError, Limits, Region, VlmError
from librobot_vlm_ros.core.drawing import draw
from librobot_vlm_ros.core.images.picture_files import read_picture
from librobot_vlm_ros.models import registry

CORNERS = np.zeros((40, 60, 3), np.uint8)
CORNERS[:20, :30], CORNERS[:20, 30:], CORNERS[20:, :30] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def code_of(action: Callable[[], object]) -> ErrorCode:
    with pytest.raises(VlmError) as caught:
        action()
    return caught.value.code


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A frame of the shipped bag as a file."""
    from librobot_vlm_ros.bags import BagReader, shipped_bag
    from librobot_vlm_ros.core import decode_image

    with BagReader(shipped_bag()) as reader:
        message = reader.deserialize(next(iter(reader.messages(["/camera/image_raw"]))))
    pixels = decode_image(
        message.data,
        height=message.height,
        width=message.width,
        encoding=message.encoding,
        step=message.step,
    )
    path = tmp_path / "table.png"
    Image.fromarray(np.asarray(pixels)).save(path)
    return path


def test_the_shipped_model_answers_and_the_answer_is_drawn(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ask", str(table), "--model", "florence-2-tabletop", "--device", "cpu", "--json"]
    assert main([*words, "--task", "detect"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["regions"]
    assert answer["model"] == "florence-2-tabletop"
    assert answer["picture"] == f"{table}.answer.png"
    before, after = (np.asarray(Image.open(path)) for path in (table, answer["picture"]))
    height, width = before.shape[:2]
    assert after.shape[1] == width
    assert after.shape[0] > height  # the words stand below the picture
    changed = (before != after[:height]).any(axis=2)
    for region in answer["regions"]:
        x_min, y_min, x_max, y_max = map(round, region["box"])
        middle = (y_min + y_max) // 2
        assert changed[middle, max(0, x_min - 2) : x_min + 3].any(), region
        assert 0 < region["score"] <= 1
        assert x_max > x_min


def test_the_answer_is_printed_for_people(
    table: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "drawn.jpg"
    words = ["ask", str(table), "duck", "--model", "fake", "--task", "ground", "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].split()[:3] == ["label", "score", "x_min"]
    assert "duck" in shown.out
    assert f"drawn: {out}" in shown.err
    assert out.read_bytes()[:2] == b"\xff\xd8"  # as its name says
    assert main(["ask", str(table), "--model", "fake", "--task", "embed"]) == 0
    assert "embedding float32[16]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "dance"], "UNKNOWN_TASK(202)"),
        (["--model", "florence-3"], "UNKNOWN_MODEL(300)"),
        (["--task", "ground"], "EMPTY_PROMPT(200)"),
        (["--task", "region_caption"], "BAD_REGION(210)"),
        (["--task", "region_caption", "--region", "90", "90", "99", "99"], "BAD_REGION(210)"),
        (["x" * 5000, "--task", "ground"], "PROMPT_TOO_LONG(201)"),
        (["--out", "answer.doc"], "BAD_PARAMETER(204)"),
        (["--out", "answer.psd"], "BAD_PARAMETER(204)"),  # Pillow reads it and does not write it
        (["--out", "/no/such/folder/a.png"], "BAD_PARAMETER(204)"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "get_vlm", lambda name: pytest.fail("a model was loaded"))
    path = tmp_path / "a.png"
    Image.fromarray(CORNERS).save(path)
    assert main(["ask", str(path), *words]) == 1
    assert said in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == ["a.png"]


def test_a_task_that_the_model_cannot_do_names_those_that_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(CORNERS).save(path)
    words = ["ask", str(path), "what?", "--model", "florence-2-tabletop", "--task", "answer"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "TASK_NOT_SUPPORTED(203)" in said
    assert "Models that can:" in said
    assert "qwen2-vl-2b" in said
    assert "florence-2-base" not in said.split("Models that can:")[1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
def test_pictures_are_turned_as_their_exif_says(
    tmp_path: Path, orientation: int, kind: str
) -> None:
    from PIL import ImageOps

    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    Image.fromarray(CORNERS).save(path, exif=exif, **options.get(kind, {}))
    found = read_picture(path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 2  # two decoders of JPEG


def test_files_that_are_no_pictures_have_their_codes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"hello")
    assert code_of(lambda: read_picture(path)) == ErrorCode.BAD_IMAGE
    path.write_bytes(b"")
    assert code_of(lambda: read_picture(path)) == ErrorCode.BAD_IMAGE
    assert code_of(lambda: read_picture(tmp_path)) == ErrorCode.BAD_IMAGE
    assert code_of(lambda: read_picture(tmp_path / "b")) == ErrorCode.FILE_NOT_FOUND
    Image.fromarray(CORNERS).save(tmp_path / "a.jpg")
    path.write_bytes((tmp_path / "a.jpg").read_bytes()[:-200])
    assert code_of(lambda: read_picture(path)) == ErrorCode.CORRUPT_COMPRESSED


def test_what_is_no_regular_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo.png", tmp_path / "zero.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(ImageError, match="expected a picture in a regular file") as caught:
            read_picture(path)
        assert caught.value.code == ErrorCode.BAD_IMAGE


def test_paths_that_cannot_be_followed_have_their_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    for path in (loop, tmp_path / ("x" * 5000)):
        assert main(["ask", str(path), "--model", "fake"]) == 1
        said = capsys.readouterr().err
        assert "PATH_NOT_ALLOWED(605)" in said
        assert "Traceback" not in said


def test_a_picture_may_come_through_a_pipe_of_the_shell(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(CORNERS).save(buffer, "PNG")
    reader, writer = os.pipe()
    try:
        os.write(writer, buffer.getvalue())
        os.close(writer)
        assert (read_picture(Path(f"/dev/fd/{reader}")) == CORNERS).all()
    finally:
        os.close(reader)


def test_no_more_is_read_of_a_pipe_than_is_allowed() -> None:
    with open("/dev/zero", "rb") as endless:
        path = Path(f"/dev/fd/{endless.fileno()}")
        small = Limits(max_compressed_bytes=1000)
        assert code_of(lambda: read_picture(path, small)) == ErrorCode.IMAGE_TOO_LARGE


def test_formats_that_other_programs_would_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    Image.fromarray(CORNERS).save(tmp_path / "a.eps")
    for name in ("a.eps", "b.png"):
        (tmp_path / name).write_bytes((tmp_path / "a.eps").read_bytes())
        with pytest.raises(ImageError, match="expected one of JPEG, PNG") as caught:
            read_picture(tmp_path / name)
        assert caught.value.code == ErrorCode.BAD_IMAGE


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "gif", "webp"])
def test_formats_are_read_within_the_limits(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    Image.fromarray(CORNERS).save(path)
    assert read_picture(path).shape == CORNERS.shape
    small = Limits(max_pixels=1000)
    assert code_of(lambda: read_picture(path, small)) == ErrorCode.IMAGE_TOO_LARGE
    tight = Limits(max_compressed_bytes=10)
    assert code_of(lambda: read_picture(path, tight)) == ErrorCode.IMAGE_TOO_LARGE


def test_polygons_labels_and_odd_regions_are_drawn_inside_the_picture() -> None:
    pixels = np.full((120, 160, 3), 90, np.uint8)
    outline = ((20.0, 30.0), (100.0, 40.0), (60.0, 100.0))
    regions = [
        Region("red cube", 0.5, 20, 30, 100, 100, outline),
        Region("", float("nan"), 0, 0, 0, 0),
        Region("x" * 500, 1.0, 150, 0, 400, 300),
        Region("two\nlines", 0.1, -50, -50, -10, -10),
    ]
    drawn = draw(pixels, regions, "words")
    assert drawn.shape == pixels.shape
    assert (drawn[69:72, 78:82] != 90).any()  # on the polygon's right side, not on the box
    assert (pixels == 90).all()
    assert draw(pixels, [], "").tolist() == pixels.tolist()
    assert draw(pixels, [], "words " * 500, strip=True).shape[1] == 160
