"""Which branches lanes take, compute and keep: the book of all entries against one lane's own, kept in a dictionary."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adadiff.forward.branch_plan import BranchBook, Branches, BranchPlan
from adadiff.forward.reuse_lanes import ReuseLanes
from adadiff.policies.reuse import Cache, Reuse
from adadiff.uem import PAPER
from sampler.branches_by_hand import UNITS, OneLane
from sampler.tiny import case

LAYERS = 4
BRANCHES = Branches((UNITS,) * LAYERS, np.arange(1, 2 * LAYERS + 1).reshape(LAYERS, 2) ** 3)
POLICIES = (
    Reuse(2, "layer"),
    Reuse(3, "unit", unit="mlp", layers=(2, 3)),
    Reuse(4, "layer", dense_early=2, dense_late=2),
    Reuse(1, "layer"),
    Cache(0.1),  # not of branches
)


def of_lane(table: np.ndarray, lane: int) -> set[tuple[int, int]]:
    return {(int(layer) + 1, int(j)) for layer, j in zip(*table[:, :, lane].nonzero(), strict=True)}


def lanes_of(index: list[int], entry: list[int], step: list[int], left: list[int], network: list[int]) -> ReuseLanes:
    return ReuseLanes(POLICIES, *(torch.tensor(v) for v in (index, entry, step, left, network)), store=None)


def plan_of(book: BranchBook, lanes: ReuseLanes) -> BranchPlan | None:
    return book.plan(lanes, BRANCHES, torch.zeros(len(lanes.index)), lambda layer, j: None)


@settings(max_examples=60)
@given(st.data())
def test_every_lane_by_its_own_rules(data: st.DataObject) -> None:
    """Lanes of several policies and at different steps, exits, changes of network, ticks that fail, and entries that
    pass to other lanes, told to the book now or late."""
    number, steps = st.integers(0, len(POLICIES) - 2), st.lists(st.integers(2, 9), min_size=4, max_size=4)
    of = [data.draw(number) for _ in range(4)]
    total, at = data.draw(steps), [0] * 4
    entry = data.draw(st.permutations([0, 2, 3, 6]))
    book, alone = BranchBook(LAYERS, 2), [OneLane(POLICIES[k], LAYERS) for k in of]
    book.forget(np.array(entry))
    for _ in range(12):
        for i in range(4):
            if at[i] == total[i]:  # another one begins in its entry
                at[i], alone[i] = 0, OneLane(POLICIES[of[i]], LAYERS)
                book.forget(np.array(entry[i : i + 1]))
        present = sorted(data.draw(st.sets(st.integers(0, 3), min_size=1)))
        network = [data.draw(st.sampled_from([0, 0, 0, 1])) for _ in present]
        left = [total[i] - 1 - at[i] for i in present]
        lanes = lanes_of([of[i] for i in present], [entry[i] for i in present], [at[i] for i in present], left, network)
        plan = plan_of(book, lanes)
        exit_layer = [data.draw(st.sampled_from([1, 2, LAYERS, LAYERS])) for _ in present]
        own = [alone[i].step(at[i], left[k], network[k]) for k, i in enumerate(present)]
        for k, (taken, kept, _) in enumerate(own):
            assert of_lane(plan.takes, k) == taken
            assert of_lane(plan.keeps, k) == kept
            below = [branch for branch in taken if branch[0] <= exit_layer[k]]
            assert plan.reused[k, exit_layer[k]] == len(below)
            assert plan.saved[k, exit_layer[k]] == sum(BRANCHES.macs[layer - 1, j] for layer, j in below)
        if data.draw(st.sampled_from([True, True, False])):
            book.commit(plan, torch.tensor(exit_layer, dtype=torch.int32), may_exit=True)
            for k, i in enumerate(present):
                alone[i].ends(at[i], own[k][1], own[k][2], exit_layer[k], network[k])
                at[i] += 1


def test_two_lanes_of_one_batch_reuse_in_turns() -> None:
    book, taken = BranchBook(LAYERS, 2), []
    for tick in range(4):
        steps = [tick, tick + 1] if tick else [0, 0]
        plan = plan_of(book, lanes_of([0, 0], [0, 1], steps, [9, 9], [0, 0]))
        taken.append(plan.takes.any((0, 1)).tolist())
        book.commit(plan, torch.full((2,), LAYERS), may_exit=False)
    # the second skips step 1, when its branches would have been young enough
    assert taken == [[False, False], [True, False], [False, True], [True, False]]


def test_what_an_early_exit_left_is_computed_in_a_step_that_reuses() -> None:
    book = BranchBook(LAYERS, 2)
    exits, taken, kept = [4, 4, 1, 4, 4], [], []
    for step, layer in enumerate(exits):
        plan = plan_of(book, lanes_of([0], [0], [step], [9], [0]))
        taken.append(sorted({layer for layer, _ in of_lane(plan.takes, 0)}))
        kept.append(sorted({layer for layer, _ in of_lane(plan.keeps, 0)}))
        book.commit(plan, torch.tensor([layer], dtype=torch.int32), may_exit=True)
    assert taken == [[], [1, 2, 3, 4], [], [1], []]
    assert kept == [[1, 2, 3, 4], [], [1, 2, 3, 4], [2, 3, 4], [1, 2, 3, 4]]


def test_exit_layers_on_a_device_are_read_when_the_next_pass_is_planned() -> None:
    reads = []

    class Late:
        is_cpu = False

        def cpu(self) -> torch.Tensor:
            reads.append(True)
            return torch.tensor([2], dtype=torch.int32)

    book = BranchBook(LAYERS, 2)
    book.commit(plan_of(book, lanes_of([0], [0], [0], [9], [0])), Late(), may_exit=True)
    assert not reads
    plan = plan_of(book, lanes_of([0], [0], [1], [8], [0]))
    assert reads == [True]
    assert of_lane(plan.takes, 0) == {(layer, j) for layer in (1, 2) for j in (0, 1)}
    book.commit(plan, Late(), may_exit=False)  # nobody has to say how far it came
    plan_of(book, lanes_of([0], [0], [2], [7], [0]))
    assert reads == [True]


def test_a_late_word_about_a_lane_that_is_gone_is_not_heeded() -> None:
    book = BranchBook(LAYERS, 2)
    late = SimpleNamespace(is_cpu=False, cpu=lambda: torch.tensor([4], dtype=torch.int32))
    book.commit(plan_of(book, lanes_of([0], [0], [0], [9], [0])), late, may_exit=True)
    book.forget(np.array([0]))
    assert not plan_of(book, lanes_of([0], [0], [1], [8], [0])).takes.any()


def test_lanes_without_such_a_policy_have_no_plan() -> None:
    book = BranchBook(LAYERS, 2)
    assert plan_of(book, lanes_of([4, -1], [0, 0], [1, 1], [8, 8], [0, 0])) is None
    assert plan_of(book, lanes_of([], [], [], [], [])) is None


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Reuse(2, "layer", layers=(2, 5)), r"names layer 5; this network has layers 1..4"),
        (Reuse(2, "unit", unit="mlp"), "block 3 of this network exposes no mlp branch"),
        (Reuse(2, "layer"), "block 4 of this network exposes no branches"),
    ],
)
def test_networks_that_lack_what_a_policy_reuses_are_refused(policy: Reuse, message: str) -> None:
    lacking = Branches((UNITS, UNITS, ("attention",), ()), np.ones((4, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=message):
        lacking.of_policy(policy)


@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_costs_of_branches_are_those_of_their_blocks_without_joins(kind: str) -> None:
    backbone = case(kind, PAPER, torch.float32).backbone
    branches = Branches.of(backbone.blocks, backbone.tokens)
    assert branches.units == (UNITS,) * len(backbone.blocks)
    for block, macs in zip(backbone.blocks, branches.macs, strict=True):
        join = 0 if block.skip_from is None else 2 * backbone.dim**2 * backbone.tokens
        assert macs.sum() == block.macs(backbone.tokens) - join
