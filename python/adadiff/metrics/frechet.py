"""Fréchet distance between feature statistics, and its bootstrap."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .intervals import Interval, centred_interval, resampled


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean float64 [F] and unbiased covariance float64 [F, F] of the features of `count` images (None: unknown). Raises
    ValueError for other shapes and dtypes, NaN or infinity."""

    mean: Tensor
    covariance: Tensor
    count: int | None

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != 2 * self.mean.shape:
            raise ValueError(
                f"statistics take a mean [F] and a covariance [F, F], "
                f"got {list(self.mean.shape)} and {list(self.covariance.shape)}"
            )
        if self.mean.dtype != torch.float64 or self.covariance.dtype != torch.float64:
            raise ValueError(f"statistics are float64, got {self.mean.dtype} and {self.covariance.dtype}")
        if self.count is not None and self.count < 2:
            raise ValueError(f"a covariance takes at least 2 samples, got {self.count}")
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("the features, or their mean and covariance, hold NaN or infinity")

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """features: [N, F], N >= 2, any floating dtype; computed in float64. Raises ValueError for other shapes."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"statistics take features [N, F] of at least 2 samples, got {list(features.shape)}")
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))

    @cached_property
    def root(self) -> Tensor:
        """The symmetric Σ^½, float64 [F, F]. Eigenvalues that rounding made negative count as 0."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½), in float64 (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    The trace of the root is the sum of the square roots of the eigenvalues of Σa Σb, which are those of the symmetric
    Σb^½ Σa Σb^½. The root of b is cached, so pass the statistics that many others are compared with as b. Raises
    ValueError for different F.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} features: use one extractor for both")
    roots = torch.linalg.eigvalsh(b.root @ a.covariance @ b.root).clamp(min=0).sqrt()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * roots.sum())


def bootstrap_frechet(features: Tensor, reference: FeatureStatistics, *, resamples: int = 200, seed: int = 0) -> Tensor:
    """Bootstrap: distances of N rows drawn with replacement from features [N, F]. Returns float64 [resamples].

    The drawn rows depend on (N, seed) only, so two samplers that started from the same noises are resampled in pairs:
    `centred_interval(fa - fb, draws_a - draws_b)` is the interval of their difference, which is narrower the more their
    images agree.
    """
    draws = resampled(len(features), resamples, seed)
    distances = [frechet_distance(FeatureStatistics.of(features[d.to(features.device)]), reference) for d in draws]
    return torch.tensor(distances, dtype=torch.float64, device="cpu")


def paired_ratio(
    features: Tensor, baseline: Tensor, reference: FeatureStatistics, *, resamples: int = 200, seed: int = 0
) -> Interval:
    """Fréchet distance of `features` divided by that of `baseline`, [N, F] each, with its 95 % interval. Rows are
    resampled in pairs."""
    both = features, baseline
    ours, theirs = (frechet_distance(FeatureStatistics.of(side), reference) for side in both)
    draws = [bootstrap_frechet(side, reference, resamples=resamples, seed=seed) for side in both]
    return centred_interval(ours / theirs, draws[0] / draws[1])
