"""Sets of images on disk: folders of pictures, shards of `adadiff sample`, and guided-diffusion's .npz batches."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.numpy_files import npz_headers, read_npz
from ..data.pictures import FORMATS, find_pictures, picture_size, read_picture
from ..output import shards
from ..reading import read_json, reason

BATCH = 64  # images in a piece, at most
MOST_VALUES = 2**26  # in a piece of several images
MOST_PIXELS = 2**24  # of an image
CHANNELS = {"L": 1, "RGB": 3}


@dataclass(frozen=True)
class ImageSet:
    """`count` images of one shape (C, H, W). labels: int64 [count], or None."""

    source: str
    shape: tuple[int, int, int]
    count: int
    labels: Tensor | None
    read: Callable[[], Iterator[np.ndarray]]  # uint8 [k, H, W, C]

    def pieces(self, progress: bool = False) -> Iterator[Tensor]:
        """Reads the images in order, float32 [k, C, H, W] in [-1, 1] each. Raises ValueError for a damaged file."""
        with tqdm(total=self.count, disable=not progress, unit="image", dynamic_ncols=True) as bar:
            most = _in_a_piece(self.shape)
            for pixels in self.read():
                for start in range(0, len(pixels), most):
                    piece = torch.from_numpy(pixels[start : start + most])
                    yield piece.permute(0, 3, 1, 2).float() / 127.5 - 1
                    bar.update(len(piece))


def open_images(path: str | Path) -> ImageSet:
    """The images at `path`, one of: a folder of pictures of one size, subfolders included (data/pictures.py says which
    files count); a folder of pictures or shards that `adadiff sample` wrote; a .npz file with arr_0, uint8
    [n, H, W, C], and optionally arr_1, labels [n], as in guided-diffusion's samples and reference batches.

    Of pictures and shards, only headers are read yet. All pictures are read as RGB if one of them is. Labels come from
    `adadiff sample` or arr_1. Raises ValueError if there are no such images, if some are missing, or if sizes differ.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".npz":
        return _batch(path)
    if not path.is_dir():
        raise ValueError(f"no images at {path}: expected a folder or a .npz file")
    if (path / shards.MANIFEST).exists():
        return _shards(path)
    if (path / "report.json").exists():
        return _drawn_pictures(path)
    files = find_pictures(path).pictures
    if not files:
        raise ValueError(f"{path} holds no pictures ({', '.join(FORMATS)}) and no shards")
    return _pictures(path, files, None)


def is_images(path: str | Path) -> bool:
    """Whether `path` can hold images: a folder or a .npz file."""
    return Path(path).is_dir() or (Path(path).is_file() and Path(path).suffix == ".npz")


def _batch(path: Path) -> ImageSet:
    headers = npz_headers(path)
    if "arr_0" not in headers:
        raise ValueError(f"{path} holds {', '.join(sorted(headers)) or 'nothing'}; images would be arr_0")
    dtype, shape = headers["arr_0"].dtype, headers["arr_0"].shape
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in CHANNELS.values() or not math.prod(shape):
        raise ValueError(f"arr_0 of {path} must be images, uint8 [n, H, W, 1 or 3], got {dtype} {list(shape)}")
    count, H, W, C = shape
    _check_pixels(H * W, path)
    labels = headers.get("arr_1")
    if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iu"):
        raise ValueError(f"arr_1 of {path} must be labels, integers [{count}], got {labels.dtype} {labels.shape}")
    arrays = read_npz(path, headers.keys() & {"arr_0", "arr_1"})
    labels = torch.from_numpy(arrays["arr_1"].astype(np.int64)) if "arr_1" in arrays else None
    return ImageSet(str(path), (C, H, W), count, labels, lambda: iter([arrays["arr_0"]]))


