"""How good the images are: Fréchet distance with its interval, class accuracy, paired difference.

The Fréchet distance says how far generated images as a whole are from real ones; it needs thousands of them.
The paired difference says how far early exit moved each image from the full network's image of the same
noise; it is far more sensitive. Class accuracy is only a check: it rises when images lose variety.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.digits import digits
from .features import digits_network
from .frechet import FeatureStatistics, Interval, bootstrap_frechet, centred_interval, frechet_distance

Extractor = Callable[[Tensor], Tensor]  # images [N, C, H, W] -> features [N, F], or logits [N, classes]


@dataclass(frozen=True)
class Quality:
    """What `evaluate_samples` measured. Entries that were not asked for are None.

    `frechet` is the plain distance of these `count` samples, to be compared at equal count: it lies above the
    distance of infinitely many samples by about `frechet_bias`. [frechet_low, frechet_high] is the 95 %
    interval for the expected distance at this count; subtract the bias from both ends and it is the interval
    for infinitely many. PSNR in dB: the median and the 5th percentile (the worse end) over samples.
    """

    count: int
    frechet: float
    frechet_low: float
    frechet_high: float
    frechet_bias: float
    accuracy: float | None = None
    psnr_median: float | None = None
    psnr_p5: float | None = None
    max_difference: float | None = None


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is that of the label. logits: [N, classes]; labels: integers [N]."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(f"logits [N, classes] need labels [N], got {list(logits.shape)} and {list(labels.shape)}")
    if labels.dtype.is_floating_point or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be integers in 0..{logits.shape[1] - 1}, got {labels.dtype} {labels.tolist()[:5]}"
        )
    return float((logits.argmax(1) == labels).double().mean())


def paired_psnr(images: Tensor, reference: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(data_range² / mean square difference).

    images, reference: [N, ...], finite. Both are clamped to [-data_range/2, data_range/2] first, as a picture
    file does, so that only visible differences count. Returns float64 [N]; equal images give infinity.
    """
    check_pair(images, reference)
    half = data_range / 2
    difference = images.double().clamp(-half, half) - reference.double().clamp(-half, half)
    return 10 * torch.log10(data_range**2 / difference.square().flatten(1).mean(1))


def paired_max_difference(images: Tensor, reference: Tensor) -> float:
    """Largest absolute difference of any element, nothing clamped: the strictest check of two samplers."""
    check_pair(images, reference)
    return float((images.double() - reference.double()).abs().max())


def check_pair(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim < 2 or images.numel() == 0:
        raise ValueError(f"a pair takes equal shapes [N, ...], got {list(images.shape)} and {list(reference.shape)}")
    if not (images.isfinite().all() and reference.isfinite().all()):
        raise ValueError("the images hold NaN or infinity; a sampler that makes them is broken")


def lower_quantile(values: Tensor, level: float) -> float:
    """Interpolation between neighbours would turn infinite values (equal images) into NaN."""
    return float(values.quantile(level, interpolation="lower"))


def reference_statistics(
    reference: Tensor | FeatureStatistics | None, extractor: Extractor, device: torch.device
) -> FeatureStatistics:
    if isinstance(reference, FeatureStatistics):
        return reference
    real = digits("test")[0].to(device) if reference is None else reference
    if real.abs().max() > 1:
        raise ValueError(f"real images lie in [-1, 1], got {real.min():g} to {real.max():g}; rescale them")
    return FeatureStatistics.of(extractor(real))


@torch.inference_mode()
def evaluate_samples(
    images: Tensor,
    labels: Tensor | None = None,
    reference: Tensor | FeatureStatistics | None = None,
    paired: Tensor | None = None,
    *,
    extractor: Extractor | None = None,
    classifier: Extractor | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Quality:
    """Quality of generated images, float [N, C, H, W] in [-1, 1]; values beyond count as ±1, as when shown.

    labels: int64 [N], the classes asked for; None measures no accuracy. reference: real images, or their
    statistics under the same extractor; default: the held-out digits. paired: images [N, C, H, W] of the full
    network from the same noises. extractor, classifier: default to the digits network (`adadiff.evaluation.features`).
    Raises ValueError where shapes disagree, labels are out of range or images hold NaN or infinity.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(f"evaluation takes images [N, C, H, W] with N >= 2, got {list(images.shape)}")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images need as many labels, got {list(labels.shape)}")
    check_pair(images, images if paired is None else paired)
    extractor = extractor or digits_network().features
    statistics = reference_statistics(reference, extractor, images.device)
    shown = images.clamp(-1, 1)
    accuracy = None if labels is None else class_accuracy((classifier or digits_network())(shown), labels)
    features = extractor(shown)
    frechet = frechet_distance(FeatureStatistics.of(features), statistics)
    draws = bootstrap_frechet(features, statistics, resamples=resamples, seed=seed)
    interval = centred_interval(frechet, draws)
    psnr = None if paired is None else paired_psnr(images, paired)

    return Quality(
        count=len(images),
        frechet=frechet,
        frechet_low=interval.low,
        frechet_high=interval.high,
        frechet_bias=float(draws.mean()) - frechet,
        accuracy=accuracy,
        psnr_median=None if psnr is None else lower_quantile(psnr, 0.5),
        psnr_p5=None if psnr is None else lower_quantile(psnr, 0.05),
        max_difference=None if paired is None else paired_max_difference(images, paired),
    )


@torch.inference_mode()
def frechet_ratio(
    images: Tensor,
    baseline: Tensor,
    reference: Tensor | FeatureStatistics | None = None,
    *,
    extractor: Extractor | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """Fréchet distance of images over that of the baseline's, with its interval; other arguments as above.

    images, baseline: [N, C, H, W], row i of both from the same noise. Rows are resampled in pairs, so what
    the two samplers share cancels: the ratio is known more precisely than either distance. Baselines of other
    noises are allowed; their interval is just wider. Raises ValueError where the shapes differ.
    """
    check_pair(images, baseline)
    extractor = extractor or digits_network().features
    statistics = reference_statistics(reference, extractor, images.device)
    both = [extractor(side.clamp(-1, 1)) for side in (images, baseline)]
    ours, theirs = (frechet_distance(FeatureStatistics.of(features), statistics) for features in both)
    draws = [bootstrap_frechet(features, statistics, resamples=resamples, seed=seed) for features in both]
    return centred_interval(ours / theirs, draws[0] / draws[1])


def real_floor() -> float:
    """Fréchet distance of the digits' train split to the held-out one: a floor to read other values against.

    The extractor was fitted to the train split, so fresh scans would score a little differently.
    """
    train, held_out = (FeatureStatistics.of(digits_network().features(digits(split)[0])) for split in ("train", "test"))
    return frechet_distance(train, held_out)
