"""Bad input is refused by name, and nothing has changed by then."""

import pytest
import torch

from adadiff_kernels import ActiveSet, settle_rows, take_rows
from adadiff_kernels.compaction import active_set


def state(active: ActiveSet) -> tuple[list[int], list[int], list[int], int, int]:
    lists = [tensor.tolist() for tensor in (active.row_to_lane, active.lane_to_row, active.exit_layer)]
    return *lists, active.count, active.moved


@pytest.mark.parametrize("lanes", [-1, 2.5, None, 32769])
def test_lanes(lanes):
    with pytest.raises(ValueError, match="num_lanes must be an int from 0 to 32768"):
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
    with pytest.raises(ValueError, match=r"mask must be bool \[4\] on the CPU"):
        active.exit_rows_where(mask, 1)
    assert state(active) == state(ActiveSet(4))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("layer", [0, -3, 1, 1.5, "2"], ids=repr)
def test_layer(layer):
    """Layers count from 1 and never go back: the tail is grouped by them."""
    active = ActiveSet(4)
    active.exit_rows_where(torch.tensor([True, False, False, False]), 2)
    before = state(active)
    with pytest.raises(ValueError, match="layer"):
        active.exit_rows_where(torch.tensor([True, False, False]), layer)
    with pytest.raises(ValueError, match="layer"):
        active.finish(layer)
    assert state(active) == before
    active.exit_rows_where(torch.tensor([True, False, False]), 2)
    assert active.exit_layer.tolist() == [2, 0, 0, 2]


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("row_to_lane", 0, "inverse"), ("lane_to_row", 0, "inverse"), ("exit_layer", 1, "exited already")],
)
def test_broken_state(field, value, message):
    active = ActiveSet(4)
    getattr(active, field)[2] = value
    before = state(active)
    with pytest.raises(ValueError, match=message):
        active.exit_rows_where(torch.tensor([True, False, False, False]), 1)
    assert state(active) == before


def test_the_core_and_python_take_the_same_number_of_lanes():
    core = pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    assert core.max_lanes == active_set.MAX_LANES
    assert ActiveSet(core.max_lanes).count == core.max_lanes


@pytest.mark.parametrize(
    "snapshot", [torch.arange(4), torch.arange(3).int(), torch.zeros(4, 1).int()], ids=lambda s: str(s.shape)
)
def test_snapshot(snapshot):
    with pytest.raises(ValueError, match=r"snapshot must be int32 \[4\]"):
        ActiveSet(4).locate(snapshot)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    ("moves", "message"),
    [
        (torch.zeros(1, 3), r"moves must be int32 \[k, 3\]"),
        (torch.zeros(3, dtype=torch.int32), r"moves must be int32 \[k, 3\]"),
        (torch.zeros(1, 2, dtype=torch.int32), r"moves must be int32 \[k, 3\]"),
        (torch.zeros(1, 3).long(), r"moves must be int32 \[k, 3\]"),
        (torch.zeros(5, 3, dtype=torch.int32), "of no more than 4 rows"),
    ],
)
def test_moves(moves, message):
    rows = torch.arange(4)
    with pytest.raises(ValueError, match=message):
        settle_rows(moves, rows, torch.zeros(4, dtype=torch.int64))
    assert rows.tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("name", ["rows", "saved"])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor(1.0), "rows and saved must be"),
        (torch.zeros(4, 2, device="meta"), "{} must be on cpu"),
        (torch.zeros(4, 2).double(), "of one dtype"),
        (torch.zeros(4, 3, 2).transpose(1, 2), "{} must have contiguous rows"),
        (torch.zeros(2, 4).t(), "{} must have contiguous rows"),
        (torch.zeros(1, 2).expand(4, 2), "{} must have contiguous rows that do not overlap"),
        (torch.zeros(9).as_strided((4, 3), (2, 1)), "{} must have contiguous rows that do not overlap"),
        (torch.zeros(4, 2, requires_grad=True), "{} must not require grad"),
    ],
)
def test_rows(name, tensor, message):
    """Refused before anything has moved."""
    shape = tensor.shape[1:] if tensor.dim() else (2,)
    good = {"rows": torch.ones(4, *shape), "saved": torch.zeros(4, *shape)}
    given = good | {name: tensor}
    moves = ActiveSet(4).exit_rows_where(torch.tensor([True, False, False, False]), 1)
    with pytest.raises(ValueError, match=message.format(name)):
        settle_rows(moves, **given)
    assert bool((good["rows"] == 1).all())
    assert not good["saved"].any()


