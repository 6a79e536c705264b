"""Long skips join from wherever they lie, every element exact. Triton is interpreted without a GPU."""

import math

import pytest
import torch
from torch import Tensor

from adadiff_kernels import join_skip

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 100, shape, generator=draw).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
        ((X, X, INDEX), "row_to_lane needs the index"),
        ((X, X, INDEX[:2], INDEX), r"row_to_lane must be int32 or int64 \[3\]"),
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