def _shards(folder: Path) -> ImageSet:
    manifest = shards.Manifest.read(folder)
    if manifest.array != "images":
        raise ValueError(f"{folder} holds latents; evaluation takes images: draw pictures, with --decoder")
    if not manifest.n:
        raise ValueError(f"{folder} holds no samples")
    shards.read(folder)  # raises if shards are missing
    H, W, C = manifest.shape
    _check_pixels(H * W, folder)
    stored = sum(shards.shard_path(folder, i).stat().st_size for i in range(manifest.shards))
    if stored < manifest.n * math.prod(manifest.shape):
        raise ValueError(f"{folder} holds {stored} bytes, too few for {manifest.n} samples; its shards are damaged")
    labels = _cycled_labels(manifest.configuration, manifest.n, folder)
    return ImageSet(str(folder), (C, H, W), manifest.n, labels, lambda: (s["images"] for s in shards.read(folder)))


def _drawn_pictures(folder: Path) -> ImageSet:
    """The pictures that `adadiff sample` wrote, without grid.png."""
    numbers = sorted(int(file.stem) for file in folder.glob("*.png") if re.fullmatch(r"[0-9]{6,}", file.stem))
    report = folder / "report.json"
    try:
        configuration = read_json(report)["configuration"]
        n = configuration["n"]
        if type(n) is not int or n < 0:
            raise ValueError("its n is no whole number")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{report} is not a report of `adadiff sample`: {reason(error)}") from None
    if not n:
        raise ValueError(f"{folder} holds no samples")
    if len(numbers) != n or numbers != list(range(n)):
        raise ValueError(f"{folder} holds {len(numbers)} of {n} pictures; the command that began it draws the others")
    files = [folder / f"{number:06d}.png" for number in numbers]
    return _pictures(folder, files, _cycled_labels(configuration, n, folder))


def _cycled_labels(configuration: dict[str, Any], n: int, folder: Path) -> Tensor | None:
    labels = configuration.get("class_labels")
    if not labels:
        return None
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 2**31 for label in labels):
        raise ValueError(f"the class labels in the configuration of {folder} are invalid: {labels!r}")
    return torch.tensor(labels, dtype=torch.int64, device="cpu").repeat(math.ceil(n / len(labels)))[:n]


def _pictures(folder: Path, files: Sequence[Path], labels: Tensor | None) -> ImageSet:
    kinds: dict[tuple[int, int], Path] = {}
    channels = 1
    for file in files:
        mode, size = picture_size(file)
        kinds.setdefault(size, file)
        channels = max(channels, CHANNELS[mode])
    if len(kinds) > 1:
        (a, first), (b, other), *_ = kinds.items()
        sizes = f"{first} is {a[0]}x{a[1]}, {other} is {b[0]}x{b[1]}"
        raise ValueError(f"pictures must be of one size, but {sizes}; crop and resize them")
    ((W, H),) = kinds
    _check_pixels(H * W, folder)
    shape = (channels, H, W)
    mode = "L" if channels == 1 else "RGB"

    def read() -> Iterator[np.ndarray]:
        most = _in_a_piece(shape)
        for start in range(0, len(files), most):
            pixels = [_read(file, mode, (W, H)) for file in files[start : start + most]]
            yield np.stack(pixels).reshape(len(pixels), H, W, channels)

    return ImageSet(str(folder), shape, len(files), labels, read)


def _read(file: Path, mode: str, size: tuple[int, int]) -> np.ndarray:
    picture = read_picture(file)
    if picture.size != size or (mode == "L" and picture.mode != "L"):
        raise ValueError(f"{file} has changed since it was opened")
    return np.asarray(picture.convert(mode))


def _in_a_piece(shape: tuple[int, int, int]) -> int:
    return max(1, min(BATCH, MOST_VALUES // math.prod(shape)))


def _check_pixels(pixels: int, source: Path) -> None:
    if pixels > MOST_PIXELS:
        raise ValueError(f"{source} holds images of {pixels} pixels; evaluation takes at most {MOST_PIXELS}")
