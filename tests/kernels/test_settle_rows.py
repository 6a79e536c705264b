"""Rows that leave are saved by lane and kept ones take their places, bit for bit, and nothing else is touched."""

import math

import pytest
import torch
from torch import Tensor

from adadiff_kernels import settle_rows
from operators import serves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int64]
BACKENDS = ["reference", "cpu", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return serves(request.param)


def filled(*shape: int, dtype: torch.dtype = torch.float32, start: int = 0) -> Tensor:
    return (torch.arange(math.prod(shape)) % 97 + start).to(dtype).view(shape).to(DEVICE)


def moves_of(used: list[tuple[int, int, int]], k: int) -> Tensor:
    return torch.tensor(used + [(-1, -1, -1)] * (k - len(used)), dtype=torch.int32, device=DEVICE).view(k, 3)


@pytest.mark.parametrize(
    "used",
    [
        pytest.param([], id="nobody"),
        pytest.param([(1, 4, 5), (2, 0, 3), (4, 6, -1)], id="three, of which two are replaced"),
        pytest.param([(0, 2, 5)], id="the first"),
        pytest.param([(5, 1, -1)], id="the last"),
        pytest.param([(r, 6 - r, -1) for r in range(6)], id="everybody"),
    ],
)
@pytest.mark.parametrize("shape", [(5, 33), (3, 2048), (3, 2049), (1,)])  # 2,048 float32 are one piece
def test_rows_of_this_leave_and_no_others(shape, used, backend) -> None:
    parent = torch.full((9, *shape), math.nan, device=DEVICE)
    rows, saved = parent[1:8], filled(7, *shape, start=1000)  # one row more than there are moves
    rows.copy_(filled(7, *shape))
    wanted, kept = rows.clone(), saved.clone()
    for row, lane, source in used:
        kept[lane] = filled(7, *shape)[row]
        if source >= 0:
            wanted[row] = filled(7, *shape)[source]
    settle_rows(moves_of(used, 6), rows, saved, backend=backend)
    assert torch.equal(saved, kept)
    assert torch.equal(rows, wanted)
    assert parent[[0, 8]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 2049), (1,)])
def test_what_is_held_beside_the_rows_moves_with_them(shape, dtype, backend) -> None:
    """As the next block's normalised rows do: nothing of it is saved, and the moves of the rows are as without it."""
    rows, saved, parent = filled(7, *shape), filled(7, *shape, start=1000), filled(9, *shape, dtype=dtype, start=50)
    beside, used = parent[1:8], moves_of([(1, 0, 5), (2, 4, 3), (4, 6, -1)], 6)
    alone, kept, wanted = rows.clone(), saved.clone(), parent.clone()
    settle_rows(used, alone, kept, backend=backend)
    wanted[[2, 3]] = parent[[6, 4]]
    settle_rows(used, rows, saved, beside, backend=backend)
    assert torch.equal(rows, alone)
    assert torch.equal(saved, kept)
    assert torch.equal(parent, wanted)


def test_what_is_held_beside_must_fit() -> None:
    rows, used = filled(7, 4), moves_of([(1, 0, 5)], 6)
    for other in (filled(6, 4), filled(7, 5), filled(7)):
        before = rows.clone()
        with pytest.raises(ValueError, match="beside must be of the shape of rows"):
            settle_rows(used, rows, filled(7, 4), other)
        assert torch.equal(rows, before)


@pytest.mark.parametrize("width", [1, 33, 1024, 1300])  # below, at and beyond one block of float32
def test_rows_may_lie_apart(width, backend) -> None:
    """Between rows of others, with gaps."""
    parent, other = (torch.full((9, width + 3), math.nan, device=DEVICE) for _ in range(2))
    rows, saved = parent[1:8, :width], other[1:8, :width]
    rows.copy_(filled(7, width))
    used = [(0, 6, 4), (2, 5, -1), (3, 0, 6)]
    wanted, kept = parent.clone(), other.clone()
    for row, lane, source in used:
        kept[1 + lane, :width] = rows[row]
        if source >= 0:
            wanted[1 + row, :width] = rows[source]
    settle_rows(moves_of(used, 7), rows, saved, backend=backend)
    torch.testing.assert_close(parent, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(other, kept, rtol=0, atol=0, equal_nan=True)


def test_elements_without_an_integer_of_their_size_are_refused() -> None:
    serves("triton")
    odd = torch.zeros(2, 3, dtype=torch.complex128, device=DEVICE)
    with pytest.raises(ValueError, match=r"rows must have elements of 1, 2, 4 or 8 bytes, got torch.complex128"):
        settle_rows(moves_of([(0, 1, 1)], 2), odd, odd.clone(), backend="triton")


def test_more_pieces_than_programs(backend) -> None:
    """Every program takes several pieces, and some end before others."""
    n, width = 24, 30 * 2048 + 7  # of 31 pieces each
    rows, saved = filled(n, width), torch.zeros(n, width, device=DEVICE)
    used = [(r, n - 1 - r, r + 12) for r in range(9)]
    wanted, before = rows.clone(), rows.clone()
    wanted[:9] = before[12:21]
    settle_rows(moves_of(used, n), rows, saved, backend=backend)
    assert torch.equal(rows, wanted)
    assert torch.equal(saved[-9:], before[:9].flip(0))
    assert not saved[:-9].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_and_nan(dtype, backend) -> None:
    rows, saved = filled(2, 3, 50, dtype=dtype), filled(2, 3, 50, dtype=dtype, start=500)
    if dtype.is_floating_point:
        rows[0, 1, 7] = math.nan
    before = rows.clone()
    settle_rows(moves_of([(0, 1, 1)], 2), rows, saved, backend=backend)
    torch.testing.assert_close(saved[1], before[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(saved[0], filled(2, 3, 50, dtype=dtype, start=500)[0])
    assert torch.equal(rows, before[[1, 1]])


def test_what_does_not_fit_is_refused(backend) -> None:
    rows, saved, moves = filled(2, 3, 4), filled(5, 3, 4), moves_of([], 2)
    for message, given in (
        ("one dtype", (moves, rows, saved.half())),
        ("one dtype", (moves, rows, saved[:, :2])),
        (
            r"moves must be int32 \[k, 3\], of no more than 2 rows, got torch.int32 \[3, 3\]",
            (moves_of([], 3), rows, saved),
        ),
        (r"moves must be int32 \[k, 3\]", (moves.long(), rows, saved)),
        (r"moves must be int32 \[k, 3\]", (moves[:, :2], rows, saved)),
    ):
        with pytest.raises(ValueError, match=message):
            settle_rows(*given, backend=backend)
