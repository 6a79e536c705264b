"""Images on disk, to evaluate or to compare with: pictures, shards of `adadiff sample`, guided-diffusion's batches."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.image_sets import SUFFIXES
from ..output import shards
from ..output.shards import read_arrays

BATCH = 64  # images in a piece
MODES = {"L": 1, "RGB": 3}


@dataclass(frozen=True)
class ImageSet:
    """`count` images of one shape, C, H, W. labels: int64 [count], or None."""

    source: str
    shape: tuple[int, int, int]
    count: int
    labels: Tensor | None
    read: Callable[[], Iterator[np.ndarray]]  # uint8 [k, H, W, C]

    def pieces(self, progress: bool = False) -> Iterator[Tensor]:
        """Reads them: float32 [k, C, H, W] in [-1, 1], in order. Raises ValueError where a file proves damaged."""
        with tqdm(total=self.count, disable=not progress, unit="image", dynamic_ncols=True) as bar:
            for pixels in self.read():
                for start in range(0, len(pixels), BATCH):
                    piece = torch.from_numpy(pixels[start : start + BATCH])
                    yield piece.permute(0, 3, 1, 2).float() / 127.5 - 1
                    bar.update(len(piece))


def open_images(path: str | Path) -> ImageSet:
    """The images at `path`: a folder of pictures (PNG or JPEG, gray or RGB, of one size, subfolders included), one that
    `adadiff sample` wrote, pictures or shards, or a .npz with arr_0, uint8 [n, H, W, C], and perhaps arr_1, labels [n],
    as guided-diffusion's samples and reference batches are. Nothing but headers is read yet, of a .npz all.

    Labels are known of what `adadiff sample` wrote, and from arr_1. Raises ValueError where there are no such images,
    some are missing, or their sizes differ.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".npz":
        return _batch(path)
    if not path.is_dir():
        raise ValueError(f"no images at {path}: expected a folder or a .npz file")
    if (path / shards.MANIFEST).is_file():
        return _shards(path)
    if (path / "report.json").is_file():
        return _drawn_pictures(path)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))}) and no shards")
    return _pictures(path, files, None)


def is_images(path: str | Path) -> bool:
    """Whether images may lie there: a folder or a .npz file."""
    return Path(path).is_dir() or (Path(path).is_file() and Path(path).suffix == ".npz")


def array_names(path: Path) -> set[str]:
    """Of the arrays in a .npz file. Raises ValueError where it cannot be read."""
    try:
        with np.load(path) as file:
            return set(file.files)
    except Exception as error:  # which one depends on the byte that is wrong
        if isinstance(error, MemoryError):
            raise
        raise ValueError(f"{path} is no .npz file that can be read: {error}") from error


def _batch(path: Path) -> ImageSet:
    names = array_names(path)
    if "arr_0" not in names:
        raise ValueError(f"{path} holds {', '.join(sorted(names)) or 'nothing'}; images would be arr_0")
    arrays = read_arrays(path, names & {"arr_0", "arr_1"})
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in MODES.values() or not len(images):
        raise ValueError(
            f"arr_0 of {path} must be images, uint8 [n, H, W, 1 or 3], got {images.dtype} {list(images.shape)}"
        )
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(f"arr_1 of {path} must be labels, integers [{len(images)}], got {labels.dtype} {labels.shape}")
    count, H, W, C = images.shape
    labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return ImageSet(str(path), (C, H, W), count, labels, lambda: iter([images]))


def _shards(folder: Path) -> ImageSet:
    manifest = shards.Manifest.read(folder)
    if manifest.array != "images":
        raise ValueError(f"{folder} holds latents; evaluation takes images: draw pictures, with --decoder")
    if not manifest.n:
        raise ValueError(f"{folder} holds no samples")
    shards.read(folder)  # for its checks
    H, W, C = manifest.shape
    labels = _cycled_labels(manifest.configuration, manifest.n, folder)
    return ImageSet(str(folder), (C, H, W), manifest.n, labels, lambda: (s["images"] for s in shards.read(folder)))


def _drawn_pictures(folder: Path) -> ImageSet:
    """What `adadiff sample` wrote; grid.png is none of them."""
    files = sorted(file for file in folder.glob("*.png") if re.fullmatch(r"\d{6,}", file.stem))
    try:
        configuration = json.loads((folder / "report.json").read_text())["configuration"]
        n = int(configuration["n"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'report.json'} is not a report of `adadiff sample`: {error}") from None
    if not n:
        raise ValueError(f"{folder} holds no samples")
    if [int(file.stem) for file in files] != list(range(n)):
        raise ValueError(f"{folder} holds {len(files)} of {n} pictures; the command that began it draws the others")
    return _pictures(folder, files, _cycled_labels(configuration, n, folder))


def _cycled_labels(configuration: dict[str, Any], n: int, folder: Path) -> Tensor | None:
    labels = configuration.get("class_labels")
    if not labels:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise ValueError(f"the labels that {folder} tells of are none: {labels!r}")
    return torch.tensor(labels).repeat(math.ceil(n / len(labels)))[:n]


def _pictures(folder: Path, files: Sequence[Path], labels: Tensor | None) -> ImageSet:
    kinds: dict[tuple[int, int], Path] = {}
    channels = 1
    for file in files:
        with _opened(file) as picture:
            if picture.mode not in MODES:
                raise ValueError(f"{file} has mode {picture.mode}; convert it to gray or RGB, 8 bits each")
            kinds.setdefault(picture.size, file)
            channels = max(channels, MODES[picture.mode])
    if len(kinds) > 1:
        (a, first), (b, other), *_ = kinds.items()
        sizes = f"{first} is {a[0]}x{a[1]}, {other} is {b[0]}x{b[1]}"
        raise ValueError(f"pictures must be of one size, but {sizes}; crop and resize them")
    mode = "L" if channels == 1 else "RGB"

    def read() -> Iterator[np.ndarray]:
        for start in range(0, len(files), BATCH):
            pixels = [_read(file, mode) for file in files[start : start + BATCH]]
            yield np.stack(pixels).reshape(len(pixels), H, W, channels)

    ((W, H),) = kinds
    return ImageSet(str(folder), (channels, H, W), len(files), labels, read)


def _opened(file: Path) -> Image.Image:
    try:
        return Image.open(file)
    except OSError as error:
        raise ValueError(f"{file} is no picture that can be read: {error}") from error


def _read(file: Path, mode: str) -> np.ndarray:
    with _opened(file) as picture:
        try:
            return np.asarray(picture.convert(mode))
        except OSError as error:
            raise ValueError(f"{file} is no picture that can be read: {error}") from error
