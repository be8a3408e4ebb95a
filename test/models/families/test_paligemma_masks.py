"""PaliGemma's masks: the decoder against its arithmetic in numpy, outlines, and what is refused."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

from librobot_vlm_ros.core import ErrorCode, ModelError, VlmError
from librobot_vlm_ros.models import create_vlm
from librobot_vlm_ros.models.families.paligemma.masks import draw, outlines, read_mask_decoder
from librobot_vlm_ros.models.families.paligemma.model import PaliGemmaVLM
from librobot_vlm_ros.models.families.paligemma.processor import parse_masks
from librobot_vlm_ros.models.generation.config import Generated
from librobot_vlm_ros.models.testing.paligemma import mask_decoder_weights, write_official

Array = npt.NDArray[np.float32]
CODES = list(range(5, 125, 8))  # fifteen
CODES.append(127)
SEG = "".join(f"<seg{code:03}>" for code in CODES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("paligemma") / "published"
    write_official(made)
    return made


@pytest.fixture
def vlm(folder: Path) -> PaliGemmaVLM:
    return create_vlm("paligemma-3b", pretrained=str(folder), device="cpu")


def convolved(x: Array, kernel: Array, bias: Array) -> Array:
    """[in, H, W] with [out, in, k, k], borders padded with zeros so that the size stays."""
    side = kernel.shape[2]
    height, width = x.shape[1:]
    padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2))
    total = np.zeros((kernel.shape[0], height, width), np.float64)
    for row in range(side):
        for column in range(side):
            window = padded[:, row : row + height, column : column + width]
            total += np.einsum("oi,ihw->ohw", kernel[:, :, row, column], window)
    return total + bias[:, None, None]


def doubled(x: Array, kernel: Array, bias: Array) -> Array:
    """A transposed convolution: each input paints its kernel [in, out, 4, 4] at twice its place."""
    height, width = x.shape[1:]
    canvas = np.zeros((kernel.shape[1], 2 * height + 2, 2 * width + 2))
    for row in range(height):
        for column in range(width):
            painted = np.einsum("i,iokl->okl", x[:, row, column], kernel)
            canvas[:, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += painted
    return canvas[:, 1:-1, 1:-1] + bias[:, None, None]


def original_mask(state: dict[str, Array], codes: list[int]) -> Array:
    def of(name: str) -> tuple[Array, Array]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    x = state["_vq_vae._embedding"][codes].reshape(4, 4, -1).transpose(2, 0, 1)
    x = np.maximum(convolved(x, *of("decoder.0")), 0)
    for block in ("decoder.2.net", "decoder.3.net"):
        y = np.maximum(convolved(x, *of(f"{block}.0")), 0)
        y = np.maximum(convolved(y, *of(f"{block}.2")), 0)
        x = x + convolved(y, *of(f"{block}.4"))
    for layer in (4, 6, 8, 10):
        x = np.maximum(doubled(x, *of(f"decoder.{layer}")), 0)
    return convolved(x, *of("decoder.12"))[0]


def test_masks_equal_the_original_arithmetic(folder: Path) -> None:
    decoder = read_mask_decoder(folder / "vae-oid.npz")
    other = CODES[::-1]
    found = decoder(torch.tensor([CODES, other])).numpy()
    for mask, codes in zip(found, (CODES, other), strict=True):
        expected = original_mask(mask_decoder_weights(), codes)
        assert expected.shape == (64, 64)
        assert float(np.abs(expected).max()) > 0.05
        np.testing.assert_allclose(mask, expected, atol=1e-4 * np.abs(expected).max())


def test_the_outline_of_a_shape_lies_on_its_edge() -> None:
    place = np.arange(64)
    disc = (20.0 - np.hypot(place[None] - 31.5, place[:, None] - 31.5)).astype(np.float32)
    (outline,) = outlines(disc)
    for x, y in outline:  # the centre of the mask is (0.5, 0.5)
        assert math.hypot(64 * x - 32, 64 * y - 32) == pytest.approx(20, abs=0.5)
    whole = outlines(np.ones((64, 64), np.float32))
    assert np.array(whole[0]).min() < 0.002
    assert np.array(whole[0]).max() > 0.998
    assert outlines(-np.ones((64, 64), np.float32)) == []


def test_parts_are_outlined_each_and_specks_are_none() -> None:
    mask = -np.ones((64, 64), np.float32)
    mask[4:30, 4:30] = mask[40:60, 40:60] = mask[2, 60] = 1
    large, small = outlines(mask)
    assert max(x for x, _ in large) < 0.5 < min(x for x, _ in small)


def test_segmenting_gives_outlined_regions_in_pixels_of_the_image(vlm: PaliGemmaVLM, ask) -> None:
    vocabulary = vlm.tokenizer.vocabulary
    box = [vocabulary[f"<loc{number:04}>"] for number in (256, 128, 768, 640)]
    codes = [vocabulary[f"<seg{code:03}>"] for code in CODES]
    ids = (*box, *codes, *vlm.tokenizer.words(" cup"), 1)
    request = ask("segment", prompt="cup")  # the frame is 80 x 48
    answer = vlm.read(request, Generated(ids, (math.log(0.5),) * len(ids)))
    assert answer.malformed == 0
    assert answer.regions
    (drawn,) = draw(vlm._masks, [CODES])
    assert len(answer.regions) == len(drawn)
    for region, outline in zip(answer.regions, drawn, strict=True):
        assert region.label == "cup"
        assert region.score == pytest.approx(0.5)
        expected = [(10 + 40 * x, 12 + 24 * y) for x, y in outline]
        np.testing.assert_allclose(region.polygon, expected)
        xs, ys = zip(*region.polygon, strict=True)
        assert region.box == (min(xs), min(ys), max(xs), max(ys))


@pytest.mark.parametrize(
    ("text", "labels", "malformed"),
    [
        (f"<loc0000><loc0000><loc0512><loc0512>{SEG} cup", ["cup", "cup"], 0),
        (f"<loc0000><loc0000><loc0512><loc0512>{SEG}", ["given", "given"], 0),
        ("<loc0000><loc0000><loc0512><loc0512> cup", [], 1),
        (f"<loc0000><loc0000><loc0512><loc0512>{SEG[8:]} cup", [], 1),
        (f"<loc0000><loc0000><loc0512><loc0512>{SEG[8:]}<seg128> cup", [], 1),
        (f"<loc0005><loc0000><loc0005><loc0512>{SEG} cup", [], 1),
        (f"a ; <loc0000><loc0000><loc0512><loc0512>{SEG} cup", ["cup", "cup"], 1),
        ("", [], 1),
    ],
)
def test_answers_are_read(text: str, labels: list[str], malformed: int) -> None:
    triangle = [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5)]
    regions, bad = parse_masks(
        text, 100, 200, lambda codes: [[triangle, triangle]] * len(codes), "given"
    )
    assert ([region.label for region in regions], bad) == (labels, malformed)
    for region in regions:
        assert region.polygon == ((0.0, 0.0), (50.0, 0.0), (25.0, 50.0))
        assert region.box == (0.0, 0.0, 50.0, 50.0)


def test_an_empty_mask_is_counted() -> None:
    text = f"<loc0000><loc0000><loc0512><loc0512>{SEG} cup"
    assert parse_masks(text, 9, 9, lambda codes: [[]] * len(codes)) == ((), 1)


def test_without_a_decoder_the_request_names_the_option(
    folder: Path, tmp_path: Path, vlm: PaliGemmaVLM, ask
) -> None:
    request = ask("segment", prompt="cup")
    vlm.save_pretrained(tmp_path)
    assert not isinstance(vlm.run([request])[0], VlmError)
    kept = tmp_path / "mask_decoder.safetensors"
    again = create_vlm("paligemma-3b", pretrained=str(tmp_path), device="cpu")
    assert not isinstance(again.run([request])[0], VlmError)  # it was saved with the model
    kept.rename(tmp_path / "elsewhere.safetensors")
    without = create_vlm("paligemma-3b", pretrained=str(tmp_path), device="cpu")
    refused, answered = without.run([request, ask("ground", prompt="cup")])
    assert refused.code == ErrorCode.WEIGHTS_NOT_FOUND
    assert "mask_decoder" in str(refused)
    assert "vae-oid.npz" in str(refused)
    assert not isinstance(answered, VlmError)
    for options in (
        {"mask_decoder": tmp_path / "elsewhere.safetensors"},
        {"config": {"mask_decoder": str(folder / "vae-oid.npz")}},
    ):
        named = create_vlm("paligemma-3b", pretrained=str(tmp_path), device="cpu", **options)
        assert not isinstance(named.run([request])[0], VlmError)
        assert named.get_num_parameters() == vlm.get_num_parameters()


class TestAWrongFile:
    def code(self, path: Path) -> ErrorCode:
        with pytest.raises(ModelError) as caught:
            read_mask_decoder(path)
        return caught.value.code

    def test_that_is_not_there(self, tmp_path: Path) -> None:
        assert self.code(tmp_path / "vae-oid.npz") == ErrorCode.WEIGHTS_NOT_FOUND

    def test_with_pickled_objects(self, tmp_path: Path) -> None:
        state = {**mask_decoder_weights(), "decoder.0.bias": np.array([object()])}
        np.savez(tmp_path / "vae-oid.npz", **state)
        assert self.code(tmp_path / "vae-oid.npz") == ErrorCode.UNSAFE_CHECKPOINT

    @pytest.mark.parametrize("content", [b"", b"PK", b"no archive at all", "array"])
    def test_that_is_no_archive(self, tmp_path: Path, content: bytes | str) -> None:
        if content == "array":
            np.save(buffer := io.BytesIO(), np.zeros(3))
            content = buffer.getvalue()
        (tmp_path / "vae-oid.npz").write_bytes(content)
        found = self.code(tmp_path / "vae-oid.npz")
        assert found in (ErrorCode.WEIGHTS_CORRUPT, ErrorCode.UNSAFE_CHECKPOINT)

    def test_that_is_cut_off_or_changed(self, folder: Path, tmp_path: Path) -> None:
        whole = (folder / "vae-oid.npz").read_bytes()
        (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
        assert self.code(tmp_path / "cut.npz") == ErrorCode.WEIGHTS_CORRUPT
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 255
        (tmp_path / "changed.npz").write_bytes(changed)
        assert self.code(tmp_path / "changed.npz") == ErrorCode.WEIGHTS_CORRUPT
        with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
            archive.writestr("decoder.0.bias.npy", b"nothing")
        (tmp_path / "nothing.npz").write_bytes(buffer.getvalue())
        assert self.code(tmp_path / "nothing.npz") == ErrorCode.WEIGHTS_CORRUPT

    def test_with_other_layers(self, tmp_path: Path) -> None:
        path, state = tmp_path / "m.safetensors", mask_decoder_weights()
        for change, code in (
            ({"decoder.0.bias": np.zeros(3, np.float32)}, ErrorCode.SHAPE_MISMATCH),
            ({"decoder.0.bias": np.full(128, np.nan, np.float32)}, ErrorCode.NAN_WEIGHTS),
            ({"decoder.14.bias": np.zeros(3, np.float32)}, ErrorCode.KEY_MISMATCH),
        ):
            save_file({**state, **change}, path)
            assert self.code(path) == code
        save_file({k: v for k, v in state.items() if "decoder.2" not in k}, path)
        assert self.code(path) == ErrorCode.KEY_MISMATCH
        assert load_file(path)
