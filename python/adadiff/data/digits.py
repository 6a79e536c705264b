"""The digits data set."""

import torch
from torch import Tensor


def digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """scikit-learn's 8x8 digits: 1,797 scans of handwritten digits (UCI optdigits).

    `split`: "train" (about 80 % of each class), "test" (the rest, never trained on) or "all". The split is fixed.
    Returns images float32 [N, 1, 8, 8] in [-1, 1] and labels int64 [N] in 0..9.
    Raises ValueError for another split, ImportError (with the pip command) if scikit-learn is missing.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the real images of digits and canvases come with scikit-learn: pip install 'adadiff_kernels[train]'"
        ) from error
    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 8 - 1  # pixels count 0..16
    labels = torch.from_numpy(raw.target).long()
    if split == "all":
        return images, labels
    held_out = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for digit in range(10):
        of_class = (labels == digit).nonzero().squeeze(1)
        order = torch.randperm(len(of_class), generator=torch.Generator().manual_seed(digit), device="cpu")
        held_out[of_class[order[: len(of_class) // 5]]] = True
    keep = held_out if split == "test" else ~held_out
    return images[keep], labels[keep]
