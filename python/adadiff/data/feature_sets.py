"""Features that U-ViT's scripts extract, moments of latents and contexts of captions, see datasets.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .numpy_files import load_npy

MOMENTS = 8  # channels: mean and log variance of four latents


@dataclass(frozen=True)
class LabelledMoments:
    """Files (moments, label), numbered from 0."""

    folder: Path
    count: int
    shape: tuple[int, int, int]
    classes = 1000
    moments = True

    def __len__(self) -> int:
        return self.count

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        moments, labels = zip(*(self._read(self.folder / f"{i}.npy") for i in index.tolist()), strict=True)
        return torch.stack(moments), torch.tensor(labels)

    def _read(self, path: Path) -> tuple[Tensor, int]:
        pair = load_npy(path)
        if pair.dtype != object or pair.shape != (2,):
            raise ValueError(f"{path} must hold (moments, label), got {pair.dtype} {pair.shape}")
        label = int(pair[1])
        if not 0 <= label < self.classes:
            raise ValueError(f"{path} has label {label}, expected 0..{self.classes - 1}")
        return _moments(pair[0], self.shape, path), label


@dataclass(frozen=True)
class CaptionedMoments:
    """Moments i.npy and several contexts each, i_0.npy ...; captions[i] says how many. A batch takes the k-th, k drawn
    from PyTorch's global generator."""

    folder: Path
    captions: Sequence[int]
    empty_context: Tensor  # float32 [N, E]
    shape: tuple[int, int, int] = (MOMENTS, 32, 32)
    classes = 0
    moments = True

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, contexts = [], []
        for i in index.tolist():
            path = self.folder / f"{i}.npy"
            x.append(_moments(load_npy(path), self.shape, path))
            path = self.folder / f"{i}_{int(torch.randint(self.captions[i], ()))}.npy"
            contexts.append(_context(path, tuple(self.empty_context.shape)))
        return torch.stack(x), torch.stack(contexts)


def imagenet(size: int) -> Callable[[Path, str], LabelledMoments]:
    def load_folder(path: Path, split: str) -> LabelledMoments:
        root = next((r for r in (path, path / f"imagenet{size * 8}_features") if (r / "0.npy").is_file()), None)
        if root is None:
            raise ValueError(f"{path} holds no features: expected 0.npy, 1.npy, ..., a pair (moments, label) each")
        if split != "train":
            raise ValueError("the extracted features of ImageNet are its training set; take split='train'")
        data = LabelledMoments(root, _numbered(root), (MOMENTS, size, size))
        data.batch(torch.tensor([0]))  # for its checks
        return data

    return load_folder


def mscoco(path: Path, split: str) -> CaptionedMoments:
    root = path / ("train" if split == "train" else "val")
    for file in (root / "0.npy", root / "0_0.npy", path / "empty_context.npy"):
        if not file.is_file():
            raise ValueError(
                f"{path} holds no features of MS-COCO: expected {file}, as U-ViT's scripts/extract_mscoco_feature.py "
                "and extract_empty_feature.py write it"
            )
    captions = [0] * _numbered(root)
    for file in root.glob("*_*.npy"):
        number = file.stem.split("_")[0]
        if not number.isdecimal() or int(number) >= len(captions):
            raise ValueError(f"{file} is a context of no {number}.npy")
        captions[int(number)] += 1
    if not all(captions):
        raise ValueError(f"{root / f'{captions.index(0)}.npy'} has no context; expected {captions.index(0)}_0.npy")
    data = CaptionedMoments(root, captions, _context(path / "empty_context.npy", None))
    data.batch(torch.tensor([0]))  # for its checks
    return data


def _numbered(folder: Path) -> int:
    """How many files 0.npy, 1.npy, ... there are. ValueError where one is missing."""
    numbers = {int(file.stem) for file in folder.glob("*.npy") if file.stem.isdecimal()}
    if len(numbers) != max(numbers) + 1:
        missing = min(set(range(len(numbers) + 1)) - numbers)
        raise ValueError(f"{folder} lacks {missing}.npy of 0.npy..{max(numbers)}.npy")
    return len(numbers)


def _moments(value: object, shape: tuple[int, int, int], path: Path) -> Tensor:
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype.kind != "f":
        raise ValueError(f"{path} must hold moments, float {list(shape)}, got {getattr(value, 'shape', value)}")
    return torch.from_numpy(value.astype(np.float32))


def _context(path: Path, shape: tuple[int, ...] | None) -> Tensor:
    value = load_npy(path)
    if value.dtype.kind != "f" or value.ndim != 2 or shape not in (None, value.shape):
        raise ValueError(f"{path} must hold a context, float {list(shape or ('N', 'E'))}, got {list(value.shape)}")
    return torch.from_numpy(value.astype(np.float32))
