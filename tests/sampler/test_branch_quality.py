"""Reuse of branches against fewer steps, on the shipped digits: error to the run that computes everything, at multiply-
adds that are no more.

Measured on the first 200 seeds, 20 steps of DDIM: with the first four blocks run at every step (layers=5-13) reuse has
44 % less error than fewer steps. With all thirteen (53 % of the multiply-adds) it has half as much again: the first
blocks of this U-ViT read the noisy image, which changes most from step to step, and no gate tells them the time.
"""

from functools import cache, partial

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.sampling.reports import Report
from benchmarks.baselines import reuse
from benchmarks.baselines.reuse import Reusing
from benchmarks.suites.drawing import lockstep

SAMPLES, STEPS, FIRST_SEED = 200, 20, 5000  # seeds by which nothing was chosen


@cache
def drawn(policy: str, steps: int = STEPS, n: int = SAMPLES) -> tuple[Tensor, Report]:
    labels = torch.arange(n) % 10
    return adadiff.sample(model(), n, steps=steps, policy=policy, seed=FIRST_SEED, class_labels=labels)


@cache
def model() -> adadiff.Model:
    return adadiff.load("digits")


def error(images: Tensor, n: int = SAMPLES) -> float:
    return float((images - drawn("full", n=n)[0]).square().mean().sqrt())


@pytest.mark.slow
def test_reuse_of_later_layers_beats_fewer_steps_at_equal_multiply_adds() -> None:
    images, report = drawn("reuse:every=2,level=layer,layers=5-13")
    share = report.macs / report.macs_full
    fewer = -int(-share * STEPS // 1)  # as many steps, rounded up: these may spend more
    assert share < fewer / STEPS < 0.75
    assert error(images) <= 0.75 * error(drawn("full", fewer)[0])


@pytest.mark.parametrize("every", [2, 3])
def test_the_engine_draws_what_reuse_in_lock_step_draws(every: int) -> None:
    """The baseline keeps the sum of a block's branches, so that they differ by rounding; its multiply-adds are ours."""
    n = 12
    images, report = drawn(f"reuse:every={every},level=layer", n=n)
    labels = torch.arange(n) % 10
    seeds = FIRST_SEED + torch.arange(n)
    backbone = model().backbone
    theirs = lockstep(backbone, model().schedule, seeds, labels, STEPS, n, start=partial(Reusing, backbone, every))
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-4)
    assert report.macs == n * reuse.macs(backbone, STEPS, every)
    assert error(images, n) > 0.02  # it does reuse
