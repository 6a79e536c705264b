"""Pictures with or without labels: CIFAR-10, CelebA and ImageNet, see `datasets`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .numpy_files import unpickle

SUFFIXES = {".jpg", ".jpeg", ".png"}


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
    """Images that are numbers already: float32 [n, C, H, W] in [-1, 1], labels int64 [n]."""

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
    """Images that are read when they are asked for; `crop` makes uint8 [H, W, 3] of a picture."""

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
            with Image.open(path) as picture:
                pixels = self.crop(picture.convert("RGB"))
        except OSError as error:
            raise ValueError(f"{path} is no picture that can be read: {error}") from error
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
        raise ValueError(f"{path} has {len(raw)} bytes, expected some times 3073: a label and 32 x 32 x 3 pixels")
    return _cifar(torch.from_numpy(raw.reshape(-1, 3073)), path)


def _read_cifar_pickle(path: Path) -> tuple[Tensor, Tensor]:
    content = unpickle(path)
    data, labels = (content.get(key) for key in (b"data", b"labels")) if isinstance(content, dict) else (None, None)
    fits = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not fits or not isinstance(labels, list) or len(labels) != len(data):
        raise ValueError(f"{path} must hold b'data', uint8 [n, 3072], and b'labels', n numbers")
    return _cifar(torch.cat([torch.tensor(labels)[:, None], torch.from_numpy(data)], 1), path)


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
    rows = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    if not all(len(row) == 2 and row[1] in "012" for row in rows):
        raise ValueError(f"{partition} must hold lines such as '000001.jpg 0'")
    paths = [root / "img_align_celeba" / name for name, part in rows if part == wanted]
    _there(paths, partition)
    return ImageFiles(paths, None, 0, (3, 64, 64), crop_celeba)


def crop_celeba(picture: Image.Image) -> np.ndarray:
    """The 128 x 128 pixels about (89, 121) of an aligned picture, 178 x 218, at half their size (U-ViT, datasets.py).

    Returns uint8 [64, 64, 3]. ValueError for another size.
    """
    if picture.size != (178, 218):
        raise ValueError(f"aligned pictures of CelebA are 178 x 218, got {picture.size}")
    return np.asarray(picture.crop((25, 57, 153, 185)).resize((64, 64), Image.Resampling.BILINEAR))


def imagenet(size: int) -> Callable[[Path, str], ImageFiles]:
    def load_folder(path: Path, split: str) -> ImageFiles:
        root = path / ("train" if split == "train" else "val")
        if not root.is_dir():
            raise ValueError(f"{path} holds no ImageNet: expected {root} with a folder of pictures for each class")
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
        flat = [re.match(r"(n\d{8})_", p.name) for p in paths]
        names = [p.parent.name if p.parent != root else m[1] if m else "" for p, m in zip(paths, flat, strict=True)]
        if not paths or "" in names:
            stray = f"; {paths[names.index('')]} has no class" if paths else ""
            raise ValueError(
                f"{root} must hold a folder of pictures (.JPEG, .jpg, .png) for each class, or files such as "
                f"n01440764_1.JPEG{stray}"
            )
        number = {name: i for i, name in enumerate(sorted(set(names)))}
        labels = torch.tensor([number[name] for name in names])
        return ImageFiles(paths, labels, len(number), (3, size, size), partial(crop_centre, size=size))

    return load_folder


def crop_centre(picture: Image.Image, size: int) -> np.ndarray:
    """The middle size x size pixels of a picture whose shorter side was brought to `size`: halved by averages while
    it is twice as long, then bicubic (guided diffusion, image_datasets.py; U-ViT and DiT do the same).

    Returns uint8 [size, size, 3].
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    shape = (round(picture.width * scale), round(picture.height * scale))
    pixels = np.asarray(picture.resize(shape, Image.Resampling.BICUBIC))
    top, left = ((length - size) // 2 for length in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def _there(paths: Sequence[Path], listed: Path) -> None:
    if not paths:
        raise ValueError(f"{listed} lists no picture of this split")
    if not paths[0].is_file() or not paths[-1].is_file():
        missing = paths[0] if not paths[0].is_file() else paths[-1]
        raise ValueError(f"{listed} lists {missing.name}, but there is no {missing}")
