"""The plan and the moves against plain Python lists; the compiled core and PyTorch alike, exactly."""

from itertools import zip_longest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adadiff_kernels import ActiveSet, exit_rows_reference, settle_rows, take_rows

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
    """Moves and new order of `rows`, the lanes by row, with two lists, one row at a time."""
    after = mask.count(False)
    exiting = [r for r, exits in enumerate(mask) if exits]
    up = [r for r, exits in enumerate(mask) if not exits and r >= after]
    moves = [[r, rows[r], source] for r, source in zip_longest(exiting, up, fillvalue=-1)]
    rows = list(rows)
    for a, _, b in moves[: len(up)]:
        rows[a], rows[b] = rows[b], rows[a]
    return moves, rows


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n", BATCHES)
def test_plan_of_chosen_patterns(pattern, n):
    mask = PATTERNS[pattern](n)
    wanted, rows = plan(mask, list(range(n)))
    active = ActiveSet(n)
    moves = active.exit_rows_where(torch.tensor(mask, dtype=torch.bool), 4)
    assert (moves.dtype, moves.shape) == (torch.int32, (mask.count(True), 3))
    assert moves.tolist() == wanted
    assert active.count == mask.count(False)
    assert active.row_to_lane.tolist() == rows
    assert active.lane_to_row.tolist() == [rows.index(lane) for lane in range(n)]
    assert active.exit_layer.tolist() == [4 if exits else 0 for exits in mask]
    assert active.moved == 2 * sum(source >= 0 for _, _, source in wanted)


@pytest.mark.usefixtures("core")
@given(run=runs)
def test_random_runs_keep_every_lane(run):
    lanes = len(run[0]) if run else 5
    active = ActiveSet(lanes)
    exit_layer = [0] * lanes
    x = torch.arange(lanes)[:, None].repeat(1, 3)  # every lane's data is its number
    saved = torch.full_like(x, -1)
    order = list(range(lanes))
    for layer, leaving in enumerate(run, start=1):
        mask = by_row(active, leaving)
        wanted, order[: active.count] = plan(mask.tolist(), order[: active.count])
        for lane in active.running.tolist():
            exit_layer[lane] = layer if leaving[lane] else 0
        before = active.row_to_lane.clone()
        moves = active.exit_rows_where(mask, layer)
        settle_rows(moves, x, saved)

        assert moves.tolist() == wanted
        assert active.row_to_lane.tolist() == order
        assert torch.equal(x[: active.count], active.running.long()[:, None].repeat(1, 3))
        assert saved[:, 1].tolist() == [lane if exit_layer[lane] else -1 for lane in range(lanes)]
        assert active.lane_to_row[active.row_to_lane.long()].tolist() == list(range(lanes))
        assert active.exit_layer.tolist() == exit_layer
        assert all(exit_layer[lane] == 0 for lane in active.running.tolist())
        gone = [exit_layer[lane] for lane in order[active.count :]]
        assert gone == sorted(gone, reverse=True)
        assert active.count + len(gone) == lanes
        assert 0 not in gone
        # No plan moves fewer rows: each exiting row below the new count must go, and one must come.
        assert int((active.row_to_lane != before).sum()) == 2 * int(mask[: active.count].sum())
    active.finish(9)
    assert active.count == 0
    assert active.row_to_lane.tolist() == order
    assert active.exit_layer.tolist() == [layer or 9 for layer in exit_layer]


@given(run=runs)
def test_extension_and_reference_are_one(run):
    pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    lanes = len(run[0]) if run else 0
    active = ActiveSet(lanes)
    theirs = [value.clone() for value in (active.row_to_lane, active.lane_to_row, active.exit_layer)]
    state = torch.tensor([lanes, 0, 0], dtype=torch.int32)
    for layer, leaving in enumerate(run, start=2):
        n, mask = active.count, by_row(active, leaving)
        wanted = exit_rows_reference(*theirs, state, None, None, mask, None, None, n, layer)
        moves = active.exit_rows_where(mask, layer)
        assert torch.equal(moves, wanted[: n - active.count])
        assert bool((wanted[n - active.count :] == -1).all())
        assert state.tolist() == [active.count, active.moved, 0]
        for ours, other in zip((active.row_to_lane, active.lane_to_row, active.exit_layer), theirs, strict=True):
            assert torch.equal(ours, other)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (0,), (2051,)], ids=str)  # 2051: past one 4 KiB block
