"""Published data sets from local files in their published layouts. Nothing is downloaded.

name                  content of `path`
cifar10               cifar-10-batches-py/ (data_batch_1..5, test_batch) or cifar-10-batches-bin/ (the same, .bin)
celeba64              celeba/ with img_align_celeba/000001.jpg ... and list_eval_partition.txt
imagenet64, 256, 512  train/ and val/ with a folder for each class, n01440764/...; or train/n01440764_1.JPEG ...
imagenet256_features  0.npy, 1.npy, ...: (moments, label), from U-ViT's scripts/extract_imagenet_feature.py; also 512
mscoco256_features    train/ and val/ with moments 0.npy ... and contexts 0_0.npy ..., and empty_context.npy; from
                      U-ViT's scripts, too

ImageNet: pictures.py says which files count and how pixels are read. The class of a picture is the folder directly
below train/ or val/, at any depth, or, for a picture directly in train/ or val/, the prefix of its name. Labels are
positions in the sorted list of class names, sorted as text ("10" before "2"); val/ uses the classes of train/. A class
without a readable picture is refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from . import feature_sets, image_sets


class Dataset(Protocol):
    """shape: C, H, W of one x. classes: 0 without labels. moments: whether x are moments of latents, see
    `latents.draw_latents`, instead of images in [-1, 1]."""

    shape: tuple[int, int, int]
    classes: int
    moments: bool

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """index: int64 [k]. Returns x, float32 [k, C, H, W], and its condition: labels int64 [k], contexts float32
        [k, N, E], or None."""


def load(name: str, path: str | Path, split: str = "train") -> Dataset:
    """The data set of that name (a line of the table above) from its files at `path`, or one folder below.

    split: "train" or "test" (CelebA, ImageNet and MS-COCO: their validation set; the features of ImageNet have none).
    Raises ValueError for another name or split, and for missing files, with the names that were expected.
    """
    if name not in NAMES:
        raise ValueError(f"no data set {name!r}; there are {', '.join(NAMES)}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no such folder: {path}")
    return NAMES[name](path, split)


NAMES: dict[str, Callable[[Path, str], Dataset]] = {
    "cifar10": image_sets.cifar10,
    "celeba64": image_sets.celeba64,
    "imagenet64": image_sets.imagenet(64),
    "imagenet256": image_sets.imagenet(256),
    "imagenet512": image_sets.imagenet(512),
    "imagenet256_features": feature_sets.imagenet(32),
    "imagenet512_features": feature_sets.imagenet(64),
    "mscoco256_features": feature_sets.mscoco,
}
