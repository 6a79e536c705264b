"""Digits and prototypes: ten hard and ten easy classes, for methods that spend more work on hard samples."""

import torch
from torch import Tensor

from .digits import digits

DIGITS = 10
CLASSES = 2 * DIGITS
NOISE = 0.03  # standard deviation; pixels lie in [-1, 1]


def digits_prototypes(split: str = "train") -> tuple[Tensor, Tensor]:
    """The images of `data.digits` (labels 0..9) and, for each of them, an image of its class's prototype (labels
    10..19): the mean of the class's training scans plus a little Gaussian noise.

    A prototype is determined by its label, so few sampling steps suffice; a scan has individual strokes, which take
    many.
    split: "train" or "test"; both have the same prototypes, with different noise.
    Returns images float32 [N, 1, 8, 8] in [-1, 1] and labels int64 [N] in 0..19. Raises as `digits` does.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    images, labels = digits(split)
    generator = torch.Generator().manual_seed(int(split == "test"))
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32, device="cpu")
    prototypes = (class_means()[labels] + NOISE * noise).clamp(-1, 1)
    return torch.cat([images, prototypes]), torch.cat([labels, labels + DIGITS])


def class_means() -> Tensor:
    """Mean image of each digit's training scans, float32 [10, 1, 8, 8]."""
    images, labels = digits("train")
    return torch.stack([images[labels == digit].mean(0) for digit in range(DIGITS)])
