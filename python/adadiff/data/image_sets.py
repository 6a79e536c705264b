"""Image data sets in memory or in files: CIFAR-10, CelebA and ImageNet, see datasets.py."""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..reading import read_text
from .numpy_files import unpickle
from .pictures import FORMATS, MOST_PIXELS, find_pictures, is_picture, read_picture

EMPTY = f"holds no picture ({', '.join(FORMATS)}); remove the folder, or fill it"
FLAT_NAME = re.compile(r"(n\d{8})_")  # names of pictures that are not in a folder of their class


@dataclass(frozen=True)
class Pixels:
    """Small images, all in memory: uint8 [n, C, H, W], labels int64 [n]."""

    images: Tensor
    labels: Tensor
    classes: int
    moments = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[index].float() / 127.5 - 1, self.labels[index]


@dataclass(frozen=True)
class Images:
    """Images as tensors in memory: float32 [n, C, H, W] in [-1, 1], labels int64 [n]."""

    images: Tensor
    labels: Tensor
    moments = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@dataclass(frozen=True)
class ImageFiles:
    """Image files, read when a batch needs them. crop: picture -> uint8 [H, W, 3]."""

    paths: Sequence[Path]
    labels: Tensor | None
    classes: int
    shape: tuple[int, int, int]
    crop: Callable[[Image.Image], np.ndarray]
    moments = False

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        images = torch.stack([self._read(self.paths[i]) for i in index.tolist()])
        return images.float() / 127.5 - 1, None if self.labels is None else self.labels[index]

    def _read(self, path: Path) -> Tensor:
        try:
            pixels = self.crop(read_picture(path).convert("RGB"))
        except ValueError as error:
            text = str(error)
            raise ValueError(text if str(path) in text else f"{path}: {text}") from error
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def cifar10(path: Path, split: str) -> Pixels:
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    for folder, suffix, read in (
        ("cifar-10-batches-py", "", _read_cifar_pickle),
        ("cifar-10-batches-bin", ".bin", _read_cifar_binary),
    ):
        for root in (path / folder, path):
            files = [root / (name + suffix) for name in names]
            if all(file.is_file() for file in files):
                images, labels = zip(*map(read, files), strict=True)
                return Pixels(torch.cat(images), torch.cat(labels), 10)
    raise ValueError(
        f"{path} holds no CIFAR-10: expected {', '.join(names)} in {path / 'cifar-10-batches-py'}, or the same with "
        f".bin in {path / 'cifar-10-batches-bin'}"
    )


def _read_cifar_binary(path: Path) -> tuple[Tensor, Tensor]:
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % 3073:
        raise ValueError(f"{path} has {len(raw)} bytes, expected a multiple of 3073: a label and 32 x 32 x 3 pixels")
    return _cifar(torch.from_numpy(raw.reshape(-1, 3073)), path)


def _read_cifar_pickle(path: Path) -> tuple[Tensor, Tensor]:
    content = unpickle(path)
    data, labels = (content.get(key) for key in (b"data", b"labels")) if isinstance(content, dict) else (None, None)
    fits = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    whole = isinstance(labels, list) and all(isinstance(v, int | np.integer) for v in labels)
    if not fits or not whole or len(labels) != len(data):
        raise ValueError(f"{path} must hold b'data', uint8 [n, 3072], and b'labels', n whole numbers")
    labels = [min(max(int(label), -1), 255) for label in labels]  # fits any integer into int64; _cifar checks 0..9
    return _cifar(
        torch.cat([torch.tensor(labels, dtype=torch.int64, device="cpu")[:, None], torch.from_numpy(data)], 1), path
    )


