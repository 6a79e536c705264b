"""Optimal stopping against exhaustive search, and the tables that come of it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adadiff.calibration.stopping import (
    EVERYBODY,
    Work,
    adaptive_table,
    best_thresholds,
    exit_layers,
    mixed,
    static_table,
    total,
)

WORK = Work(torch.tensor([3.0, 5.0, 8.0], dtype=torch.float64), 0.25)


def leaves(u: list[float], theta: tuple[float, ...]) -> int:
    return next((k + 1 for k, limit in enumerate(theta) if u[k] < limit), len(theta) + 1)


def cost(u: Tensor, error: Tensor, theta: tuple[float, ...], work: Work, price: float) -> float:
    """Of one timestep, sample by sample: the error where it leaves, its blocks, and every asking it passes."""
    summed = 0.0
    for b in range(u.shape[-1]):
        layer = leaves(u[:, b].tolist(), theta)
        asked = sum(limit > 0 for limit in theta[:layer])
        summed += (float(error[layer - 1, b]) if layer <= len(theta) else 0.0) + price * (
            float(work.exiting[layer - 1]) + work.score * asked
        )
    return summed


def everything(u: Tensor) -> list[tuple[float, ...]]:
    """All thresholds that tell the samples apart differently."""
    choices = []
    for own in u:
        ranked = own.sort().values.tolist()
        choices.append([0.0, *((a + b) / 2 for a, b in itertools.pairwise(ranked)), EVERYBODY])
    return list(itertools.product(*choices))


@pytest.mark.parametrize("score", [0.0, 0.25])
@pytest.mark.parametrize("seed", range(6))
def test_near_the_best_of_all_thresholds(seed: int, score: float) -> None:
    """Layers are improved one at a time, so the joint optimum is not certain; it is never far."""
    draw = torch.Generator().manual_seed(seed)
    error = torch.rand(1, 2, 6, generator=draw) * torch.tensor([2.0, 1.0])[:, None]
    u = error * torch.exp(0.4 * torch.randn(1, 2, 6, generator=draw)) / 5
    work = Work(WORK.exiting, score)
    for price in (0.01, 0.1, 0.3, 1.0):
        least = min(cost(u[0], error[0], theta, work, price) for theta in everything(u[0]))
        found = tuple(best_thresholds(u, error, work, price)[0].tolist())
        assert least - 1e-6 <= cost(u[0], error[0], found, work, price) <= 1.03 * least


def test_those_who_have_left_have_no_say() -> None:
    """Four samples leave at once; had they stayed, the second layer would do wrong to let the others go."""
    u = torch.tensor([[[0.1, 0.1, 0.1, 0.1, 0.9, 0.9], [0.2, 0.2, 0.2, 0.2, 0.3, 0.4]]])
    error = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 99.0, 99.0], [50.0, 50.0, 50.0, 50.0, 0.1, 0.1]]])
    assert exit_layers(u, best_thresholds(u, error, WORK, 1.0)).tolist() == [[1, 1, 1, 1, 2, 2]]


def test_one_layer_is_exact() -> None:
    draw = torch.Generator().manual_seed(0)
    error, u = torch.rand(4, 1, 9, generator=draw), torch.rand(4, 1, 9, generator=draw)
    work = Work(torch.tensor([1.0, 2.0], dtype=torch.float64), 0.1)
    theta = best_thresholds(u, error, work, 0.4)
    for s in range(4):
        least = min(cost(u[s], error[s], own, work, 0.4) for own in everything(u[s]))
        assert cost(u[s], error[s], tuple(theta[s].tolist()), work, 0.4) == pytest.approx(least, rel=1e-6)


def test_timesteps_do_not_interact() -> None:
    draw = torch.Generator().manual_seed(1)
    error, u = torch.rand(5, 3, 8, generator=draw), torch.rand(5, 3, 8, generator=draw)
    work = Work(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), 0.05)
    together = best_thresholds(u, error, work, 0.2)
    for s in range(5):
        assert torch.equal(together[s : s + 1], best_thresholds(u[s : s + 1], error[s : s + 1], work, 0.2))


def test_free_work_is_never_saved_and_dear_work_always() -> None:
    error, u = torch.rand(2, 2, 5) + 0.1, torch.rand(2, 2, 5)
    assert not best_thresholds(u, error, WORK, 0.0).any()
    assert exit_layers(u, best_thresholds(u, error, WORK, 1e6)).eq(1).all()


def test_closed_layers_are_left_by_nobody() -> None:
    error, u = torch.rand(3, 2, 40) * 0.1, torch.rand(3, 2, 40)
    theta = best_thresholds(u, error, WORK, 0.05, torch.tensor([True, False]))
    assert not theta[:, 0].any()
    assert bool(theta[:, 1].any())


def test_nan_never_leaves() -> None:
    u = torch.full((1, 2, 3), torch.nan)
    assert exit_layers(u, torch.full((1, 2), EVERYBODY)).eq(3).all()


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=25)
def test_totals_count_every_sample(seed: int, K: int, S: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    u, error = torch.rand(S, K, 7, generator=draw), torch.rand(S, K, 7, generator=draw)
    theta = torch.rand(S, K, generator=draw) * (torch.rand(S, K, generator=draw) < 0.6)
    work = Work(torch.rand(K + 1, generator=draw, dtype=torch.float64).cumsum(0) + 0.1, 0.01)
    exits = exit_layers(u, theta)
    asked = theta.amax(0) > 0
    lost = spent = 0.0
    for s in range(S):
        for b in range(7):
            layer = leaves(u[s, :, b].tolist(), tuple(theta[s].tolist()))
            assert int(exits[s, b]) == layer
            lost += float(error[s, layer - 1, b]) if layer <= K else 0.0
            spent += float(work.exiting[layer - 1]) + 0.01 * int(asked[:layer].sum())
    found = total(exits, error, work, asked)
    assert found[0] == pytest.approx(lost / 7, rel=1e-5)
    assert found[1] == pytest.approx(spent / (7 * S) / float(work.exiting[-1]), rel=1e-5)


def informative(S: int = 20, n: int = 400) -> tuple[Tensor, Tensor, Work]:
    """Errors that differ between samples, times and layers, and uncertainties that tell much about them."""
    draw = torch.Generator().manual_seed(4)
    scale = torch.exp(torch.randn(1, 1, n, generator=draw)) * torch.linspace(2, 0.2, S)[:, None, None]
    error = scale * torch.tensor([1.0, 0.5, 0.2, 0.05])[:, None] * torch.exp(0.3 * torch.randn(S, 4, n, generator=draw))
    u = torch.sigmoid(error.log() + 0.3 * torch.randn(S, 4, n, generator=draw))
    return u, error, Work(torch.arange(1, 6, dtype=torch.float64), 0.01)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_tables_take_their_share_and_adaptive_ones_lose_less(share: float) -> None:
    u, error, work = informative()
    theta = adaptive_table(u, error, work, share)
    exits = exit_layers(u, theta)
    lost, spent = total(exits, error, work, theta.amax(0) > 0)
    assert share - 0.02 < spent <= share
    depths = static_table(error, work, share)
    static, static_spent = total(depths[:, None].expand(-1, u.shape[-1]), error, work)
    assert share <= static_spent < share + 0.06
    assert lost < 0.8 * static
    halves = adaptive_table(u[..., :200], error[..., :200], work, share)  # and not only on what it was chosen on
    unseen = total(exit_layers(u[..., 200:], halves), error[..., 200:], work, halves.amax(0) > 0)
    assert unseen[0] < 0.85 * total(depths[:, None].expand(-1, 200), error[..., 200:], work)[0]
    assert abs(unseen[1] - share) < 0.03


def test_the_static_table_is_the_best_of_its_work() -> None:
    """Against all tables of three times and three layers."""
    _, error, _ = informative(S=3)
    error = error[:, :2]
    mean = torch.cat([error.mean(-1), torch.zeros(3, 1)], 1).double()
    work = Work(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 0.0)
    for share in (0.4, 0.6, 0.8):
        depths = static_table(error, work, share)
        own = float(mean.gather(1, depths[:, None] - 1).sum())
        spent = float(work.exiting[depths - 1].sum())
        for other in itertools.product((1, 2, 3), repeat=3):
            if sum(other) <= spent:
                assert own <= float(mean.gather(1, torch.tensor(other)[:, None] - 1).sum()) + 1e-9


def test_the_whole_budget_is_the_full_network() -> None:
    u, error, work = informative()
    assert not adaptive_table(u, error, work, 1.0).any()
    assert static_table(error, work, 1.0).eq(5).all()


def test_layers_hardly_anybody_leaves_after_are_not_asked() -> None:
    u, error, work = informative()
    error[:, 1] = error[:, 0] * 1.001  # the second layer is no better than the first
    theta = adaptive_table(u, error, work, 0.5)
    counts = torch.bincount(exit_layers(u, theta).flatten(), minlength=6)[1:5] / u[:, 0].numel()
    assert bool(((theta.amax(0) > 0) == (counts > 0)).all())
    assert float(counts[1]) == 0 or float(counts[1]) > 0.005


def test_budgets_below_one_block_are_refused() -> None:
    u, error, work = informative()
    for table in (lambda: adaptive_table(u, error, work, 0.1), lambda: static_table(error, work, 0.1)):
        with pytest.raises(ValueError, match=r"the least that this network can run is 0\.20"):
            table()


def test_a_mixture_spends_what_it_is_asked_to() -> None:
    assert mixed(0.5, 0.4, 0.8) == pytest.approx(0.25)
    assert mixed(0.4, 0.4, 0.8) == 0
    assert mixed(0.8, 0.4, 0.8) == mixed(0.8, 0.8, 0.8) == 1
    assert mixed(0.9, 0.4, 0.8) == 1  # what there is


def test_tables_on_both_sides_of_a_share_are_neighbours() -> None:
    """Depths that are worth having lie far apart: no table spends 0.6 of the work, one less and one more."""
    error = torch.tensor([[[0.1], [9.0], [9.0]], [[0.3], [9.0], [9.0]]])  # [2, 3, 1]
    work = Work(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), 0.0)
    more, less = (static_table(error, work, 0.6, above) for above in (True, False))
    assert (less.tolist(), more.tolist()) == ([1, 1], [1, 4])
