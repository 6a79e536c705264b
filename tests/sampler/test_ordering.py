"""Lanes in the order in which they are expected to leave: it is learnt, and it changes only what has to be moved."""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adadiff.policies.exit_policies import Depth, Rule
from adadiff.sampling.batch import Batch
from adadiff.sampling.ordering import ExpectedDepth
from adadiff.sampling.samples import SampleBatch
from sampler.tiny import served

LAYERS, STEPS = 5, 20


@dataclass(frozen=True)
class Phases:
    """The noisy half of a sample's steps runs all blocks and the other half two, against all expectations."""

    scored = False
    stateful = False
    threshold = 500.0

    def asks(self, layers: int) -> range:
        return range(1, layers)

    def check(self, thresholds: Tensor) -> None:
        return None

    def leave(self, u: None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        return (t < threshold) & (layer >= 2)


def serve(
    rule: Rule, ticks: int, thresholds: list[float] | None = None, apart: int = 2, exact: bool = False
) -> tuple[list[int], Tensor]:
    """Eight samples in flight that began `apart` ticks from each other, new ones following for so many ticks.

    exact: bit for bit the same in any order of lanes. Returns the rows moved in each tick and all images, by seed.
    """
    batch, seed_at, images, moved = Batch(served(), 8, batch_invariant=exact), {}, {}, []
    begun = 0
    for tick in range(ticks):
        while batch.free and begun <= (tick // apart if apart else begun):
            own = None if thresholds is None else [thresholds[begun % len(thresholds)]]
            samples = SampleBatch.of(served(), 1, steps=STEPS, rule=rule, seeds=[begun], labels=[0], thresholds=own)
            seed_at[int(batch.admit(samples, torch.tensor([0])))] = begun
            begun += 1
        before = batch.totals.rows_moved
        done = batch.tick().done
        moved.append(batch.totals.rows_moved - before)
        for place, image in zip(done.tolist(), batch.take(done), strict=True):
            images[seed_at[place]] = image
    return moved, torch.stack([images[seed] for seed in sorted(images)])


def test_what_is_learnt_from_the_timesteps_leaves_nothing_to_move() -> None:
    moved, _ = serve(Phases(), 100)
    assert sum(moved[:40]) > 0  # nobody knew
    assert sum(moved[60:]) == 0


def no_order(self: ExpectedDepth, t: Tensor, places: Tensor, half: Tensor) -> Tensor:
    return torch.arange(len(t))


def shuffled(self: ExpectedDepth, t: Tensor, places: Tensor, half: Tensor) -> Tensor:
    return torch.tensor(random.sample(range(len(t)), len(t)))


@pytest.mark.parametrize("order", [no_order, shuffled])
def test_the_order_changes_no_result_and_saves_moves(order, monkeypatch) -> None:
    moved, images = serve(Phases(), 45, exact=True)
    monkeypatch.setattr(ExpectedDepth, "order", order)
    others, same = serve(Phases(), 45, exact=True)
    assert torch.equal(images, same)
    assert len(images) >= 8
    assert sum(others[-15:]) > sum(moved[-15:])
    assert sum(others) > sum(moved)


def test_what_is_learnt_from_a_sample_orders_those_at_one_timestep() -> None:
    """In lock step the curve says nothing; each sample leaves after as many blocks as it did before."""
    moved, _ = serve(Depth(3), STEPS, thresholds=[1, 5, 2, 4, 1, 3, 5, 2], apart=0)
    assert moved[0] > 0
    assert sum(moved[4:]) == 0


def test_before_anything_is_learnt_noisier_lanes_come_last() -> None:
    expected = ExpectedDepth(LAYERS, 4)
    t = torch.tensor([900.0, 20.0, 500.0, 20.0])
    places, half = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    assert expected.order(t, places, half).tolist() == [1, 3, 2, 0]  # equals keep their order


def test_the_two_lanes_of_a_guided_sample_are_told_apart_and_forgotten() -> None:
    expected = ExpectedDepth(LAYERS, 3)
    t, places = torch.full((4,), 500.0), torch.tensor([2, 0, 2, 0])
    half, depth = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 4, 5, 2], dtype=torch.int32)
    for _ in range(5):
        expected.learn(t, places, half, depth)
    assert expected.order(t, places, half).tolist() == [2, 1, 3, 0]
    expected.forget(torch.tensor([2]))  # its lanes are now as everybody is
    assert expected.order(t, places, half).tolist() == [1, 0, 2, 3]


@given(
    lanes=st.lists(st.tuples(st.floats(0, 1000, width=32), st.integers(1, LAYERS)), min_size=1, max_size=20),
    rounds=st.integers(1, 30),
)
def test_whatever_is_learnt_stays_within_the_network(lanes: list[tuple[float, int]], rounds: int) -> None:
    """Timesteps of both ends included: stable_diffusion's noisiest is 1000."""
    expected = ExpectedDepth(LAYERS, len(lanes))
    t, depth = torch.tensor([t for t, _ in lanes]), torch.tensor([depth for _, depth in lanes], dtype=torch.int32)
    places, half = torch.arange(len(lanes)), torch.zeros(len(lanes), dtype=torch.int64)
    for _ in range(rounds):
        expected.learn(t, places, half, depth)
        assert sorted(expected.order(t, places, half).tolist()) == list(range(len(lanes)))
    assert float(expected._curve.min()) >= 1 - 1e-4
    assert float(expected._curve.max()) <= LAYERS + 1e-4


def test_a_timestep_settles_at_what_is_seen_there() -> None:
    expected = ExpectedDepth(LAYERS, 2)
    places, half = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    for _ in range(40):
        expected.learn(torch.tensor([999.0, 3.0]), places, half, torch.tensor([5, 1], dtype=torch.int32))
    assert expected.order(torch.tensor([999.0, 3.0]), places, half).tolist() == [0, 1]
    assert expected.order(torch.tensor([3.0, 999.0]), places, half).tolist() == [1, 0]
