"""Branches that are reused by any pattern over rows and blocks, beside exits, against one lane alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adadiff.forward.branch_plan import BranchPlan
from adadiff.forward.decision import decide
from adadiff.forward.forward import directly
from adadiff.forward.layers import Asked
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.structure import structure_of
from adadiff.policies.exits import Replay
from adadiff.uem import PAPER
from sampler.branches_by_hand import pass_by_hand
from sampler.cached_branches import GROUPS, INVARIANT, LAGGED, SELDOM, SYNC
from sampler.tiny import case


@st.composite
def patterns(draw: st.DrawFn) -> tuple[list[list[list[int]]], list[int]]:
    """What 5 lanes do with each branch: compute, compute and keep, or take; and after which layer they exit."""
    actions = st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=2, max_size=2)
    return draw(st.lists(actions, min_size=7, max_size=7)), draw(st.lists(st.integers(1, 7), min_size=5, max_size=5))


@settings(max_examples=12)
@given(patterns(), st.sampled_from(["uvit", "dit"]), st.sampled_from([GROUPS, SYNC, SELDOM, INVARIANT]))
def test_any_pattern_over_the_rows(pattern: tuple[list, list[int]], kind: str, execution: ExecutionOptions) -> None:
    check_pattern(np.array(pattern[0]), np.array(pattern[1]), kind, execution)


@pytest.mark.parametrize("kind", ["uvit", "dit"])
@pytest.mark.parametrize("execution", [SYNC, SELDOM, LAGGED], ids=["sync", "seldom", "lagged"])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_what_lies_behind_an_exit_is_not_kept(kind: str, execution: ExecutionOptions, others: int) -> None:
    """Rows of lanes that have left are computed in vain where the host does not know it yet. others: what two lanes do
    that stay."""
    action = np.full((7, 2, 5), 1)
    action[:, :, 3:] = others
    check_pattern(action, np.array([1, 2, 3, 7, 5]), kind, execution)


def check_pattern(action: np.ndarray, exit_layer: np.ndarray, kind: str, execution: ExecutionOptions) -> None:
    """action: [L, 2, 5], what lanes do with each branch: 0 compute, 1 compute and keep, 2 take."""
    c, B = case(kind, PAPER, torch.float32), 5
    L, backbone, inputs = c.num_layers, c.backbone, c.given[slice(0, B)]
    action, exit_layer = action[:L], np.minimum(exit_layer, L)
    entry, draw = torch.tensor([3, 0, 6, 1, 4]), torch.Generator().manual_seed(0)
    T, D = backbone.tokens, backbone.dim
    rows = {
        (layer, j): torch.randn(7, T, D, generator=draw).index_fill_(0, torch.tensor([2, 5]), torch.nan)
        for layer in range(1, L + 1)
        for j in (0, 1)
    }
    for (layer, j), stored in rows.items():  # what nobody takes is not read
        stored[entry[torch.from_numpy(action[layer - 1, j] != 2)]] = torch.nan
    before = {branch: stored.clone() for branch, stored in rows.items()}
    none = np.zeros(0, dtype=np.int64)
    structure = structure_of(backbone)
    plan = BranchPlan(
        *(action == 2, action == 1, entry.numpy(), lambda layer, j: rows[layer, j], structure.branches.macs),
        *(none, none, none, none, none),
    )
    depth = torch.from_numpy(exit_layer).float()
    decision = decide((Replay(),), None, L, inputs.t, depth, None, inputs.x.device)
    asked = Asked(backbone, c.exits, structure, decision, execution, *inputs.all, None, False, None, plan)
    with torch.no_grad():
        done = directly(asked)
    prediction = done.prediction[:, : backbone.sample_shape[0]]
    assert done.placement.exit_layer.tolist() == exit_layer.tolist()
    for b in range(B):
        lane, own = slice(b, b + 1), slice(int(entry[b]), int(entry[b]) + 1)
        taken = {(layer, j) for layer, j in rows if action[layer - 1, j, b] == 2}
        said = {branch: before[branch][own] for branch in taken}
        wanted = pass_by_hand(backbone, c.exits, *inputs[lane].all, taken, said, int(exit_layer[b]))
        torch.testing.assert_close(prediction[lane], wanted, rtol=1e-4, atol=1e-4)
        for (layer, j), stored in rows.items():
            if action[layer - 1, j, b] == 1 and layer <= exit_layer[b]:
                torch.testing.assert_close(stored[own], said[layer, j], rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(stored[own].nan_to_num(7.0), before[layer, j][own].nan_to_num(7.0))
    for branch, stored in rows.items():
        assert stored[[2, 5]].isnan().all(), branch
