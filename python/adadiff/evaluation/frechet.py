"""Fréchet distance between feature statistics, and 95 % intervals for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
STUDENT_T = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


@dataclass(frozen=True)
class FeatureStatistics:
    """The Gaussian fitted to `count` features. mean: float64 [F]; covariance: float64 [F, F], unbiased."""

    mean: Tensor
    covariance: Tensor
    count: int

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != 2 * self.mean.shape:
            raise ValueError(
                f"statistics take a mean [F] and a covariance [F, F], "
                f"got {list(self.mean.shape)} and {list(self.covariance.shape)}"
            )
        if self.mean.dtype != torch.float64 or self.covariance.dtype != torch.float64:
            raise ValueError(f"statistics are float64, got {self.mean.dtype} and {self.covariance.dtype}")
        if self.count < 2:
            raise ValueError(f"a covariance takes at least 2 samples, got {self.count}")
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("the features, or their mean and covariance, hold NaN or infinity")

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """features: [N, F], any floating dtype; sums are taken in float64."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"statistics take features [N, F] of at least 2 samples, got {list(features.shape)}")
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½), in float64 (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    The trace of the root is the sum of the roots of the eigenvalues of Σa Σb. These are real and not
    negative; rounding may give them a small imaginary part, which is dropped, as torchmetrics does.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} features: use one extractor for both")
    roots = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * roots.sum())


def bootstrap_frechet(features: Tensor, reference: FeatureStatistics, *, resamples: int = 200, seed: int = 0) -> Tensor:
    """Distances of N features drawn with replacement from features [N, F]. Returns float64 [resamples].

    The draws depend on (N, seed) only, so two samplers that started from the same noises are resampled in
    pairs: `centred_interval(fa - fb, draws_a - draws_b)` is the interval of their difference, and the more
    their images agree, the narrower.
    """
    N = len(features)
    if resamples < 2 or N < 2:
        raise ValueError(f"a bootstrap takes at least 2 resamples of 2 samples, got {resamples} of {N}")
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(N, (N,), generator=generator).to(features.device) for _ in range(resamples))
    distances = [frechet_distance(FeatureStatistics.of(features[rows]), reference) for rows in draws]
    return torch.tensor(distances, dtype=torch.float64)


def centred_interval(value: float, draws: Tensor) -> Interval:
    """The 95 % interval around a plain estimate whose bootstrap draws are biased.

    Resampling adds to the distance the bias that N samples have, once more: the draws lie above `value`, and
    their own percentiles can miss the truth in every single case. So their mean is moved onto `value`, and
    the ends mirrored (the basic, or pivotal, interval). It covers the expected distance of N samples; see
    `Quality` for infinitely many.
    """
    levels = torch.tensor([0.025, 0.975], dtype=draws.dtype, device=draws.device)
    below, above = (draws - draws.mean()).quantile(levels).tolist()
    return Interval(value, value - above, value - below)


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean over 2 to 10 independent seeds and the Student t interval: mean ± t(k - 1) · s / √k.

    The spread between seeds contains that of sampling, so the intervals of single seeds are not added.
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
