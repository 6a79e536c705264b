"""Rows of lanes that stop are saved by lane, bit for bit, and nothing else is touched."""

import math

import pytest
import torch
from torch import Tensor

from adadiff_kernels import save_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    return request.param


def filled(*shape: int, dtype: torch.dtype = torch.float32, start: int = 0) -> Tensor:
    return (torch.arange(math.prod(shape)) % 97 + start).to(dtype).view(shape).to(DEVICE)


@pytest.mark.parametrize(
    "exit_layer",
    [
        pytest.param([3, 0, -3, 2, 3, -2, 0], id="left, parked, earlier, running"),
        pytest.param([0] * 7, id="none"),
        pytest.param([3] * 7, id="all"),
        pytest.param([-3] * 7, id="all parked"),
    ],
)
@pytest.mark.parametrize("n", [0, 1, 4, 7])
@pytest.mark.parametrize("shape", [(5, 33), (3, 1024), (1,)])  # 1,024 float32 are one block
def test_rows_of_this_layer_and_no_others(shape, n, exit_layer, backend) -> None:
    lane = [4, 2, 6, 0, 1, 5, 3]
    parent = torch.full((n + 2, *shape), math.nan, device=DEVICE)
    rows, saved = parent[1 : n + 1], filled(7, *shape, start=1000)
    rows.copy_(filled(n, *shape))
    wanted = saved.clone()
    for r in range(n):
        if abs(exit_layer[lane[r]]) == 3:
            wanted[lane[r]] = rows[r]
    lanes = torch.tensor(lane[:n], dtype=torch.int32, device=DEVICE)
    save_rows(rows, saved, lanes, torch.tensor(exit_layer, dtype=torch.int32, device=DEVICE), 3, backend=backend)
    assert torch.equal(saved, wanted)
    assert torch.equal(rows, filled(n, *shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_dtype_and_nan(dtype, backend) -> None:
    rows, saved = filled(2, 3, 50, dtype=dtype), filled(2, 3, 50, dtype=dtype, start=500)
    rows[0, 1, 7] = math.nan
    lanes = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    save_rows(rows, saved, lanes, torch.tensor([1, 2], dtype=torch.int32, device=DEVICE), 2, backend=backend)
    torch.testing.assert_close(saved[1], rows[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(saved[0], filled(2, 3, 50, dtype=dtype, start=500)[0])


def test_what_does_not_fit_is_refused(backend) -> None:
    rows, saved, ints = filled(2, 3, 4), filled(5, 3, 4), torch.zeros(5, dtype=torch.int32, device=DEVICE)
    for message, given in (
        ("one dtype", (rows, saved.half(), ints[:2], ints, 1)),
        ("one dtype", (rows, saved[:, :2], ints[:2], ints, 1)),
        (r"lane must be int32 \[2\]", (rows, saved, ints[:3], ints, 1)),
        (r"lane must be int32 \[2\]", (rows, saved, ints[:2].long(), ints, 1)),
        (r"exit_layer must be int32 \[5\]", (rows, saved, ints[:2], ints[:4], 1)),
        ("layer must be", (rows, saved, ints[:2], ints, 0)),
    ):
        with pytest.raises(ValueError, match=message):
            save_rows(*given, backend=backend)
