"""PaliGemma's masks: from sixteen codes of a box to an outline in it.

The codes are those of a small discrete autoencoder that is not part of the checkpoint: its decoder,
published with big_vision as ``vae-oid.npz`` (after Ning et al., 2023, arXiv:2301.02229), gives
64 x 64 numbers, above 0 inside the object.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from librobot_vlm_ros.core import ErrorCode, ModelError
from librobot_vlm_ros.models.checkpoints.shards import check_archive, iterate_tensors

#: Entries of the codebook of masks, and codes of a mask.
CODES, TOKENS = 128, 16
#: Corners (x, y) from 0 to 1 of the box that the mask lies in.
Outline = Sequence[tuple[float, float]]

#: Side of the grid of codes, of the mask, and length of a codebook entry.
_GRID, _SIDE, _ENTRY = 4, 64, 512
_WIDTH = 128
_CODEBOOK = "_vq_vae._embedding"
#: The largest array of a decoder has a twentieth of that.
_MOST_BYTES = 16 << 20
#: Names that the weights may have beside a checkpoint.
_FILES = ("mask_decoder.safetensors", "vae-oid.npz")
_WAYS = (
    "get vae-oid.npz, published with big_vision (gs://big_vision/paligemma/vae-oid.npz), and give "
    "its path as the option mask_decoder, or put it into the folder of the weights"
)
#: A mask is drawn this many times larger for its outline, which lies on the centres of pixels: the
#: error is half of one of the larger ones.
_ZOOM = 8
#: Parts smaller than this share of the mask are specks.
_SPECK = 0.01


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class MaskDecoder(nn.Module):
    """The decoder; its parameters have the names of the published file."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(_ENTRY, _WIDTH, 1), nn.ReLU()]
        layers += [_Residual(_WIDTH), _Residual(_WIDTH)]
        width = _WIDTH
        for step in range(4):
            narrower = _WIDTH >> step
            layers += [nn.ConvTranspose2d(width, narrower, 4, stride=2, padding=1), nn.ReLU()]
            width = narrower
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width, 1, 1))
        self._vq_vae = nn.Module()
        self._vq_vae.register_parameter("_embedding", nn.Parameter(torch.zeros(CODES, _ENTRY)))

    def forward(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, 16], row by row of the grid, to [B, 64, 64]; inside is above 0."""
        entries = self._vq_vae._embedding[codes]
        grid = entries.unflatten(1, (_GRID, _GRID)).permute(0, 3, 1, 2)
        mask: Tensor = self.decoder(grid)[:, 0]
        return mask


def find_mask_decoder(folder: Path) -> Path | None:
    """The decoder's weights in a checkpoint folder, None where there are none."""
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def missing_mask_decoder(what: str) -> ModelError:
    """The error for masks without a decoder."""
    return ModelError(ErrorCode.WEIGHTS_NOT_FOUND, what, _WAYS)


def read_mask_decoder(path: Path) -> MaskDecoder:
    """The decoder of a .npz or .safetensors file, float32 on the CPU.

    Raises ModelError: WEIGHTS_NOT_FOUND, UNSAFE_CHECKPOINT for pickled arrays, WEIGHTS_CORRUPT,
    KEY_MISMATCH, SHAPE_MISMATCH, NAN_WEIGHTS.
    """
    if not path.is_file():
        raise missing_mask_decoder(f"there is no mask decoder {path}")
    decoder = MaskDecoder()
    places = dict(decoder.named_parameters())
    tensors = _arrays(path) if path.suffix == ".npz" else iterate_tensors(path)
    for name, value in tensors:
        place = places.pop(name, None)
        if place is None:
            if _is_wanted(name):
                raise ModelError(ErrorCode.KEY_MISMATCH, f"{path.name}: {name} has no place")
            continue  # the encoder, or what was only needed to train it
        if place.shape != value.shape:
            raise ModelError(
                ErrorCode.SHAPE_MISMATCH,
                f"{path.name}: {name} is {list(value.shape)}, expected {list(place.shape)}",
            )
        if not bool(torch.isfinite(value).all()):
            raise ModelError(ErrorCode.NAN_WEIGHTS, f"{path.name}: {name} holds NaN or infinity")
        with torch.no_grad():
            place.copy_(value)
    if places:
        raise ModelError(
            ErrorCode.KEY_MISMATCH,
            f"{path.name} is no mask decoder: it lacks {', '.join(sorted(places)[:4])}",
            _WAYS,
        )
    decoder.eval().requires_grad_(False)
    return decoder


def _is_wanted(name: str) -> bool:
    return name.startswith("decoder.") or name == _CODEBOOK


def _arrays(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The arrays that the decoder has; the encoder's are not unpacked."""
    check_archive(path)
    try:
        with path.open("rb") as file:  # numpy leaves its own open where it fails
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile) or archive.zip is None:
                raise ValueError("it holds a single array")
            sizes = {entry.filename: entry.file_size for entry in archive.zip.infolist()}
            for name in filter(_is_wanted, archive.files):
                if sizes.get(f"{name}.npy", 0) > _MOST_BYTES:
                    raise ValueError(f"{name} would unpack to {sizes[f'{name}.npy']} bytes")
                array = archive[name]
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"{name} is no array")
                if array.dtype.kind in "fiu":
                    yield name, torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise _corrupt(path, error) from error
        raise ModelError(
            ErrorCode.UNSAFE_CHECKPOINT,
            f"{path.name} holds pickled objects, which may run code; they were not opened",
            _WAYS,
        ) from error
    except (EOFError, KeyError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # MemoryError: what is in the file is small, so a header lies about its array.
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> ModelError:
    return ModelError(
        ErrorCode.WEIGHTS_CORRUPT, f"{path.name} is not a whole .npz file: {error}", _WAYS
    )


def write_mask_decoder(folder: Path, decoder: MaskDecoder) -> None:
    """Write it beside a checkpoint, where `find_mask_decoder` finds it."""
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in decoder.state_dict().items()}
    save_file(state, folder / _FILES[0], metadata={"format": "pt"})


def draw(decoder: MaskDecoder, codes: Sequence[Sequence[int]]) -> list[list[Outline]]:
    """Outlines of the mask of each sixteen codes, see `outlines`."""
    if not codes:
        return []
    with torch.no_grad():
        masks = decoder(torch.tensor(codes)).numpy()
    return [outlines(mask) for mask in masks]


def outlines(mask: npt.NDArray[np.float32]) -> list[Outline]:
    """Outlines of the parts of a mask [H, W] that is above 0 inside, as (x, y) from 0 to 1 of it.

    The largest part comes first; holes are filled, and specks are left out.
    """
    import cv2

    height, width = mask.shape
    size = (width * _ZOOM, height * _ZOOM)
    inside = (cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR) > 0).astype(np.uint8)
    found, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    parts = sorted(found, key=cv2.contourArea, reverse=True)
    shapes: list[Outline] = []
    for part in parts:
        if cv2.contourArea(part) < _SPECK * size[0] * size[1]:
            break
        # Corners that are less than half a pixel of the mask off the line say nothing.
        points = cv2.approxPolyDP(part, _ZOOM / 2, closed=True).reshape(-1, 2)
        if len(points) >= 3:
            shapes.append([((x + 0.5) / size[0], (y + 0.5) / size[1]) for x, y in points.tolist()])
    return shapes
