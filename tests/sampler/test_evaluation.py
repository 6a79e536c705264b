"""Metrics against torchmetrics, scipy and cases whose true value is known."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.image.fid import FrechetInceptionDistance

from adadiff.checkpoint import read_tensors
from adadiff.data.digits import digits
from adadiff.metrics import features as digits_features
from adadiff.metrics.features import digits_network
from adadiff.metrics.frechet import FeatureStatistics, bootstrap_frechet, frechet_distance
from adadiff.metrics.intervals import Interval, centred_interval, seed_interval
from adadiff.metrics.judges import hits
from adadiff.metrics.kernel import kernel_distance
from adadiff.metrics.quality import (
    evaluate_samples,
    frechet_ratio,
    paired_max_difference,
    paired_psnr,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small sums: where the cores are busy, a second thread costs a hundred times its use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int, scale: Tensor | float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift


class Flatten(torch.nn.Module):
    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


# 41 and 29: no multiple of anything; F = 12 mixes three channels of 2x2.
@pytest.mark.parametrize("counts", [(41, 29), (2, 200)], ids=["ragged", "singular covariance"])
def test_frechet_distance_agrees_with_torchmetrics(counts: tuple[int, int]) -> None:
    a = normal(counts[0], 3, 2, 2, seed=0, scale=1.3, shift=0.4)
    b = normal(counts[1], 3, 2, 2, seed=1)
    metric = FrechetInceptionDistance(feature=Flatten(), normalize=True, antialias=False)
    metric.set_dtype(torch.float64)
    metric.update(a, real=False)
    metric.update(b, real=True)
    ours = frechet_distance(FeatureStatistics.of(a.flatten(1)), FeatureStatistics.of(b.flatten(1)))
    # The root of an eigenvalue that is zero up to rounding (1e-16) is 1e-8.
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(0.01, 5)] * 2, *[st.floats(-3, 3)] * 2), min_size=1, max_size=9),
    st.integers(0, 99),
)
def test_frechet_distance_of_commuting_gaussians(axes: list[tuple[float, ...]], seed: int) -> None:
    """Where the covariances share their axes, the distance is Σ (μ1 - μ2)² + (σ1 - σ2)² in any rotation of
    them.
    """
    s1, s2, m1, m2 = torch.tensor(axes, dtype=torch.float64).T
    rotation = torch.linalg.qr(normal(len(axes), len(axes), seed=seed)).Q
    a, b = (
        FeatureStatistics(rotation @ m, rotation @ torch.diag(s**2) @ rotation.T, 100) for m, s in ((m1, s1), (m2, s2))
    )
    truth = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-9, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(truth, rel=1e-9, abs=1e-9)


def test_statistics_agree_with_numpy_and_sum_in_float64() -> None:
    features = normal(67, 5, seed=2, shift=1000.0).float()  # a mean far from zero loses digits in float32 sums
    ours = FeatureStatistics.of(features)
    torch.testing.assert_close(ours.covariance, torch.cov(features.double().T), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.mean, features.double().mean(0), rtol=0, atol=0)
    assert ours.count == 67


def test_intervals_cover_the_known_distance_of_gaussians() -> None:
    """The truth about N(0, 1.1² S) against fixed statistics is known; 100 experiments of 150 samples, F = 6.

    The interval moved down by the bias covers the distance of infinitely many samples; as it stands it covers
    the expected one of 150. Plain percentiles of the draws cover neither: the reason for `centred_interval`.
    """
    scale = torch.linspace(0.3, 2, 6, dtype=torch.float64)
    reference = FeatureStatistics.of(normal(360, 6, seed=1, scale=scale))
    population = FeatureStatistics(torch.zeros(6).double(), torch.diag((1.1 * scale) ** 2), 10**9)
    limit = frechet_distance(population, reference)
    values, intervals, biases, percentiles = [], [], [], []
    for experiment in range(100):
        features = normal(150, 6, seed=100 + experiment, scale=1.1 * scale)
        values.append(frechet_distance(FeatureStatistics.of(features), reference))
        draws = bootstrap_frechet(features, reference, resamples=80, seed=experiment)
        biases.append(float(draws.mean()) - values[-1])
        intervals.append(centred_interval(values[-1], draws))
        percentiles.append(draws.quantile(torch.tensor([0.025, 0.975]).double()).tolist())
    expected = sum(values) / len(values)

    def covered(truth: float, ends: list[tuple[float, float]]) -> float:
        return sum(low <= truth <= high for low, high in ends) / len(ends)

    assert sum(biases) / len(biases) == pytest.approx(expected - limit, rel=0.25)
    # Of 100 experiments, 9 % are four standard deviations of a coverage of 95 %.
    assert covered(expected, [(i.low, i.high) for i in intervals]) >= 0.86
    shifted = [(i.low - bias, i.high - bias) for i, bias in zip(intervals, biases, strict=True)]
    assert covered(limit, shifted) >= 0.86
    assert covered(limit, percentiles) < 0.6


def test_centred_interval_is_centred_and_mirrored() -> None:
    draws = torch.tensor([10.0] * 36 + [50.0] * 4).double()  # mean 14; the long tail is upwards
    interval = centred_interval(5.0, draws)
    assert (interval.low, interval.value, interval.high) == pytest.approx((5 - 36, 5, 5 + 4))


def test_bootstrap_is_deterministic_and_paired() -> None:
    features = normal(300, 4, seed=3)
    reference = FeatureStatistics.of(normal(90, 4, seed=4))
    draws = bootstrap_frechet(features, reference, resamples=30, seed=5)
    assert torch.equal(draws, bootstrap_frechet(features, reference, resamples=30, seed=5))
    assert not torch.equal(draws, bootstrap_frechet(features, reference, resamples=30, seed=6))
    # A rotation of both leaves every distance as it was, so equal rows must have been drawn.
    rotation = torch.linalg.qr(normal(4, 4, seed=7)).Q
    turned = FeatureStatistics(
        rotation.T @ reference.mean, rotation.T @ reference.covariance @ rotation, reference.count
    )
    again = bootstrap_frechet(features @ rotation, turned, resamples=30, seed=5)
    torch.testing.assert_close(again, draws, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("values", [[1.0, 3.0], [2.5, 2.0, 4.0], [float(i**2) for i in range(10)]])
def test_seed_interval_is_the_t_interval_of_scipy(values: list[float]) -> None:
    ours = seed_interval(values)
    sample = torch.tensor(values).double()
    error = float(sample.std() / math.sqrt(len(values)))
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, float(sample.mean()), error)
    assert (ours.value, ours.low, ours.high) == pytest.approx((float(sample.mean()), low, high), rel=1e-5)


def test_accuracy_counts_rows() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0], [5.0, 4.0, 4.0], [0.0, 0.0, 0.1]])
    assert hits(logits, torch.tensor([1, 1, 2])).tolist() == [True, False, True]


def test_psnr_agrees_with_torchmetrics_and_clamps_what_is_not_visible() -> None:
    a = normal(7, 3, 5, 4, seed=8, scale=0.6).clamp(-1, 1)
    b = (a + normal(7, 3, 5, 4, seed=9, scale=0.05)).clamp(-1, 1)
    theirs = [float(PeakSignalNoiseRatio(data_range=2.0)(x, y)) for x, y in zip(a, b, strict=True)]
    assert paired_psnr(a, b).tolist() == pytest.approx(theirs, rel=1e-6)
    white = torch.ones(2, 1, 2, 2)
    assert paired_psnr(white, 1.5 * white).tolist() == [math.inf] * 2
    assert paired_max_difference(white, 1.5 * white) == 0.5
    assert paired_psnr(white, -white).tolist() == [0.0, 0.0]  # the whole range wrong


def test_evaluation_of_the_held_out_digits_themselves() -> None:
    images, labels = digits("test")
    quality = evaluate_samples(images, labels, paired=images, resamples=20)
    assert quality.count == len(images)
    assert quality.frechet == pytest.approx(0, abs=1e-5)
    assert quality.accuracy >= 0.97
    assert (quality.psnr_median, quality.psnr_p5, quality.max_difference) == (math.inf, math.inf, 0.0)


def test_evaluation_ranks_damage() -> None:
    """Noise, fewer different images and a missing class each move the distance further the more there is of
    them.
    """
    images, labels = digits("train")
    train, held_out = (FeatureStatistics.of(digits_network().features(digits(split)[0])) for split in ("train", "test"))
    floor = frechet_distance(train, held_out)
    noise = normal(*images.shape, seed=10).float()
    few = images[:40].repeat(36, 1, 1, 1)

    def frechet(damaged: Tensor) -> float:
        return evaluate_samples(damaged, resamples=2).frechet

    assert frechet(images) == pytest.approx(floor, rel=1e-6)
    assert floor < frechet(images + 0.3 * noise) < frechet(images + 0.6 * noise)
    assert 2 * floor < frechet(few)
    assert 2 * floor < frechet(images[labels != 3])


def test_paired_summary_takes_the_worse_end() -> None:
    images, _ = digits("test")
    images = images[:40]
    offset = torch.full((40, 1, 1, 1), 0.01)
    offset[:2] = 0.1  # 2 of 40: the lowest 5 %
    full = images.clamp(-0.9, 0.9)
    quality = evaluate_samples(full + offset, paired=full, resamples=2)
    assert quality.psnr_median == pytest.approx(20 * math.log10(2 / 0.01), abs=1e-3)
    assert quality.psnr_p5 == pytest.approx(20 * math.log10(2 / 0.1), abs=1e-3)
    assert quality.max_difference == pytest.approx(0.1, abs=1e-6)
    assert quality.accuracy is None


def test_extractor_and_reference_are_pluggable() -> None:
    images, real = normal(50, 3, 2, 2, seed=11).clamp(-1, 1), normal(60, 3, 2, 2, seed=12).clamp(-1, 1)
    quality = evaluate_samples(images, None, real, extractor=Flatten(), resamples=20)
    statistics = FeatureStatistics.of(real.flatten(1))
    assert quality.frechet == frechet_distance(FeatureStatistics.of(images.flatten(1)), statistics)
    blind = evaluate_samples(images, None, statistics, extractor=Flatten(), resamples=20)
    assert blind == replace(quality, kernel=None, kernel_low=None, kernel_high=None)
    assert quality.kernel == pytest.approx(kernel_distance(images.flatten(1), real.flatten(1)), rel=1e-10)
    assert quality.kernel_low < quality.kernel < quality.kernel_high
    assert quality.frechet_low < quality.frechet < quality.frechet_high
    assert quality.frechet_bias > 0


def test_ratio_of_paired_samples_is_sharper_than_that_of_strangers() -> None:
    """A fixed scaling of the baseline's own noise against the same scaling of fresh noise: one truth, two
    widths.
    """
    reference = FeatureStatistics.of(normal(400, 12, seed=13, scale=0.2))

    def images(seed: int, scale: float) -> Tensor:
        return normal(600, 3, 2, 2, seed=seed, scale=scale).clamp(-1, 1)

    def ratio(ours: Tensor, theirs: Tensor) -> Interval:
        return frechet_ratio(ours, theirs, reference, extractor=Flatten())

    def distance(x: Tensor) -> float:
        return frechet_distance(FeatureStatistics.of(x.flatten(1)), reference)

    paired, stranger = (ratio(images(seed, 0.26), images(14, 0.25)) for seed in (14, 15))
    truth = distance(normal(300_000, 3, 2, 2, seed=16, scale=0.26)) / distance(
        normal(300_000, 3, 2, 2, seed=17, scale=0.25)
    )
    assert paired.value == distance(images(14, 0.26)) / distance(images(14, 0.25))
    assert paired.high - paired.low < 0.5 * (stranger.high - stranger.low)
    assert stranger.low < truth < stranger.high
    same = ratio(images(14, 0.25), images(14, 0.25))
    assert (same.low, same.value, same.high) == (1, 1, 1)


def test_checkpoint_saw_only_the_train_split_and_reads_the_rest() -> None:
    _, metadata = read_tensors(digits_features.CHECKPOINT)
    images, _ = digits("train")
    assert metadata["train_images"] == digits_features.fingerprint(images)
    held_out, labels = digits("test")
    network = digits_features.load()
    assert float(hits(network(held_out), labels).double().mean()) >= 0.97
    covariance = FeatureStatistics.of(network.features(held_out)).covariance
    assert torch.linalg.cond(covariance) < 1e4
    alone = torch.cat([network.features(image[None]) for image in held_out[:5]])
    torch.testing.assert_close(alone, network.features(held_out)[:5], rtol=1e-5, atol=1e-5)


def test_training_is_deterministic_and_leaves_the_random_state() -> None:
    images, labels = (x[:130] for x in digits("train"))  # two batches of 64 and one of 2
    weights = []
    for seed, outside in ((0, 7), (0, 8), (1, 7)):
        torch.manual_seed(outside)
        state = torch.get_rng_state()
        weights.append(digits_features.train(images, labels, epochs=2, seed=seed).state_dict())
        assert torch.equal(state, torch.get_rng_state())
    a, b, c = weights
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a)


def test_shift_moves_by_at_most_one_pixel_and_keeps_the_rest() -> None:
    images = torch.full((500, 1, 8, 8), -1.0)
    images[:, 0, 3, 5] = 1.0
    moved = digits_features.shift(images, torch.Generator().manual_seed(0))
    places = {tuple(place) for place in (moved == 1).nonzero()[:, 2:].tolist()}
    assert places == {(y, x) for y in (2, 3, 4) for x in (4, 5, 6)}
    assert (moved == 1).flatten(1).sum(1).tolist() == [1] * 500
    assert int((moved == -1).sum()) == 500 * 63


NAN_IMAGES = torch.full((3, 1, 8, 8), math.nan)
ZEROS = torch.zeros(3, 1, 8, 8)
TWO = FeatureStatistics.of(normal(9, 2, seed=0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(TWO, FeatureStatistics.of(normal(9, 3, seed=0))), "of 2 and of 3 features"),
        (lambda: FeatureStatistics.of(normal(1, 3, seed=0)), "at least 2 samples"),
        (lambda: FeatureStatistics.of(torch.tensor([[1.0], [math.inf]])), "NaN or infinity"),
        (lambda: FeatureStatistics(torch.zeros(2), torch.zeros(2, 2), 9), "float64"),
        (lambda: FeatureStatistics(torch.zeros(2).double(), torch.zeros(3, 3).double(), 9), r"\[3, 3\]"),
        (lambda: FeatureStatistics(torch.zeros(2).double(), torch.zeros(2, 2).double(), 1), "at least 2"),
        (lambda: bootstrap_frechet(normal(9, 2, seed=0), TWO, resamples=1), "at least 2 resamples"),
        (lambda: seed_interval([1.0]), "2 to 10"),
        (lambda: seed_interval([1.0] * 11), "2 to 10"),
        (lambda: seed_interval([1.0, math.nan]), "finite"),
        (lambda: hits(torch.zeros(3, 10), torch.tensor([0, 10, 1])), r"0\.\.9"),
        (lambda: hits(torch.zeros(3, 10), torch.tensor([0, -1, 1])), r"0\.\.9"),
        (lambda: hits(torch.zeros(3, 10), torch.zeros(3)), "integers"),
        (lambda: hits(torch.zeros(0, 10), torch.zeros(0).long()), r"\[0, 10\]"),
        (lambda: paired_psnr(ZEROS, ZEROS[:2]), "equal shapes"),
        (lambda: paired_psnr(ZEROS, NAN_IMAGES), "NaN or infinity"),
        (lambda: evaluate_samples(NAN_IMAGES), "NaN or infinity"),
        (lambda: evaluate_samples(ZEROS, paired=ZEROS[:1]), "equal shapes"),
        (lambda: evaluate_samples(ZEROS, torch.tensor([1])), "as many labels"),
        (lambda: evaluate_samples(ZEROS, torch.tensor([1, 2, 10])), r"0\.\.9"),
        (lambda: evaluate_samples(ZEROS[:1]), "N >= 2"),
        (lambda: evaluate_samples(ZEROS, None, 16 * torch.ones(5, 1, 8, 8)), "rescale"),
        (lambda: frechet_ratio(ZEROS, ZEROS[:2]), "equal shapes"),
        (lambda: evaluate_samples(ZEROS.double()), "float32"),
        (lambda: evaluate_samples(torch.zeros(3, 3, 32, 32)), r"\[N, 1, 8, 8\]"),
        (lambda: digits_features.train(ZEROS, torch.zeros(2).long()), "one label an image"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        digits_features.load(path)
    path.write_bytes(digits_features.CHECKPOINT.read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"):
        digits_features.load(path)
