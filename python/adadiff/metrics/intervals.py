"""95 % confidence intervals: bootstrap, over independent seeds, and of a share."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom, and of the normal distribution.
STUDENT_T = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
NORMAL = 1.959964


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def resampled(n: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """Bootstrap indices: `resamples` times int64 [n], drawn with replacement; determined by (n, seed).

    Raises ValueError if n or resamples is below 2.
    """
    if resamples < 2 or n < 2:
        raise ValueError(f"a bootstrap takes at least 2 resamples of 2 samples, got {resamples} of {n}")
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(n, (n,), generator=generator, device="cpu") for _ in range(resamples))


def centred_interval(value: float, draws: Tensor) -> Interval:
    """The 95 % interval of an estimate whose bootstrap draws are biased.

    Resampling adds the finite-sample bias of a distance a second time: the draws lie above `value`, and their
    percentiles may never cover the truth. So the draws are centred on `value`, and the ends are mirrored (the basic, or
    pivotal, interval). It covers the expected distance of N samples; see `Quality` for infinitely many.
    """
    levels = torch.tensor([0.025, 0.975], dtype=draws.dtype, device=draws.device)
    below, above = (draws - draws.mean()).quantile(levels).tolist()
    return Interval(value, value - above, value - below)


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean over 2 to 10 independent seeds and its Student t interval, mean ± t(k - 1) · s / √k. Raises ValueError for
    other numbers of values, NaN or infinity.

    The spread between seeds includes that of sampling, so the intervals of single seeds are not added.
    """
    k = len(values)
    if not 2 <= k <= len(STUDENT_T) + 1:
        raise ValueError(f"an interval over seeds takes 2 to {len(STUDENT_T) + 1} values, got {k}")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"every value must be finite, got {list(values)}")
    mean = math.fsum(values) / k
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (k - 1))
    half = STUDENT_T[k - 2] * deviation / math.sqrt(k)
    return Interval(mean, mean - half, mean + half)


def share_interval(share: float, n: int) -> Interval:
    """A share of n >= 1 samples and its Wilson interval, which has a width even at shares of 0 and 1, where a bootstrap
    gives none."""
    if n < 1:
        raise ValueError("a share takes at least one sample")
    z2 = NORMAL**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))
