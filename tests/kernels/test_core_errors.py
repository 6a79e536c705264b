"""Bad input is refused by name, and nothing has changed by then."""

import pytest
import torch

from adadiff_kernels import ActiveSet, Swaps, leave_reference, swap_rows, take_rows


def state(active: ActiveSet) -> tuple[list[int], list[int], list[int], int, int]:
    lists = [tensor.tolist() for tensor in (active.lane, active.row, active.exit_layer)]
    return *lists, active.count, active.moved


@pytest.mark.parametrize("lanes", [-1, 2.5, None])
def test_lanes(lanes):
    with pytest.raises(ValueError, match="lanes must be an int of 0 or more"):
        ActiveSet(lanes)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(3, dtype=torch.bool),  # one row too few
        torch.zeros(5, dtype=torch.bool),
        torch.zeros(4, 1, dtype=torch.bool),
        torch.zeros(4),
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.bool, device="meta"),
    ],
    ids=lambda mask: f"{mask.dtype}-{list(mask.shape)}-{mask.device}",
)
def test_mask(mask):
    active = ActiveSet(4)
    with pytest.raises(ValueError, match=r"mask must be bool \[4\] on cpu"):
        active.leave(mask, 1)
    assert state(active) == state(ActiveSet(4))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("layer", [0, -3, 1, 1.5, "2"], ids=repr)
def test_layer(layer):
    """Layers count from 1 and never go back: the tail is grouped by them."""
    active = ActiveSet(4)
    active.leave(torch.tensor([True, False, False, False]), 2)
    before = state(active)
    with pytest.raises(ValueError, match="layer"):
        active.leave(torch.tensor([True, False, False]), layer)
    with pytest.raises(ValueError, match="layer"):
        active.finish(layer)
    assert state(active) == before
    active.leave(torch.tensor([True, False, False]), 2)
    assert active.exit_layer.tolist() == [2, 0, 0, 2]


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("lane", 0, "inverse"), ("row", 0, "inverse"), ("exit_layer", 1, "already left")],
)
def test_broken_state(field, value, message):
    active = ActiveSet(4)
    getattr(active, field)[2] = value
    before = state(active)
    with pytest.raises(ValueError, match=message):
        active.leave(torch.tensor([True, False, False, False]), 1)
    assert state(active) == before


def test_reference_checks_alone():
    lane, row, exit_layer = torch.arange(3).int(), torch.tensor([0, 2, 1]).int(), torch.zeros(3).int()
    with pytest.raises(ValueError, match="inverse"):
        leave_reference(torch.tensor([True, False, False]), lane, row, exit_layer, 3, 1)
    assert exit_layer.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "snapshot", [torch.arange(4), torch.arange(3).int(), torch.zeros(4, 1).int()], ids=lambda s: str(s.shape)
)
def test_snapshot(snapshot):
    with pytest.raises(ValueError, match=r"snapshot must be int32 \[4\]"):
        ActiveSet(4).locate(snapshot)


@pytest.mark.parametrize(
    ("pairs", "before", "after", "message"),
    [
        (torch.zeros(1, 2), 2, 1, r"pairs must be int32 \[k, 2\]"),
        (torch.zeros(2, dtype=torch.int32), 2, 1, r"pairs must be int32 \[k, 2\]"),
        (torch.zeros(1, 3, dtype=torch.int32), 2, 1, r"pairs must be int32 \[k, 2\]"),
        (torch.zeros(2, 3, dtype=torch.int32).t()[:, :2], 3, 1, "contiguous"),
        (torch.zeros(0, 2, dtype=torch.int32), 1, 2, "after=2, before=1"),
        (torch.zeros(0, 2, dtype=torch.int32), 1, -1, "after=-1"),
    ],
)
def test_swaps(pairs, before, after, message):
    with pytest.raises(ValueError, match=message):
        Swaps(pairs, before, after)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor(1.0), r"rows\[1\] must have 4 rows or more"),
        (torch.zeros(3, 2), r"rows\[1\] must have 4 rows or more"),
        (torch.zeros(4, 2, device="meta"), r"rows\[1\] must be on cpu"),
        (torch.zeros(3, 4, 2).transpose(0, 2), r"rows\[1\] must have 4 rows or more"),
        (torch.zeros(4, 3, 2).transpose(1, 2), r"rows\[1\] must have contiguous rows"),
        (torch.zeros(2, 4).t(), r"rows\[1\] must have contiguous rows"),
        (torch.zeros(1, 2).expand(4, 2), r"rows\[1\] must have contiguous rows that do not overlap"),
        (
            torch.zeros(9).as_strided((4, 3), (2, 1)),
            r"rows\[1\] must have contiguous rows that do not overlap",
        ),
        (torch.zeros(4, 2, requires_grad=True), r"rows\[1\] must not require grad"),
    ],
)
def test_rows(rows, message):
    """The second tensor is refused before the first has moved."""
    good = torch.arange(4)
    swaps = ActiveSet(4).leave(torch.tensor([True, False, False, False]), 1)
    with pytest.raises(ValueError, match=message):
        swap_rows(swaps, good, rows)
    assert good.tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("pairs", [[[0, 4]], [[-1, 2]], [[0, 2], [1, 2]], [[1, 1]]], ids=str)
def test_pairs(pairs):
    rows = torch.arange(6)
    swaps = Swaps(torch.tensor(pairs, dtype=torch.int32), 4, 2)
    with pytest.raises(ValueError, match="pairs"):
        swap_rows(swaps, rows)
    assert rows.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("index", "n", "message"),
    [
        (None, 5, r"n must lie in \[0, 4\]"),
        (None, -1, r"n must lie in \[0, 4\]"),
        (torch.arange(2), 3, r"index must be int64 \[3\]"),
        (torch.arange(2).int(), 2, r"index must be int64 \[2\]"),
    ],
)
def test_take_rows(index, n, message):
    with pytest.raises(ValueError, match=message):
        take_rows(torch.arange(4), index, n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 0, 0, -1, 0, 1), "n must be 0 or more"),
        ((0, 0, 0, 0, 0, 1, 0, 1), "n must be at most lanes"),
        ((0, 0, 0, 0, 0, 0, 0, 0), "layer must be 1 or more"),
        ((0, 0, 0, 0, 0, 1, 1, 1), "mask is null"),
        ((0, 0, 0, 0, 0, 0, 1, 1), "lane, row or exit_layer is null"),
    ],
)
def test_compiled_leave(arguments, message):
    core = pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    with pytest.raises(ValueError, match=message):
        core.leave(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 4, 2, 0, 1), "pairs is null"),
        ((0, 8, 4, 2, 0, 0), "rows overlap"),
        ((0, -1, 4, 2, 0, 0), "0 or more"),
        ((0, 4, 2**62, 2, 0, 0), "overflows"),
    ],
)
def test_compiled_swap_rows(arguments, message):
    core = pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    with pytest.raises(ValueError, match=message):
        core.swap_rows(*arguments)
