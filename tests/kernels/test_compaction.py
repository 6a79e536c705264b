"""The plan and the moves against plain Python lists; the compiled core and PyTorch alike, exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adadiff_kernels import ActiveSet, leave_reference, swap_rows, take_rows

# 63, 64, 65: around the widths in which rows could be handled together.
BATCHES = [0, 1, 2, 3, 63, 64, 65]
PATTERNS = {
    "none": lambda n: [False] * n,
    "all": lambda n: [True] * n,
    "first": lambda n: [r == 0 for r in range(n)],
    "last": lambda n: [r == n - 1 for r in range(n)],
    "all_but_first": lambda n: [r > 0 for r in range(n)],
    "lower_half": lambda n: [r < n // 2 for r in range(n)],
    "alternating": lambda n: [r % 2 == 0 for r in range(n)],
}
# By layer, which lanes leave: what a caller decides, whatever the rows are.
runs = st.integers(0, 67).flatmap(
    lambda lanes: st.lists(st.lists(st.booleans(), min_size=lanes, max_size=lanes), max_size=6)
)


def by_row(active: ActiveSet, leaving_lanes: list[bool]) -> Tensor:
    return torch.tensor([leaving_lanes[lane] for lane in active.running.tolist()], dtype=torch.bool)


def plan(mask: list[bool], rows: list[int]) -> tuple[list[list[int]], list[int]]:
    """Pairs and new order of `rows` by two lists, one row at a time."""
    after = mask.count(False)
    down = [r for r, leaves in enumerate(mask) if leaves and r < after]
    up = [r for r, leaves in enumerate(mask) if not leaves and r >= after]
    rows = list(rows)
    for a, b in zip(down, up, strict=True):
        rows[a], rows[b] = rows[b], rows[a]
    return [list(pair) for pair in zip(down, up, strict=True)], rows


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n", BATCHES)
def test_plan_of_chosen_patterns(pattern, n):
    mask = PATTERNS[pattern](n)
    pairs, rows = plan(mask, list(range(n)))
    active = ActiveSet(n)
    swaps = active.leave(torch.tensor(mask, dtype=torch.bool), 4)
    assert swaps.pairs.tolist() == pairs
    assert (swaps.before, swaps.after) == (n, mask.count(False))
    assert active.count == active.bound == mask.count(False)
    assert active.lane.tolist() == rows
    assert active.row.tolist() == [rows.index(lane) for lane in range(n)]
    assert active.exit_layer.tolist() == [4 if leaves else 0 for leaves in mask]
    assert active.moved == 2 * len(pairs)


@pytest.mark.usefixtures("core")
@given(run=runs)
def test_random_runs_keep_every_lane(run):
    lanes = len(run[0]) if run else 5
    active = ActiveSet(lanes)
    exit_layer = [0] * lanes
    x = torch.arange(lanes)[:, None].repeat(1, 3)  # every lane's data is its number
    order = list(range(lanes))
    for layer, leaving in enumerate(run, start=1):
        mask = by_row(active, leaving)
        pairs, order[: active.count] = plan(mask.tolist(), order[: active.count])
        for lane in active.running.tolist():
            exit_layer[lane] = layer if leaving[lane] else 0
        before = active.lane.clone()
        swaps = active.leave(mask, layer)
        swap_rows(swaps, x)

        assert swaps.pairs.tolist() == pairs
        assert active.lane.tolist() == order == x[:, 0].tolist()
        assert torch.equal(x, active.lane.long()[:, None].repeat(1, 3))
        assert active.row[active.lane.long()].tolist() == list(range(lanes))
        assert active.exit_layer.tolist() == exit_layer
        assert all(exit_layer[lane] == 0 for lane in active.running.tolist())
        gone = [exit_layer[lane] for lane in order[active.count :]]
        assert gone == sorted(gone, reverse=True)
        assert active.count + len(gone) == lanes
        assert 0 not in gone
        # No plan moves fewer rows: each leaving row below the new count must go, and one must come.
        assert int((active.lane != before).sum()) == 2 * int(mask[: active.count].sum())
    active.finish(9)
    assert active.count == 0
    assert active.lane.tolist() == order
    assert active.exit_layer.tolist() == [layer or 9 for layer in exit_layer]


@given(run=runs)
def test_extension_and_reference_are_one(run):
    pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    lanes = len(run[0]) if run else 0
    active = ActiveSet(lanes)
    lane, row, exit_layer = active.lane.clone(), active.row.clone(), active.exit_layer.clone()
    for layer, leaving in enumerate(run, start=2):
        mask = by_row(active, leaving)
        after, pairs = leave_reference(mask, lane, row, exit_layer, active.count, layer)
        swaps = active.leave(mask, layer)
        assert swaps.after == after
        assert torch.equal(swaps.pairs, pairs)
        for ours, theirs in ((active.lane, lane), (active.row, row), (active.exit_layer, exit_layer)):
            assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (0,), (2051,)], ids=str)  # 2051: past one 4 KiB block
def test_moves_leave_the_parent_untouched(dtype, shape):
    lanes = 11
    filler = float("nan") if dtype.is_floating_point else 99
    parent = torch.full((lanes + 2, 2, *shape), filler, dtype=dtype)
    rows = parent[1:-1, 1]
    rows[:] = torch.randint(0, 90, (lanes, *shape)).to(dtype)
    expected = parent.clone()
    mask = torch.tensor([r in (0, 2, 3, 9) for r in range(lanes)])
    pairs, order = plan(mask.tolist(), list(range(lanes)))
    assert pairs == [[0, 7], [2, 8], [3, 10]]
    for position, lane in enumerate(order):
        expected[1 + position, 1] = rows[lane]
    second = torch.arange(lanes)
    swap_rows(ActiveSet(lanes).leave(mask, 1), rows, second)
    torch.testing.assert_close(parent, expected, rtol=0, atol=0, equal_nan=True)
    assert second.tolist() == order


@pytest.mark.usefixtures("core")
def test_moves_take_more_rows_than_run():
    """The tail belongs to the same tensor, and NaN in one row stays in that row."""
    x = torch.tensor([float("nan"), 1.0, 2.0, 3.0, 4.0])
    active = ActiveSet(5)
    for layer, leaving in enumerate([0, 2, 4, 1], start=1):
        swap_rows(active.leave(active.running == leaving, layer), x)
    assert active.lane.tolist() == [3, 1, 4, 2, 0]
    assert torch.equal(x[:4], torch.tensor([3.0, 1.0, 4.0, 2.0]))
    assert x[4].isnan()


@pytest.mark.usefixtures("core")
def test_mask_may_be_strided():
    wide = torch.tensor([[True, False], [False, True], [True, False], [False, True]])
    active = ActiveSet(4)
    active.leave(wide[:, 1], 1)
    assert active.exit_layer.tolist() == [0, 1, 0, 1]


@pytest.mark.usefixtures("core")
@given(run=runs)
def test_skips_are_found_where_they_were_written(run):
    """A skip written at each layer, read at each later one: no skip ever moves."""
    lanes = len(run[0]) if run else 4
    active = ActiveSet(lanes)
    skips: list[tuple[Tensor, Tensor]] = []
    for layer, leaving in enumerate(run, start=1):
        skips.append((100 * layer + active.running, active.snapshot()))
        active.leave(by_row(active, leaving), layer)
        for written, (skip, snapshot) in enumerate(skips, start=1):
            index = active.locate(snapshot)
            found = take_rows(skip, index, active.count)
            assert found.tolist() == [100 * written + lane for lane in active.running.tolist()]
            if index is None:
                assert found.numel() == 0 or found.data_ptr() == skip.data_ptr()
            else:
                assert index.dtype == torch.int64
                assert index.tolist() != list(range(active.count))


def test_locate_names_no_rows_where_only_the_tail_left():
    active = ActiveSet(5)
    snapshot, copy = active.snapshot(), active.row.clone()
    active.leave(torch.tensor([False, False, False, True, True]), 1)
    assert active.locate(snapshot) is None
    assert active.locate(copy) is None
    active.leave(torch.tensor([True, False, False]), 2)
    assert active.locate(snapshot).tolist() == [2, 1]
    assert snapshot.tolist() == [0, 1, 2, 3, 4]


def test_swaps_and_snapshots_outlive_later_leaves():
    active = ActiveSet(6)
    first = active.leave(torch.tensor([True, False, False, False, False, False]), 1)
    snapshot = active.snapshot()
    active.leave(torch.tensor([False, True, False, False, False]), 2)
    assert first.pairs.tolist() == [[0, 5]]
    assert snapshot.tolist() == [5, 1, 2, 3, 4, 0]


@pytest.mark.usefixtures("core")
def test_default_device_does_not_matter():
    with torch.device("meta"):
        active = ActiveSet(3)
        snapshot = active.row.clone()
        active.leave(torch.tensor([True, False, False], device="cpu"), 1)
        assert active.locate(snapshot).tolist() == [2, 1]
        active.finish(2)
    assert active.exit_layer.tolist() == [1, 2, 2]
