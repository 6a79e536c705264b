"""Kernel distance between features: the squared maximum mean discrepancy under k(x, y) = (x·y / F + 1)³, known as KID.

Bińkowski et al. 2018, arXiv 1801.01401. This is the unbiased estimate from all N samples and all M references, in
float64. torchmetrics and torch-fidelity average it over random subsets of 1,000, which has the same expectation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .intervals import resampled

BLOCK = 1024  # rows of the kernel matrix at a time, as N² values need not fit in memory


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """features: [N, F], reference: [M, F], any floating dtypes. The estimate is unbiased, so it may be negative.

    Raises ValueError if N or M is below 2, for different F, and for NaN or infinity.
    """
    return float(kernel_distances(features, reference, features.new_ones(1, len(features))))


def bootstrap_kernel(features: Tensor, reference: Tensor, *, resamples: int = 200, seed: int = 0) -> Tensor:
    """Distances of N rows drawn with replacement, the same as in `bootstrap_frechet`. Returns float64 [resamples]."""
    return kernel_distances(features, reference, resample_counts(len(features), resamples, seed))


def resample_counts(n: int, resamples: int, seed: int) -> Tensor:
    """How often each of n rows is drawn, float64 [resamples, n]."""
    return torch.stack([torch.bincount(rows, minlength=n).double() for rows in resampled(n, resamples, seed)])


def kernel_distances(features: Tensor, reference: Tensor, counts: Tensor, within: float | None = None) -> Tensor:
    """Distances, float64 [R], of R multisets of features [N, F]: row i occurs counts[r, i] times. counts: [R, N], with
    row sums N.

    reference: [M, F]. within: its `mean_within`, if known.
    """
    _check(features, reference)
    x, y, counts = features.double(), reference.double(), counts.to(features.device, torch.float64)
    N = len(x)
    pairs = torch.zeros(len(counts), dtype=torch.float64, device=x.device)
    across = torch.empty(N, dtype=torch.float64, device=x.device)
    for rows, block in _blocks(x, x):
        pairs += (counts[:, rows] * (counts @ block.T)).sum(1)
    for rows, block in _blocks(x, y):
        across[rows] = block.mean(1)
    pairs -= counts @ _cube((x * x).sum(1), x.shape[1])  # without pairs of a row with itself
    within = mean_within(y) if within is None else within
    return pairs / (N * (N - 1)) + within - 2 / N * (counts @ across)


def mean_within(y: Tensor) -> float:
    """Mean of k over pairs of different rows of y [M, F]."""
    y, M = y.double(), len(y)
    total = sum(block.sum() for _, block in _blocks(y, y)) - _cube((y * y).sum(1), y.shape[1]).sum()
    return float(total / (M * (M - 1)))


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x, and the kernel of each with all of y, float64 [rows, len(y)]."""
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, _cube(x[rows] @ y.T, x.shape[1])


def _cube(products: Tensor, F: int) -> Tensor:
    k = products / F + 1
    return k * k * k


def _check(features: Tensor, reference: Tensor) -> None:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            "a kernel distance takes features [N, F] and [M, F], "
            f"got {list(features.shape)} and {list(reference.shape)}"
        )
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"a kernel distance takes at least 2 of each, got {len(features)} and {len(reference)}")
    if not (features.isfinite().all() and reference.isfinite().all()):
        raise ValueError("the features hold NaN or infinity")