def _cifar(rows: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """rows: [n, 3073], label and pixels."""
    labels = rows[:, 0].long()
    if not bool(((labels >= 0) & (labels < 10)).all()):
        raise ValueError(f"{path} has labels {sorted(set(labels.tolist()))[:12]}, expected 0..9")
    return rows[:, 1:].to(torch.uint8).view(-1, 3, 32, 32), labels


def celeba64(path: Path, split: str) -> ImageFiles:
    root = next((r for r in (path, path / "celeba") if (r / "list_eval_partition.txt").is_file()), None)
    if root is None or not (root / "img_align_celeba").is_dir():
        raise ValueError(
            f"{path} holds no CelebA: expected list_eval_partition.txt and img_align_celeba/ there or in "
            f"{path / 'celeba'}"
        )
    partition = root / "list_eval_partition.txt"
    wanted = "0" if split == "train" else "1"
    rows = _rows(partition)
    names = [name for name, part in rows if part == wanted]
    if not names:
        raise ValueError(f"{partition} lists no picture of this split")
    present = set(os.listdir(root / "img_align_celeba"))
    missing = next((name for name in names if name not in present), None)
    if missing is not None:
        raise ValueError(f"{partition} lists {missing}, but there is no {root / 'img_align_celeba' / missing}")
    return ImageFiles([root / "img_align_celeba" / name for name in names], None, 0, (3, 64, 64), crop_celeba)


def _rows(partition: Path) -> list[list[str]]:
    """Pairs of file name and part. Raises ValueError for a name with a folder, or one that occurs twice."""
    form = "lines such as '000001.jpg 0'"
    try:
        rows = [line.split() for line in read_text(partition).splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{partition} must hold {form}: {error}") from error
    wrong = next((row for row in rows if len(row) != 2 or row[1] not in ("0", "1", "2") or "/" in row[0]), None)
    if wrong is not None:
        raise ValueError(f"{partition} must hold {form}, got {' '.join(wrong)[:80]!r}")
    if len({name for name, _ in rows}) != len(rows):
        raise ValueError(f"{partition} lists a picture twice")
    return rows


def crop_celeba(picture: Image.Image) -> np.ndarray:
    """The 128 x 128 pixels around (89, 121) of an aligned picture, 178 x 218, at half size (U-ViT, datasets.py).

    Returns uint8 [64, 64, 3]. Raises ValueError for another size.
    """
    if picture.size != (178, 218):
        raise ValueError(f"aligned pictures of CelebA are 178 x 218, got {picture.size}")
    return np.asarray(picture.crop((25, 57, 153, 185)).resize((64, 64), Image.Resampling.BILINEAR))


def imagenet(size: int) -> Callable[[Path, str], ImageFiles]:
    def load_folder(path: Path, split: str) -> ImageFiles:
        root = path / ("train" if split == "train" else "val")
        if not root.is_dir():
            raise ValueError(f"{path} holds no ImageNet: expected {root} with a folder of pictures for each class")
        of_class = _by_class(root)
        # The validation set may lack classes, so labels follow the training set's classes.
        names = sorted(of_class)
        if split == "test" and (path / "train").is_dir():
            names = sorted(_train_classes(path / "train", set(of_class))) or names
        number = {name: i for i, name in enumerate(names)}
        files = sorted((file, number[name]) for name, pictures in of_class.items() for file in pictures)
        paths, labels = zip(*files, strict=True)
        return ImageFiles(
            paths,
            torch.tensor(labels, dtype=torch.int64, device="cpu"),
            len(names),
            (3, size, size),
            partial(crop_centre, size=size),
        )

    return load_folder


def _by_class(root: Path) -> dict[str, list[Path]]:
    """The pictures of each class. Raises ValueError for a class without a readable picture, or a picture without a
    class."""
    form = (
        f"{root} must hold a folder of pictures ({', '.join(FORMATS)}) for each class, or files such as "
        "n01440764_1.JPEG"
    )
    of_class: dict[str, list[Path]] = {name: [] for name in _class_folders(root)}
    for file in find_pictures(root).pictures:
        name = _class_of(file.relative_to(root).parts)
        if name is None:
            raise ValueError(f"{form}; {file} has no class")
        of_class.setdefault(name, []).append(file)
    if not of_class:
        raise ValueError(form)
    for name, files in of_class.items():
        if not files:
            raise ValueError(f"{root / name} {EMPTY}")
        _check_one_is_read(root / name, files)
    return of_class


def _check_one_is_read(folder: Path, files: Sequence[Path]) -> None:
    for file in files:
        try:
            read_picture(file)
            return
        except ValueError as error:
            last = error
    raise ValueError(f"none of the {len(files)} pictures of the class {folder} can be read; {last}")


def _train_classes(train: Path, of_val: set[str]) -> set[str]:
    """Classes of the training set. Raises ValueError if they lack one of the validation set, or if one is empty."""
    flat = {match[1] for path in train.iterdir() if (match := FLAT_NAME.match(path.name)) and is_picture(path)}
    folders = _class_folders(train)
    unknown = min(of_val - folders - flat, default=None)
    if (folders or flat) and unknown is not None:
        raise ValueError(f"{train.with_name('val')} holds the class {unknown}, which {train} lacks")
    for name in sorted(folders - flat - of_val):
        if not find_pictures(train / name).pictures:
            raise ValueError(f"{train / name} {EMPTY}")
    return folders | flat


def _class_folders(root: Path) -> set[str]:
    """Names of the folders directly below `root` that are not hidden."""
    with os.scandir(root) as entries:
        return {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}


def _class_of(parts: Sequence[str]) -> str | None:
    """Class of a picture: its first folder, or else the prefix of its name. parts: of its path below train or val."""
    if len(parts) > 1:
        return parts[0]
    match = FLAT_NAME.match(parts[0])
    return None if match is None else match[1]


def crop_centre(picture: Image.Image, size: int) -> np.ndarray:
    """The central size x size pixels of a picture, scaled so that its shorter side is `size`: halved by box averages
    while it is at least twice as long, then bicubic (guided-diffusion, image_datasets.py; U-ViT and DiT do the same).

    Returns uint8 [size, size, 3]. Raises ValueError for a picture so narrow that the scaled one would be too large.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    shape = (round(picture.width * scale), round(picture.height * scale))
    if math.prod(shape) > MOST_PIXELS:
        raise ValueError(f"{picture.width} x {picture.height} pixels are too narrow to cut a square out")
    pixels = np.asarray(picture.resize(shape, Image.Resampling.BICUBIC))
    top, left = ((length - size) // 2 for length in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]
