"""Who says how good images are: for each data set its features, real images, and whether an image is what was asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from adadiff.data import canvases
from adadiff.data.canvases import Canvases
from adadiff.data.digits import digits
from adadiff.evaluation.canvases import canvas_features, follow_rules
from adadiff.evaluation.features import digits_network
from adadiff.evaluation.frechet import FeatureStatistics, bootstrap_frechet, centred_interval, frechet_distance
from adadiff.evaluation.quality import lower_quantile, paired_psnr

DATA = ("digits", "canvases")
RESAMPLES = 100
REAL_CANVASES = 5000
Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Judge:
    """classes: labels 0, 1, ... that can be asked for. right: images [n, C, H, W], labels int64 [n] -> bool [n]."""

    data: str
    classes: int
    accuracy: str  # what is shared out
    features: Callable[[Tensor], Tensor]
    real: FeatureStatistics
    right: Callable[[Tensor, Tensor], Tensor]

    @torch.inference_mode()
    def measure(self, images: Tensor, labels: Tensor, reference: Tensor) -> dict[str, object]:
        """What a row says of images, float [n, C, H, W]; reference: those of the same noises by which they should go.

        Fréchet distance to real images, share of images that are right, and mean squared difference from the reference
        (of pixels in [-1, 1]), each with the ends of its 95 % interval. Draws are of samples drawn with replacement,
        the same ones for every method, so that differences between methods can be resampled in pairs.
        """
        shown, reference = images.clamp(-1, 1), reference.clamp(-1, 1)
        features = self.features(shown)
        frechet = frechet_distance(FeatureStatistics.of(features), self.real)
        draws = bootstrap_frechet(features, self.real, resamples=RESAMPLES)
        errors = (shown - reference).double().square().flatten(1).mean(1)
        error_draws = resampled_means(errors, RESAMPLES)
        psnr = lower_quantile(paired_psnr(images, reference), 0.5)
        right = float(self.right(shown, labels).double().mean())
        return {
            **_with_interval("frechet", frechet, draws),
            **_with_interval("error", float(errors.mean()), error_draws),
            **dict(zip(("accuracy", "accuracy_low", "accuracy_high"), share_interval(right, len(images)), strict=True)),
            "psnr_median": psnr if psnr < float("inf") else "inf",
        }


@cache
def judge_of(data: str, shape: tuple[int, int, int], classes: int) -> Judge:
    """shape: C, H, W of the samples. Raises ValueError for a data set that is not of this shape and classes."""
    if data == "digits":
        wanted, labels = [(1, 8, 8)], 10
    elif data == "canvases":
        wanted, labels = [Canvases(side).shape for side in (2, 3)], canvases.CLASSES
    else:
        raise ValueError(f"no data {data!r} to judge; there are {', '.join(DATA)}")
    if shape not in wanted or classes != labels:
        raise ValueError(f"{data} are {wanted} in {labels} classes; the model draws {shape} in {classes}")
    if data == "digits":
        network = digits_network()
        real = FeatureStatistics.of(network.features(digits("test")[0]))
        return Judge(data, labels, "of the class", network.features, real, lambda x, y: network(x).argmax(1) == y)
    side = shape[1] // canvases.CELL
    images, _ = Canvases(side).draw(REAL_CANVASES, "test", labels=torch.arange(REAL_CANVASES) % labels)
    return Judge(
        data, labels, "after the rule", canvas_features, FeatureStatistics.of(canvas_features(images)), follow_rules
    )


def resampled_means(values: Tensor, resamples: int, seed: int = 0) -> Tensor:
    """Means of values [n] drawn with replacement, the same places for all of one n. Returns float64 [resamples]."""
    n, generator = len(values), torch.Generator().manual_seed(seed)
    return torch.stack([values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(resamples)])


def share_interval(share: float, n: int) -> tuple[float, float, float]:
    """A share of n with the ends of its interval (Wilson)."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (share * (1 - share) / n + Z**2 / (4 * n**2)) ** 0.5
    return share, min(share, middle - half), max(share, middle + half)


def _with_interval(name: str, value: float, draws: Tensor) -> dict[str, float | Sequence[float]]:
    interval = centred_interval(value, draws)
    return {
        name: value,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
        f"{name}_draws": [float(f"{draw:.5g}") for draw in draws.tolist()],
    }
