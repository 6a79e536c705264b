"""Quality of images: Fréchet and kernel distance with intervals, accuracy, paired difference.

Distances compare the distribution of generated images with that of real ones, and need thousands of images. The paired
difference compares each image with the full network's image of the same noise, and is far more sensitive. Accuracy is
only a sanity check: it rises when images lose variety.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .extractors import Extractor
from .features import digits_network
from .frechet import FeatureStatistics, bootstrap_frechet, frechet_distance, paired_ratio
from .intervals import Interval, centred_interval, share_interval
from .judges import DigitsJudge, Judge
from .kernel import kernel_distances, resample_counts
from .references import Reference, extract

CHUNK = 256  # images at a time


@dataclass(frozen=True)
class Quality:
    """Measurements of `count` images. Entries that were not measured are None.

    `frechet`: the plain distance of these samples; compare it only at equal counts, as it exceeds the distance of
    infinitely many samples by about `frechet_bias`. [frechet_low, frechet_high]: 95 % interval of the expected distance
    at this count; subtract the bias from both ends for infinitely many. `kernel` is unbiased. Intervals are for this
    reference; they do not include the uncertainty from the choice of real images. `shares`: accuracy of each group of
    the judge. PSNR in dB: median and 5th percentile (the worse end) over samples.
    """

    count: int
    frechet: float | None = None
    frechet_low: float | None = None
    frechet_high: float | None = None
    frechet_bias: float | None = None
    kernel: float | None = None
    kernel_low: float | None = None
    kernel_high: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    shares: dict[str, Interval] = field(default_factory=dict)
    psnr_median: float | None = None
    psnr_p5: float | None = None
    max_difference: float | None = None


@dataclass(frozen=True)
class Measured:
    """Measurements of each image, in order: features [N, F], right bool [N], psnr float64 [N] in dB, None if not
    measured; groups: name -> bool [N]."""

    count: int
    features: Tensor | None = None
    right: Tensor | None = None
    groups: dict[str, Tensor] = field(default_factory=dict)
    psnr: Tensor | None = None
    max_difference: float | None = None

    def quality(self, reference: Reference | None = None, *, resamples: int = 200, seed: int = 0) -> Quality:
        """Summary over all images, with distances if there is a reference. resamples, seed: of the bootstrap."""
        values = {} if reference is None else distances(self.features, reference, resamples=resamples, seed=seed)
        if self.right is not None:
            share = share_of(self.right)
            values |= {"accuracy": share.value, "accuracy_low": share.low, "accuracy_high": share.high}
            values["shares"] = {k: share_of(self.right[part]) for k, part in self.groups.items() if bool(part.any())}
        if self.psnr is not None:
            values |= {"psnr_median": lower_quantile(self.psnr, 0.5), "psnr_p5": lower_quantile(self.psnr, 0.05)}
        return Quality(self.count, max_difference=self.max_difference, **values)


@torch.inference_mode()
def measure(
    pieces: Iterable[tuple[Tensor, Tensor | None, Tensor | None]],
    extractor: Extractor | None = None,
    judge: Judge | None = None,
    data_range: float = 2.0,
) -> Measured:
    """Measures images piece by piece. A piece: images, float [k, C, H, W], clamped to [-1, 1] like a picture file;
    labels, int64 [k], or None for no accuracy; paired, [k, C, H, W], the images to compare with, or None.

    data_range: see `paired_psnr`. Raises ValueError for shapes that disagree, labels out of range, NaN or infinity.
    """
    features, right, groups, psnr, most, count = [], [], [], [], [], 0
    for images, labels, paired in pieces:
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"evaluation takes images [N, C, H, W], got {list(images.shape)}")
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images need as many labels, got {list(labels.shape)}")
        check_pair(images, images if paired is None else paired)
        count += len(images)
        shown = images.clamp(-1, 1)
        if extractor is not None:
            features.append(extract(extractor, [shown]))
        if judge is not None and labels is not None:
            right.append(judge.right(shown, labels))
            groups.append(judge.groups(labels))
        if paired is not None:
            psnr.append(paired_psnr(images, paired, data_range))
            most.append(paired_max_difference(images, paired))
    return Measured(
        count,
        features=torch.cat(features) if features else None,
        right=torch.cat(right) if right else None,
        groups={name: torch.cat([piece[name] for piece in groups]) for name in groups[0]} if groups else {},
        psnr=torch.cat(psnr) if psnr else None,
        max_difference=max(most) if most else None,
    )


def distances(features: Tensor, reference: Reference, *, resamples: int = 200, seed: int = 0) -> dict[str, float]:
    """Entries `frechet*` of `Quality` for features [N, F], and `kernel*` if the reference has features."""
    frechet = frechet_distance(FeatureStatistics.of(features), reference.statistics)
    draws = bootstrap_frechet(features, reference.statistics, resamples=resamples, seed=seed)
    values = {**_ends("frechet", frechet, draws), "frechet_bias": float(draws.mean()) - frechet}
    if reference.features is not None:
        counts = torch.cat(
            [
                torch.ones(1, len(features), dtype=torch.float64, device="cpu"),
                resample_counts(len(features), resamples, seed),
            ]
        )
        plain, *_ = draws = kernel_distances(features, reference.features, counts, reference.within)
        values |= _ends("kernel", float(plain), draws[1:])
    return values


def evaluate_samples(
    images: Tensor,
    labels: Tensor | None = None,
    reference: Tensor | FeatureStatistics | Reference | None = None,
    paired: Tensor | None = None,
    *,
    extractor: Extractor | None = None,
    judge: Judge | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Quality:
    """Quality of generated images, float [N, C, H, W], clamped to [-1, 1] like a picture file.

    labels: int64 [N], the requested classes; None: no accuracy. reference: real images in [-1, 1], or statistics or
    features made with the same extractor; default: the held-out digits. paired: the full network's images of the same
    noises, [N, C, H, W]. extractor, judge: default to those of the digits.
    Raises ValueError for shapes that disagree, labels out of range, NaN or infinity.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(f"evaluation takes images [N, C, H, W] with N >= 2, got {list(images.shape)}")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images need as many labels, got {list(labels.shape)}")
    check_pair(images, images if paired is None else paired)
    extractor = extractor or digits_network().features
    reference = as_reference(reference, extractor, images.device)
    parts = (p if p is None else p.split(CHUNK) for p in (images, labels, paired))
    pieces = zip(*([None] * -(-len(images) // CHUNK) if p is None else p for p in parts), strict=True)
    return measure(pieces, extractor, judge or DigitsJudge()).quality(reference, resamples=resamples, seed=seed)


@torch.inference_mode()
def frechet_ratio(
    images: Tensor,
    baseline: Tensor,
    reference: Tensor | FeatureStatistics | Reference | None = None,
    *,
    extractor: Extractor | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """Fréchet distance of `images` divided by that of `baseline`, with its 95 % interval; other arguments as in
    `evaluate_samples`.

    images, baseline: [N, C, H, W], image i of both from the same noise. Rows are resampled in pairs, so common
    variation cancels, and the ratio is known more precisely than either distance. Baselines of other noises are
    allowed; their interval is wider. Raises ValueError if the shapes differ.
    """
    check_pair(images, baseline)
    extractor = extractor or digits_network().features
    statistics = as_reference(reference, extractor, images.device).statistics
    ours, theirs = (extract(extractor, [side.clamp(-1, 1)]) for side in (images, baseline))
    return paired_ratio(ours, theirs, statistics, resamples=resamples, seed=seed)


def paired_psnr(images: Tensor, reference: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(data_range² / mean square difference).

    images, reference: [N, ...], finite. Both are first clamped to [-data_range/2, data_range/2], like a picture file,
    so that only visible differences count. Returns float64 [N]; equal images give infinity.
    """
    check_pair(images, reference)
    half = data_range / 2
    difference = images.double().clamp(-half, half) - reference.double().clamp(-half, half)
    return 10 * torch.log10(data_range**2 / difference.square().flatten(1).mean(1))


def paired_max_difference(images: Tensor, reference: Tensor) -> float:
    """Largest absolute difference of any element, without clamping: the strictest comparison of two samplers."""
    check_pair(images, reference)
    return float((images.double() - reference.double()).abs().max())


def check_pair(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim < 2 or images.numel() == 0:
        raise ValueError(f"a pair takes equal shapes [N, ...], got {list(images.shape)} and {list(reference.shape)}")
    if not (images.isfinite().all() and reference.isfinite().all()):
        raise ValueError("the images hold NaN or infinity; a sampler that makes them is broken")


def share_of(right: Tensor) -> Interval:
    """The share of True in bool [n], n >= 1, with its interval."""
    return share_interval(float(right.double().mean()), len(right))


def lower_quantile(values: Tensor, level: float) -> float:
    """Quantile without interpolation, which would turn infinite values (equal images) into NaN."""
    return float(values.quantile(level, interpolation="lower"))


@torch.inference_mode()
def as_reference(
    reference: Tensor | FeatureStatistics | Reference | None, extractor: Extractor, device: torch.device
) -> Reference:
    """The `Reference` of real images [M, C, H, W] in [-1, 1] (None: the held-out digits) or of their statistics.
    Raises ValueError for images outside [-1, 1]."""
    if isinstance(reference, Reference):
        return reference
    if isinstance(reference, FeatureStatistics):
        return Reference(reference)
    real = DigitsJudge().held_out()[0].to(device) if reference is None else reference
    if real.abs().max() > 1:
        raise ValueError(f"real images lie in [-1, 1], got {real.min():g} to {real.max():g}; rescale them")
    return Reference.of(extract(extractor, [real]))


def _ends(name: str, value: float, draws: Tensor) -> dict[str, float]:
    interval = centred_interval(value, draws)
    return {name: value, f"{name}_low": interval.low, f"{name}_high": interval.high}
