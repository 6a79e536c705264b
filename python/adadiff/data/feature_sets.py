"""Data extracted by U-ViT's scripts: moments of latents and text embeddings (contexts) of captions, see datasets.py."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .numpy_files import load_npy

NUMBER = r"0|[1-9][0-9]*"  # in the name of a file
MOMENTS = 8  # channels: mean and log variance of four latents


@dataclass(frozen=True)
class LabelledMoments:
    """ImageNet: files 0.npy, 1.npy, ..., each a pair (moments, label)."""

    folder: Path
    count: int
    shape: tuple[int, int, int]
    classes = 1000
    moments = True

    def __len__(self) -> int:
        return self.count

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        moments, labels = zip(*(self._read(self.folder / f"{i}.npy") for i in index.tolist()), strict=True)
        return torch.stack(moments), torch.tensor(labels, dtype=torch.int64, device="cpu")

    def _read(self, path: Path) -> tuple[Tensor, int]:
        pair = load_npy(path)
        if pair.dtype != object or pair.shape != (2,):
            raise ValueError(f"{path} must hold (moments, label), got {pair.dtype} {pair.shape}")
        label = pair[1].item() if isinstance(pair[1], np.generic | np.ndarray) and pair[1].size == 1 else pair[1]
        if not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(f"{path} must hold (moments, label), got a label of type {type(label).__name__}")
        if not 0 <= label < self.classes:
            shown = label if abs(label) < 1e9 else "of many digits"
            raise ValueError(f"{path} has label {shown}, expected 0..{self.classes - 1}")
        return _moments(pair[0], self.shape, path), label


@dataclass(frozen=True)
class CaptionedMoments:
    """MS-COCO: moments i.npy, each with captions[i] contexts i_0.npy, i_1.npy, ..."""

    folder: Path
    captions: Sequence[int]
    empty_context: Tensor  # float32 [N, E]
    shape: tuple[int, int, int] = (MOMENTS, 32, 32)
    classes = 0
    moments = True

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, index: Tensor, caption: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """index: int64 [k]. caption: float [k] in [0, 1), selects one of each image's captions; None: drawn from
        PyTorch's global generator. Returns moments float32 [k, 8, 32, 32] and contexts float32 [k, N, E]."""
        x, contexts = [], []
        places = torch.rand(len(index), dtype=torch.float32, device="cpu") if caption is None else caption
        for i, place in zip(index.tolist(), places.tolist(), strict=True):
            path = self.folder / f"{i}.npy"
            x.append(_moments(load_npy(path), self.shape, path))
            path = self.folder / f"{i}_{int(place * self.captions[i])}.npy"
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
        data.batch(torch.tensor([0], dtype=torch.int64, device="cpu"))  # checks the first file
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
    captions: list[set[int]] = [set() for _ in range(_numbered(root))]
    for file in root.glob("*_*.npy"):
        match = re.fullmatch(rf"({NUMBER})_({NUMBER})", file.stem)
        if match is None or int(match[1]) >= len(captions):
            raise ValueError(f"{file} is a context without moments: there is no {file.stem.split('_')[0]}.npy")
        captions[int(match[1])].add(int(match[2]))
    for i, numbers in enumerate(captions):
        if numbers != set(range(len(numbers))) or not numbers:
            missing = min(set(range(len(numbers) + 1)) - numbers)
            what = f"lacks {i}_{missing}.npy" if numbers else f"has no context; expected {i}_0.npy"
            raise ValueError(f"{root / f'{i}.npy'} {what}")
    data = CaptionedMoments(root, [len(numbers) for numbers in captions], _context(path / "empty_context.npy", None))
    data.batch(torch.tensor([0], dtype=torch.int64, device="cpu"))  # checks the first files
    return data


def _numbered(folder: Path) -> int:
    """Number of files 0.npy, 1.npy, ... ValueError if one is missing."""
    numbers = {int(file.stem) for file in folder.glob("*.npy") if re.fullmatch(NUMBER, file.stem)}
    if len(numbers) != max(numbers) + 1:
        missing = min(set(range(len(numbers) + 1)) - numbers)
        raise ValueError(f"{folder} lacks {missing}.npy of 0.npy..{max(numbers)}.npy")
    return len(numbers)


def _moments(value: object, shape: tuple[int, int, int], path: Path) -> Tensor:
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype.kind != "f":
        got = f"{value.shape} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{path} must hold moments, float {list(shape)}, got {got}")
    return _finite(value, path)


def _context(path: Path, shape: tuple[int, ...] | None) -> Tensor:
    value = load_npy(path)
    if value.dtype.kind != "f" or value.ndim != 2 or shape not in (None, value.shape):
        raise ValueError(f"{path} must hold a context, float {list(shape or ('N', 'E'))}, got {list(value.shape)}")
    return _finite(value, path)


def _finite(value: np.ndarray, path: Path) -> Tensor:
    if not np.isfinite(value).all():
        raise ValueError(f"{path} holds NaN or infinity")
    return torch.from_numpy(value.astype(np.float32))
