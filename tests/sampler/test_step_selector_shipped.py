"""What the step selector in the package is worth, on noises that it did not learn from: the measure is written here
again, and random assignment is drawn in earnest."""

import math

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.data.prototypes import CLASSES, DIGITS

NOISES = 4  # of each class
SEEDS = (0, 1000, 2000)


def rmse(images: Tensor, reference: Tensor) -> float:
    return math.sqrt(float((images - reference).double().square().mean()))


def test_prototypes_take_half_the_steps_of_scans() -> None:
    selector = adadiff.load("digits_prototypes").step_selector
    assert selector.config.num_classes == CLASSES
    scans, prototypes = selector.steps_of_classes[:DIGITS], selector.steps_of_classes[DIGITS:]
    assert 2 * sum(prototypes) <= sum(scans)
    assert max(prototypes) < min(scans)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_choosing_beats_the_same_steps_for_all_and_random_ones(seed: int) -> None:
    model = adadiff.load("digits_prototypes")
    config = model.step_selector.config
    labels = torch.arange(CLASSES).repeat(NOISES)
    draw = {"class_labels": labels, "seed": seed, "solver": config.solver, "guidance_scale": config.guidance_scale}
    n = len(labels)
    assert seed + n <= config.seed  # it learnt from other noises
    reference, _ = adadiff.sample(model, n, steps=config.candidates[-1], **draw)
    own, report = adadiff.sample(model, n, steps="auto", **draw)
    mean = report.steps.double().mean().item()
    fixed, _ = adadiff.sample(model, n, steps=math.ceil(mean), **draw)
    dealt = report.steps[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    random, _ = adadiff.sample(model, n, steps=dealt, **draw)
    assert rmse(own, reference) < rmse(fixed, reference)
    assert rmse(own, reference) < 0.75 * rmse(random, reference)
    assert mean <= config.candidates[-1] / 4
