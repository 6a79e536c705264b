"""Published data sets from local files, in the layouts they are published in. Nothing is downloaded.

name                  what lies at `path`
cifar10               cifar-10-batches-py/ (data_batch_1..5, test_batch) or cifar-10-batches-bin/ (the same, .bin)
celeba64              celeba/ with img_align_celeba/000001.jpg ... and list_eval_partition.txt
imagenet64, 256, 512  train/ and val/ with a folder for each class, n01440764/...; or train/n01440764_1.JPEG ...
imagenet256_features  0.npy, 1.npy, ...: (moments, label), from U-ViT's scripts/extract_imagenet_feature.py; also 512
mscoco256_features    train/ and val/ with moments 0.npy ... and contexts 0_0.npy ..., empty_context.npy; by the same

Which pictures of ImageNet count, and what their pixels are: see pictures.py. The class of a picture is the folder
directly below train/ or val/, whatever lies between, or for a picture directly there what its name begins with. Labels
are the places of the classes in the sorted list of their names, as text ("10" before "2"); the classes of train/ number
those of val/, too. A class without a picture that can be read is refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from . import feature_sets, image_sets


class Dataset(Protocol):
    """shape: C, H, W of one x. classes: 0 where there are no labels. moments: x are moments of latents, see
    `latents.draw_latents`, instead of images in [-1, 1]."""

    shape: tuple[int, int, int]
    classes: int
    moments: bool

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """index: int64 [k]. Returns x, float32 [k, C, H, W], and labels int64 [k], contexts float32 [k, N, E] or
        None."""


def load(name: str, path: str | Path, split: str = "train") -> Dataset:
    """The data set of that name (a line of the table above) from its files at `path`, or one folder below.

    split: "train" or "test" (CelebA, ImageNet and MS-COCO: their validation set; the features of ImageNet have none).
    Raises ValueError for another name or split, and where the files are not there: it says what was expected where.
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