def test_moves_leave_the_parent_untouched(dtype, shape):
    lanes = 11
    filler = float("nan") if dtype.is_floating_point else 99
    parent = torch.full((lanes + 2, 2, *shape), filler, dtype=dtype)
    rows = parent[1:-1, 1]
    rows[:] = torch.randint(0, 90, (lanes, *shape)).to(dtype)
    expected, before = parent.clone(), rows.clone()
    mask = torch.tensor([r in (0, 2, 3, 9) for r in range(lanes)])
    wanted, order = plan(mask.tolist(), list(range(lanes)))
    assert wanted == [[0, 0, 7], [2, 2, 8], [3, 3, 10], [9, 9, -1]]
    for position, lane in enumerate(order[:7]):
        expected[1 + position, 1] = rows[lane]
    active = ActiveSet(lanes)
    moves = active.exit_rows_where(mask, 1)
    second, saved, also = torch.arange(lanes), torch.zeros_like(before), torch.full((lanes,), -1)
    settle_rows(moves, rows, saved)
    settle_rows(moves, second, also)
    torch.testing.assert_close(parent, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(saved, torch.where(mask.view(-1, *[1] * len(shape)), before, 0))
    assert second[: active.count].tolist() == order[:7]
    assert also.tolist() == [lane if lane in (0, 2, 3, 9) else -1 for lane in range(lanes)]


@pytest.mark.usefixtures("core")
def test_moves_take_more_rows_than_run():
    """The tail belongs to the same tensor, and NaN in one row stays in that row."""
    x = torch.tensor([float("nan"), 1.0, 2.0, 3.0, 4.0])
    active, saved = ActiveSet(5), torch.full((5,), -1.0)
    for layer, leaving in enumerate([0, 2, 4, 1], start=1):
        settle_rows(active.exit_rows_where(active.running == leaving, layer), x, saved)
    assert active.row_to_lane.tolist() == [3, 1, 4, 2, 0]
    assert x[0] == 3.0
    torch.testing.assert_close(saved, torch.tensor([float("nan"), 1.0, 2.0, -1.0, 4.0]), equal_nan=True)


@pytest.mark.usefixtures("core")
def test_mask_may_be_strided():
    wide = torch.tensor([[True, False], [False, True], [True, False], [False, True]])
    active = ActiveSet(4)
    active.exit_rows_where(wide[:, 1], 1)
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
        active.exit_rows_where(by_row(active, leaving), layer)
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
    snapshot, copy = active.snapshot(), active.lane_to_row.clone()
    active.exit_rows_where(torch.tensor([False, False, False, True, True]), 1)
    assert active.locate(snapshot) is None
    assert active.locate(copy) is None
    active.exit_rows_where(torch.tensor([True, False, False]), 2)
    assert active.locate(snapshot).tolist() == [2, 1]
    assert snapshot.tolist() == [0, 1, 2, 3, 4]


def test_moves_and_snapshots_outlive_later_exits():
    active = ActiveSet(6)
    first = active.exit_rows_where(torch.tensor([True, False, False, False, False, False]), 1)
    snapshot = active.snapshot()
    active.exit_rows_where(torch.tensor([False, True, False, False, False]), 2)
    assert first.tolist() == [[0, 0, 5]]
    assert snapshot.tolist() == [5, 1, 2, 3, 4, 0]


@pytest.mark.usefixtures("core")
def test_default_device_does_not_matter():
    with torch.device("meta"):
        active = ActiveSet(3)
        snapshot = active.lane_to_row.clone()
        active.exit_rows_where(torch.tensor([True, False, False], device="cpu"), 1)
        assert active.locate(snapshot).tolist() == [2, 1]
        active.finish(2)
    assert active.exit_layer.tolist() == [1, 2, 2]
