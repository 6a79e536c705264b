"""Triton kernels that move rows: every element exact, and nothing else touched. Interpreted without a GPU."""

import math

import pytest
import torch
from torch import Tensor

from adadiff_kernels import ActiveSet, Swaps, join_skip, swap_rows

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int64]
PATTERNS = [  # who leaves, of seven rows
    pytest.param([0, 0, 0, 0, 0, 0, 0], id="none"),
    pytest.param([1, 1, 1, 1, 1, 1, 1], id="all"),
    pytest.param([1, 0, 0, 0, 0, 0, 0], id="first"),
    pytest.param([0, 0, 0, 0, 0, 0, 1], id="last"),
    pytest.param([1, 0, 1, 0, 1, 0, 1], id="alternating"),
]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=draw).to(dtype).to(DEVICE)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("width", [1, 33, 1024, 1300])  # below, at and beyond one block of float32
def test_pairs_change_places(pattern: list[int], width: int) -> None:
    swaps = ActiveSet(7).leave(torch.tensor(pattern, dtype=torch.bool), 1)
    swaps = Swaps(swaps.pairs.to(DEVICE), swaps.before, swaps.after)
    parent = torch.full((9, width + 3), math.nan, device=DEVICE)  # rows with gaps, between rows of others
    rows = parent[1:8, :width]
    rows.copy_(values(7, width))
    before = parent.clone()
    order = list(range(9))
    for a, b in swaps.pairs.tolist():
        order[a + 1], order[b + 1] = order[b + 1], order[a + 1]
    swap_rows(swaps, rows, backend="triton")
    before[:, :width] = before[order][:, :width]
    torch.testing.assert_close(parent, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_moves_bit_for_bit(dtype: torch.dtype) -> None:
    swaps = Swaps(torch.tensor([[0, 5], [3, 4]], dtype=torch.int32, device=DEVICE), 6, 4)
    first, second = values(6, 3, 50, dtype=dtype), values(6, 7, dtype=dtype)
    wanted = [tensor[[5, 1, 2, 4, 3, 0]] for tensor in (first, second)]
    swap_rows(swaps, first, second, backend="triton")
    assert torch.equal(first, wanted[0])
    assert torch.equal(second, wanted[1])


def test_elements_without_an_integer_of_their_size_are_refused() -> None:
    swaps = Swaps(torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE), 2, 1)
    fine, odd = values(2, 3), torch.zeros(2, 3, dtype=torch.complex128, device=DEVICE)
    before = fine.clone()
    with pytest.raises(ValueError, match=r"rows\[1\] must have elements of 1, 2, 4 or 8 bytes, got torch.complex128"):
        swap_rows(swaps, fine, odd, backend="triton")
    assert torch.equal(fine, before)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("shape", [(4, 17, 128), (1, 5, 33), (3, 35, 320), (0, 5, 16), (1, 1, 1)])
@pytest.mark.parametrize("kind", ["composed", "index", "in order"])
def test_skips_join_from_where_they_lie(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, T, D = shape
    x = values(*shape, dtype=dtype)
    parent = torch.full((n + 5, T, D), math.nan, dtype=dtype, device=DEVICE)  # rows nobody may read
    skip = parent[: n + 3]
    row = torch.arange(n, device=DEVICE).flip(0) + (0 if kind == "in order" else 2)  # the row of lane b is row[b]
    lanes = torch.arange(n, dtype=torch.int32, device=DEVICE).roll(1)
    given = {"composed": (lanes, row.int()), "index": (None, row[lanes.long()]), "in order": (None, None)}[kind]
    source = torch.arange(n, device=DEVICE) if kind == "in order" else row[lanes.long()]
    skip[source] = values(n, T, D, dtype=dtype) + 100
    joined = join_skip(x, skip, *given, backend="triton")
    assert joined.shape == (n, T, 2 * D)
    for r in range(n):
        assert torch.equal(joined[r, :, :D], x[r])
        assert torch.equal(joined[r, :, D:], skip[source[r]])
    assert torch.equal(join_skip(x, skip, *given, backend="reference"), joined)


X = torch.zeros(3, 5, 8, device=DEVICE)
INDEX = torch.zeros(3, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X[0], X), r"x and skip must be \[n, T, D\]"),
        ((X, X[:, :4]), r"\[3, 4, 8\]"),
        ((X, X.double()), "of one dtype"),
        ((X, X, INDEX), "lanes need the index"),
        ((X, X, INDEX[:2], INDEX), r"lanes must be int32 or int64 \[3\]"),
        ((X, X, None, INDEX.float()), r"index must be int32 or int64 \[3\], got torch.float32"),
        ((X, X[:2]), "a row for each of 3 rows"),
        ((X, X.mT.contiguous().mT), "skip must be contiguous"),
        ((X, X.to("meta")), "skip must be on (cpu|cuda:0), got meta"),
        ((X, X, None, INDEX.to("meta")), "index must be on (cpu|cuda:0), got meta"),
    ],
)
def test_bad_joins_are_named(given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join_skip(*given, backend="triton")
