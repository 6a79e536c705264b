"""Lanes in the order in which they are expected to exit: it is learnt, and it changes only what has to be moved."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.exits import Depth
from adadiff.policies.interface import ExitContext, ExitPolicy
from adadiff.sampling.batch import Batch
from adadiff.sampling.ordering import ExpectedDepth
from adadiff.sampling.sample_batch import SampleBatch
from sampler.tiny import served

LAYERS, STEPS = 5, 20


class Phases(ExitPolicy):
    """The noisy half of a sample's steps runs all blocks and the other half two, against all expectations."""

    needs_scores = False
    threshold = 500.0

    def exit_mask(self, u: None, layer: int, context: ExitContext) -> Tensor:
        return (context.t < context.threshold) & (layer >= 2)


def serve(
    policy: ExitPolicy, ticks: int, thresholds: list[float] | None = None, apart: int = 2, exact: bool = False
) -> tuple[list[int], Tensor]:
    """Eight samples in flight that began `apart` ticks from each other, new ones following for so many ticks.

    exact: bit for bit the same in any order of lanes. Returns the rows moved in each tick and all images, by seed.
    """
    batch, seed_at, images, moved = Batch(served(), 8, execution=ExecutionOptions(batch_invariant=exact)), {}, {}, []
    begun = 0
    for tick in range(ticks + 1):  # what the last one moved is known a tick later
        while batch.free and begun <= (tick // apart if apart else begun):
            own = None if thresholds is None else [thresholds[begun % len(thresholds)]]
            samples = SampleBatch.of(
                served(), 1, steps=STEPS, policy=policy, seed=[begun], class_labels=[0], thresholds=own
            )
            seed_at[int(batch.admit(samples, np.zeros(1, dtype=np.int64))[0])] = begun
            begun += 1
        known = batch.tick()
        for record in known.records:
            record.read()
            moved.append(record.rows_moved)
        for slot, image in zip(known.done.tolist(), batch.take(known.done), strict=True):
            images[seed_at[slot]] = image
    return moved[:ticks], torch.stack([images[seed] for seed in sorted(images)])


def test_what_is_learnt_from_the_timesteps_leaves_nothing_to_move() -> None:
    moved, _ = serve(Phases(), 100)
    assert sum(moved[:40]) > 0  # nobody knew
    assert sum(moved[60:]) == 0


def no_order(self: ExpectedDepth, t: np.ndarray, slots: np.ndarray, half: np.ndarray) -> np.ndarray:
    return np.arange(len(t))


def shuffled(self: ExpectedDepth, t: np.ndarray, slots: np.ndarray, half: np.ndarray) -> np.ndarray:
    return np.array(random.sample(range(len(t)), len(t)), dtype=np.int64)


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
    """In lock step the curve says nothing; each sample exits after as many blocks as it did before."""
    moved, _ = serve(Depth(3), STEPS, thresholds=[1, 5, 2, 4, 1, 3, 5, 2], apart=0)
    assert moved[0] > 0
    assert sum(moved[4:]) == 0


@pytest.mark.parametrize("halved", [False, True])
def test_depths_are_learnt_exactly_one_tick_late(halved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where samples are done and their exit layers are read at once, and where a tick is made in halves: the
    order of a tick goes by all ticks but the one before."""
    events, learn = [], ExpectedDepth.learn

    def noted_learn(self: ExpectedDepth, t: np.ndarray, *rest: np.ndarray) -> None:
        events.append(("learn", sorted(t.tolist())))
        learn(self, t, *rest)

    def limited(*given: object, **options: object) -> ForwardOutput:
        if halved and len(given[1]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        events.append(("pass", sorted(given[2].tolist())))  # it has just been ordered
        return run_forward(*given, **options)

    monkeypatch.setattr(ExpectedDepth, "learn", noted_learn)
    batch = Batch(served(), 4, forward=limited)
    steps = torch.tensor([3, 5, 9, 9])
    samples = SampleBatch.of(served(), 4, steps=steps, policy="exit:0.5", guidance_scale=[1.0, 2.0, 1.0, 1.0])
    batch.admit(samples, np.arange(4))
    passes = []  # of each tick
    for _ in range(9):
        seen = len(events)
        batch.release(batch.tick().done)
        passes.append([t for kind, t in events[seen:] if kind == "pass"])
        assert [kind for kind, _ in events[seen:]] == sorted((kind for kind, _ in events[seen:]), reverse=True)
        learnt = [t for kind, t in events[seen:] if kind == "learn"]
        assert learnt == (passes[-2] if len(passes) > 1 else [])
    assert [len(own) for own in passes] == ([2] * 5 + [1] * 4 if halved else [1] * 9)


def test_before_anything_is_learnt_noisier_lanes_come_last() -> None:
    expected = ExpectedDepth(LAYERS, 4)
    t = np.array([900.0, 20.0, 500.0, 20.0])
    slots, half = np.arange(4), np.zeros(4, dtype=np.int64)
    assert expected.order(t, slots, half).tolist() == [1, 3, 2, 0]  # equals keep their order


def test_the_two_lanes_of_a_guided_sample_are_told_apart_and_forgotten() -> None:
    expected = ExpectedDepth(LAYERS, 3)
    t, slots, same = np.full(4, 500.0), np.array([2, 0, 2, 0]), np.ones(4, dtype=bool)
    half, depth = np.array([0, 0, 1, 1]), np.array([1, 4, 5, 2], dtype=np.int32)
    for _ in range(5):
        expected.learn(t, slots, half, depth, same)
    assert expected.order(t, slots, half).tolist() == [2, 1, 3, 0]
    expected.forget(np.array([2]))  # its lanes are now as everybody is
    assert expected.order(t, slots, half).tolist() == [1, 0, 2, 3]


def test_who_has_left_teaches_the_timestep_and_not_his_slot() -> None:
    """What was recorded of a sample says nothing about the one that has its slot now."""
    expected = ExpectedDepth(LAYERS, 2)
    t, slots, half = np.array([100.0, 100.0]), np.arange(2), np.zeros(2, dtype=np.int64)
    expected.learn(t, slots, half, np.array([1, 5], dtype=np.int32), np.array([False, False]))
    assert expected.order(t, slots, half).tolist() == [0, 1]
    assert not expected._own.any()
    before = expected._curve.copy()
    expected.learn(t, slots, half, np.array([1, 1], dtype=np.int32), np.array([True, False]))
    assert expected.order(t, slots, half).tolist() == [1, 0]
    assert (expected._curve != before).sum() == 1


@given(
    lanes=st.lists(st.tuples(st.floats(0, 1000, width=32), st.integers(1, LAYERS)), min_size=1, max_size=20),
    rounds=st.integers(1, 30),
)
def test_whatever_is_learnt_stays_within_the_network(lanes: list[tuple[float, int]], rounds: int) -> None:
    """Timesteps of both ends included: stable_diffusion's noisiest is 1000."""
    expected = ExpectedDepth(LAYERS, len(lanes))
    t = np.array([t for t, _ in lanes], dtype=np.float32)
    depth, same = np.array([depth for _, depth in lanes], dtype=np.int32), np.ones(len(lanes), dtype=bool)
    slots, half = np.arange(len(lanes)), np.zeros(len(lanes), dtype=np.int64)
    for _ in range(rounds):
        expected.learn(t, slots, half, depth, same)
        assert sorted(expected.order(t, slots, half).tolist()) == list(range(len(lanes)))
    assert float(expected._curve.min()) >= 1 - 1e-4
    assert float(expected._curve.max()) <= LAYERS + 1e-4


def test_a_timestep_settles_at_what_is_seen_there() -> None:
    expected = ExpectedDepth(LAYERS, 2)
    slots, half, same = np.arange(2), np.zeros(2, dtype=np.int64), np.ones(2, dtype=bool)
    for _ in range(40):
        expected.learn(np.array([999.0, 3.0]), slots, half, np.array([5, 1], dtype=np.int32), same)
    assert expected.order(np.array([999.0, 3.0]), slots, half).tolist() == [0, 1]
    assert expected.order(np.array([3.0, 999.0]), slots, half).tolist() == [1, 0]