@pytest.mark.parametrize(
    "moves",
    [
        [[4, 0, -1]],
        [[-2, 0, -1]],
        [[0, 0, 4]],
        [[0, 6, -1]],
        [[0, -1, 2]],
        [[0, 0, 2], [1, 1, 2]],
        [[0, 0, 2], [2, 1, -1]],
        [[1, 0, 1]],
        [[0, 3, -1], [1, 3, -1]],
    ],
    ids=str,
)
def test_moves_that_name_a_row_or_lane_twice_or_one_outside(moves):
    """The core sees them. PyTorch and Triton do not look, since on a device that would wait."""
    pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    rows, saved = torch.arange(4), torch.full((6,), -1)
    with pytest.raises(ValueError, match="settle_rows: moves name a row or lane"):
        settle_rows(torch.tensor(moves, dtype=torch.int32), rows, saved)
    assert rows.tolist() == [0, 1, 2, 3]
    assert saved.tolist() == [-1] * 6


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
        ((-1, 0, 1), "n must be 0 or more"),
        ((1, 0, 1), "n must be at most num_lanes"),
        ((0, 32769, 1), "num_lanes must be at most 32768"),
        ((0, 0, 0), "layer must be 1 or more"),
        ((0, 1, 1), "row_to_lane, lane_to_row or exit_layer is null"),
    ],
)
def test_core_exit_rows(arguments, message):
    core = pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    with pytest.raises(ValueError, match=message):
        core.exit_rows(*[0] * 8, *arguments)


FOUR = torch.zeros(4)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": FOUR[:3]}, r"u must be float32 \[4\], contiguous, on the CPU, got float32 \[3\]"),
        ({"u": FOUR.double()}, "u must be float32"),
        ({"u": torch.zeros(8)[::2]}, "u must be float32"),
        ({"u": FOUR.to("meta")}, "on the CPU, got float32 .* on meta"),
        ({"threshold": torch.zeros(5)}, r"threshold must be float32 \[4\]"),
        ({"threshold": torch.zeros(8)[::2]}, "threshold must be float32"),
        ({"partner": torch.arange(4)}, r"partner must be int32 \[4\], contiguous, on the CPU, got int64"),
        ({"partner": torch.arange(3).int()}, r"partner must be int32 \[4\]"),
        ({"layer": 1.0}, "layer must be an int"),
    ],
)
def test_exit_rows(change, message):
    active = ActiveSet(4)
    given = {"u": FOUR, "threshold": FOUR + 1, "layer": 1, "partner": torch.arange(4).int()} | change
    with pytest.raises(ValueError, match=message):
        active.exit_rows(**given)
    assert state(active) == state(ActiveSet(4))


def test_partners_outside_are_refused_by_the_core():
    pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    active = ActiveSet(4)
    for partner in ([0, 1, 2, 4], [-1, 1, 2, 3]):
        with pytest.raises(ValueError, match="partner names a lane outside"):
            active.exit_rows(FOUR, FOUR + 1, 1, partner=torch.tensor(partner, dtype=torch.int32))
    assert state(active) == state(ActiveSet(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0, 4, 4, 0, 4, 4, 4), "moves is null"),
        ((0, 0, 0, 2, 4, 0, 2, 8, 8), "rows overlap"),
        ((0, 0, 0, 2, 8, 0, 2, 4, 8), "rows overlap"),
        ((0, -1, 0, 2, 4, 0, 2, 4, 4), "0 or more"),
        ((0, 0, 0, 2, 4, 0, -1, 4, 4), "0 or more"),
        ((0, 0, 0, 4, 2**62, 0, 4, 4, 4), "overflows"),
        ((0, 0, 0, 4, 4, 0, 4, 2**62, 4), "overflows"),
    ],
)
def test_core_settle_rows(arguments, message):
    core = pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    with pytest.raises(ValueError, match=message):
        core.settle_rows(*arguments)
