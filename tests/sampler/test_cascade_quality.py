"""The cascade that ships: its oracle sends the right images on."""

from functools import cache

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff import checkpoint
from adadiff.data.digits import digits
from adadiff.metrics.features import digits_network
from adadiff.metrics.frechet import FeatureStatistics, frechet_distance
from adadiff.sampling.cascade_file import CascadeFile, read_cascade

MOST_BYTES = 3_500_000


def shipped() -> CascadeFile:
    return read_cascade(checkpoint.find("digits_cascade"), torch.device("cpu"), torch.float32)


@cache
def held_out() -> FeatureStatistics:
    return FeatureStatistics.of(digits_network().features(digits("test")[0]))


def distance(images: Tensor) -> float:
    """Fréchet distance to the held-out scans, in features that neither student nor oracle was trained with."""
    return frechet_distance(FeatureStatistics.of(digits_network().features(images)), held_out())


def test_the_shipped_file_is_small_and_of_the_size_it_says() -> None:
    path, file = checkpoint.find("digits_cascade"), shipped()
    assert path.stat().st_size < MOST_BYTES
    assert file.settings.steps == 4
    assert file.student.num_layers == adadiff.load("digits").num_layers


@pytest.mark.parametrize("name", ["digits", "digits_plain"])
def test_it_serves_every_model_of_digits(name: str) -> None:
    labels = [i % 10 for i in range(40)]
    images, report = adadiff.sample(
        adadiff.load(name), 40, steps=10, class_labels=labels, policy="cascade:digits_cascade,share=0.5"
    )
    students, _ = adadiff.sample(shipped().student, 40, steps=4, class_labels=labels)
    stay = ~report.went_on
    assert 5 < int(stay.sum()) < 35
    torch.testing.assert_close(images[stay], students[stay], rtol=1e-3, atol=1e-3)
    judged = digits_network()(images).argmax(1) == torch.tensor(labels)
    assert float(judged.float().mean()) > 0.8


@cache
def drawn(mode: str, seed: int, share: int) -> tuple[Tensor, Tensor]:
    """1,000 images of the student alone, or of the second stage of all, and their scores."""
    policy = f"cascade:digits_cascade,share={share},mode={mode}"
    given = {"steps": 20, "class_labels": [i % 10 for i in range(1000)], "seed": 10**7 * (seed + 1), "batch": 250}
    images, report = adadiff.sample(adadiff.load("digits"), 1000, policy=policy, **given)
    return images, report.oracle_scores


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("mode", "share"), [("refine", 0.3), ("regenerate", 0.3), ("regenerate", 0.5)])
def test_the_worst_images_go_on_rather_than_the_best(mode: str, share: float, seed: int) -> None:
    """Fréchet distance below that of the inverted routing, which sends as many on that the oracle likes best. An image
    goes on by itself, see test_cascade.py, so that both are put together of the same two."""
    (students, scores), (teachers, _) = drawn("refine", seed, 0), drawn(mode, seed, 1)
    goes_on = scores < shipped().settings.threshold(share)
    k = int(goes_on.sum())
    assert abs(k / 1000 - share) < 0.06  # the quantile is of other images
    best = torch.zeros(1000, dtype=torch.bool).index_fill(0, scores.argsort()[-k:], True)
    adaptive, inverted = (torch.where(own[:, None, None, None], teachers, students) for own in (goes_on, best))
    assert distance(adaptive) < distance(inverted)
