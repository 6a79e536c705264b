"""Samples that reuse branches beside others: the same bits, ticks that fail, NaN, entries that are free again."""

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.forward.forward import run_forward
from adadiff.forward.output import ForwardOutput
from adadiff.model import Model
from sampler.cached_branches import CONFIGS, INVARIANT, LAGGED, POLICIES, SELDOM, SMALL_DIT, SYNC, mixed, run
from sampler.tiny import served


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sample_has_the_bits_that_it_has_alone(kind: str) -> None:
    requests = mixed()
    together, _ = run(kind, requests, INVARIANT)
    for image, (_, request) in zip(together, requests, strict=True):
        alone, _ = adadiff.sample(served(CONFIGS[kind]), 1, execution=INVARIANT, **request)
        assert torch.equal(image, alone[0])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_host_may_learn_of_exits_late(kind: str) -> None:
    exact, _ = run(kind, mixed(), SYNC)
    for execution in (LAGGED, SELDOM):
        late, _ = run(kind, mixed(), execution)
        for one, other in zip(exact, late, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # products over other numbers of rows


@pytest.mark.parametrize("fails", [2, 4])
def test_a_tick_that_is_made_again_finds_everything_as_it_was(fails: int) -> None:
    """It fails once its pass has written all rows; then it is made in halves."""
    calls = 0

    def forward(*asked: object, **given: object) -> ForwardOutput:
        nonlocal calls
        calls += 1
        output = run_forward(*asked, **given)
        if calls == fails:
            raise torch.OutOfMemoryError("none is left")
        return output

    usual, _ = run("uvit", mixed(), INVARIANT)
    again, batch = run("uvit", mixed(), INVARIANT, forward)
    assert batch.totals.halvings == 1
    for one, other in zip(usual, again, strict=True):
        assert torch.equal(one, other)


def test_nan_of_one_sample_does_not_reach_another() -> None:
    def forward(model: Model, x: Tensor, *asked: object, **given: object) -> ForwardOutput:
        poison = given["reuse"].entry == 1
        return run_forward(model, torch.where(poison[:, None, None, None], torch.nan, x), *asked, **given)

    requests = [(0, {"seed": i, "steps": 4, "policy": POLICIES[0]}) for i in range(3)]
    clean, _ = run("uvit", requests, INVARIANT)
    hurt, _ = run("uvit", requests, INVARIANT, forward)
    assert [bool(image.isnan().any()) for image in hurt] == [False, True, False]
    assert torch.equal(hurt[0], clean[0])
    assert torch.equal(hurt[2], clean[2])


def test_entries_are_free_again_and_the_next_sample_takes_nothing_of_them() -> None:
    requests = [(i, {"seed": i, "steps": 2, "policy": POLICIES[0]}) for i in range(9)]
    images, batch = run("dit", requests, INVARIANT)
    assert batch._reuse.store.taken == 0
    alone, _ = adadiff.sample(served(SMALL_DIT), 1, execution=INVARIANT, **requests[8][1])
    assert torch.equal(images[8], alone[0])
