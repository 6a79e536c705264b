"""Kernel distance against torchmetrics, torch-fidelity, a re-statement in numpy, and cases of known value."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from adadiff.metrics import kernel
from adadiff.metrics.frechet import FeatureStatistics, bootstrap_frechet, frechet_distance
from adadiff.metrics.intervals import centred_interval, resampled, share_interval
from adadiff.metrics.kernel import bootstrap_kernel, kernel_distance, kernel_distances, mean_within, resample_counts


def normal(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def restated(x: Tensor, y: Tensor) -> float:
    """Bińkowski et al., eq. 4, pair by pair, in the longest floats numpy has."""
    x, y = (v.double().numpy().astype(np.longdouble) for v in (x, y))

    def k(a: np.ndarray, b: np.ndarray) -> np.longdouble:
        return (np.dot(a, b) / len(a) + 1) ** 3

    N, M = len(x), len(y)
    within = [
        sum(k(side[i], side[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        for side, n in ((x, N), (y, M))
    ]
    return float(sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (N * M))


# 2 is the fewest; 13 and 7 are no multiple of the 5 rows in a block, and N != M.
@pytest.mark.parametrize(("N", "M", "F"), [(2, 2, 1), (13, 7, 3), (10, 31, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_distance_is_what_its_definition_says(
    N: int, M: int, F: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 5)
    x, y = normal(N, F, seed=0, shift=0.5).to(dtype), normal(M, F, seed=1, scale=1.5).to(dtype)
    assert kernel_distance(x, y) == pytest.approx(restated(x, y), rel=1e-10)


class Identity(torch.nn.Module):
    num_features = 12

    def forward(self, features: Tensor) -> Tensor:
        return features


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")
def test_kernel_distance_agrees_with_torchmetrics() -> None:
    """One subset of everything is the whole sum; theirs takes as many of both."""
    x, y = normal(41, 12, seed=2, shift=0.3), normal(41, 12, seed=3, scale=1.2)
    metric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=41)
    metric.set_dtype(torch.float64)
    metric.update(x, real=False)
    metric.update(y, real=True)
    assert kernel_distance(x, y) == pytest.approx(float(metric.compute()[0]), rel=1e-10)


def test_distances_agree_with_torch_fidelity() -> None:
    pytest.importorskip("torch_fidelity", reason="an optional extra")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = normal(60, 12, seed=4, shift=0.2), normal(60, 12, seed=5, scale=1.3)
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kernel_distance(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    statistics = (fid_features_to_statistics(v) for v in (x, y))
    ours = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-9)


@settings(max_examples=25)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 4), st.integers(0, 99))
def test_resamples_are_what_repeated_rows_would_be(N: int, M: int, F: int, seed: int) -> None:
    """Drawn rows are written out here; a row drawn twice is two rows, whose pair counts."""
    x, y = normal(N, F, seed=seed), normal(M, F, seed=seed + 100)
    draws = bootstrap_kernel(x, y, resamples=3, seed=seed)
    for draw, rows in zip(draws.tolist(), resampled(N, 3, seed), strict=True):
        assert draw == pytest.approx(restated(x[rows], y), rel=1e-8, abs=1e-9)


def test_frechet_and_kernel_draw_the_same_rows() -> None:
    x = normal(20, 2, seed=6)
    reference = FeatureStatistics.of(normal(30, 2, seed=7))
    by_counts = []
    for counts in resample_counts(20, 4, seed=8):
        rows = torch.arange(20).repeat_interleave(counts.long())
        by_counts.append(frechet_distance(FeatureStatistics.of(x[rows]), reference))
    assert bootstrap_frechet(x, reference, resamples=4, seed=8).tolist() == pytest.approx(by_counts, rel=1e-9)


def test_known_within_is_used() -> None:
    x, y = normal(9, 3, seed=9), normal(8, 3, seed=10)
    assert kernel_distances(x, y, torch.ones(1, 9), mean_within(y)).item() == kernel_distance(x, y)
    assert kernel_distances(x, y, torch.ones(1, 9), 0.0).item() == pytest.approx(kernel_distance(x, y) - mean_within(y))


def expected_distance(atoms: Tensor, reference: Tensor) -> float:
    """Of samples drawn from the atoms, each as likely: no pair is of one sample, but two may be of one atom."""
    k = (atoms @ atoms.T / atoms.shape[1] + 1) ** 3
    across = (atoms @ reference.T / atoms.shape[1] + 1) ** 3
    return float(k.mean() + mean_within(reference) - 2 * across.mean())


@pytest.mark.parametrize("shift", [0.0, 0.4], ids=["as the reference", "shifted"])
def test_intervals_cover_the_known_distance(shift: float) -> None:
    """150 samples of a distribution on 40 atoms, F = 6, so that the truth is a sum; 100 experiments. With the reference
    drawn from the same atoms the distance is nearly 0, where a linearised interval would be far too narrow."""
    atoms = normal(40, 6, seed=11)
    reference = atoms[torch.randint(40, (300,), generator=torch.Generator().manual_seed(12))]
    atoms = atoms + shift
    truth, values, covered = expected_distance(atoms, reference), [], 0
    for experiment in range(100):
        rows = torch.randint(40, (150,), generator=torch.Generator().manual_seed(experiment))
        values.append(kernel_distance(atoms[rows], reference))
        interval = centred_interval(values[-1], bootstrap_kernel(atoms[rows], reference, resamples=80, seed=experiment))
        covered += interval.low <= truth <= interval.high
    mean, error = np.mean(values), np.std(values) / 10
    assert abs(mean - truth) < 4 * error, "unbiased"
    assert covered >= 86  # of 100; 9 less than 95 are four standard deviations


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (7, 10), (991, 1000), (1, 3)])
def test_share_interval_is_wilsons_of_scipy(right: int, n: int) -> None:
    ours = share_interval(right / n, n)
    theirs = scipy.stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert (ours.value, ours.low, ours.high) == pytest.approx((right / n, theirs.low, theirs.high), abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(torch.zeros(3, 2), torch.zeros(3, 4)), r"got \[3, 2\] and \[3, 4\]"),
        (lambda: kernel_distance(torch.zeros(3), torch.zeros(3)), r"\[N, F\] and \[M, F\]"),
        (lambda: kernel_distance(torch.zeros(1, 2), torch.zeros(3, 2)), "at least 2 of each, got 1 and 3"),
        (lambda: kernel_distance(torch.zeros(3, 2), torch.full((3, 2), math.nan)), "NaN or infinity"),
        (lambda: bootstrap_kernel(torch.zeros(3, 2), torch.zeros(3, 2), resamples=1), "at least 2 resamples"),
        (lambda: share_interval(0.0, 0), "at least one sample"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
