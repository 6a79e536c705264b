"""Quality of images for rows, with the features, held-out images and judge of `adadiff evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from adadiff.metrics.extractors import Features, features_from
from adadiff.metrics.frechet import FeatureStatistics, bootstrap_frechet, frechet_distance
from adadiff.metrics.intervals import centred_interval, resampled, share_interval
from adadiff.metrics.judges import JUDGES, Judge, judge_of
from adadiff.metrics.quality import lower_quantile, paired_psnr
from benchmarks.suites.drawing import load

ACCURACY = {"digits": "of the class", "canvases": "after the rule", "letters": "of the class"}  # what counts as right
DATA = tuple(ACCURACY)
RESAMPLES = 100


@dataclass(frozen=True)
class Judging:
    """real: statistics of features of held-out real images."""

    judge: Judge
    features: Features
    real: FeatureStatistics

    @torch.inference_mode()
    def measure(self, images: Tensor, labels: Tensor, reference: Tensor) -> dict[str, object]:
        """Quality entries of a row. images, reference: float [n, C, H, W]; reference: images of the same noises that
        should be reproduced.

        Fréchet distance to real images, accuracy, and mean squared difference from the reference (pixels in [-1, 1]),
        each with its 95 % interval. Bootstrap draws use the same indices for every method, so that differences between
        methods can be resampled in pairs.
        """
        shown, reference = images.clamp(-1, 1), reference.clamp(-1, 1)
        features = self.features(shown)
        frechet = frechet_distance(FeatureStatistics.of(features), self.real)
        draws = bootstrap_frechet(features, self.real, resamples=RESAMPLES)
        errors = (shown - reference).double().square().flatten(1).mean(1)
        error_draws = torch.stack([errors[index].mean() for index in resampled(len(errors), RESAMPLES, seed=0)])
        psnr = lower_quantile(paired_psnr(images, reference), 0.5)
        share = share_interval(float(self.judge.right(shown, labels).double().mean()), len(images))
        return {
            **_with_interval("frechet", frechet, draws),
            **_with_interval("error", float(errors.mean()), error_draws),
            "accuracy": share.value,
            "accuracy_low": share.low,
            "accuracy_high": share.high,
            "accuracy_of": ACCURACY[self.judge.name],
            "psnr_median": psnr if psnr < float("inf") else "inf",
        }


@cache
def judging_of(data: str, shape: tuple[int, int, int], classes: int) -> Judging:
    """shape: C, H, W of the samples. Raises ValueError for a data set that is not of this shape and classes."""
    if data not in DATA:
        raise ValueError(f"no data {data!r} to judge; there are {', '.join(DATA)}")
    judge = judge_of(shape, classes, data)
    if judge is None:
        known = " or ".join(f"{j.shape} in {j.classes} classes" for j in JUDGES if j.name == data)
        raise ValueError(f"{data} are {known}; the model draws {shape} in {classes}")
    features = features_from(data)
    with torch.inference_mode():
        return Judging(judge, features, FeatureStatistics.of(features(judge.held_out()[0])))


def judging_of_model(data: str, name: str) -> Judging:
    """Of a model: a shipped name or a file."""
    model = load(name)
    return judging_of(data, tuple(model.backbone.sample_shape), model.config.classes)


def _with_interval(name: str, value: float, draws: Tensor) -> dict[str, float | Sequence[float]]:
    interval = centred_interval(value, draws)
    return {
        name: value,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
        f"{name}_draws": [float(f"{draw:.5g}") for draw in draws.tolist()],
    }
