"""The Triton kernels at the sizes that networks have, on a CUDA device: too large for the interpreter."""

import math

import pytest
import torch

from adadiff_kernels import (
    COLUMNS,
    ActiveSet,
    Noise,
    SolverState,
    StepRows,
    join_skip,
    philox_normal,
    settle_rows,
    solver_step,
)
from fused import BRAIN, DTYPES, SINGLE, Problem, check

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
WIDTHS = (128, 256, 384, 512, 768, 1024, 1152, 1536)
LENGTHS = [  # T, of which num_prefix_tokens: time; time and label; text
    *((T, 1) for T in (17, 65, 257)),
    (256, 0),
    (258, 2),
    (334, 78),
    (1024, 0),
]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_any_width(D: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(Problem((5, 257, D, 1, 1, 7), dtypes), "affine")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("T", "num_prefix_tokens"), LENGTHS)
def test_any_length(T: int, num_prefix_tokens: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(Problem((5, T, 512, 1, num_prefix_tokens, 7), dtypes), "affine")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("D", "P"), [(512, 12), (1024, 16), (1152, 16), (1152, 64), (1536, 64)])
def test_maps(D: int, P: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(Problem((3, 258, D, P, 2, 5), dtypes), "affine")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("norm", ["plain", "modulated"])
def test_norms_of_a_dit(norm: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(Problem((5, 256, 1152, 1, 0, 7), dtypes), norm)


@pytest.mark.parametrize(("D", "P"), [(1024, 1), (1152, 16)])
def test_a_row_has_the_same_bits_in_any_batch(D: int, P: int) -> None:
    shape = (64, 257, D, P, 1, 80)
    p = Problem(shape, (BRAIN, BRAIN))
    together = p.run("modulated")
    for rows in ([63], [5, 0, 40], list(range(63, -1, -1))):
        part = Problem((1, 257, D, P, 1, 80), (BRAIN, BRAIN))
        part.gate, part.bias, part.score, part.norms = p.gate, p.bias, p.score, p.norms
        part.x, part.branch, part.lanes = (value[rows].clone() for value in (p.x, p.branch, p.lanes))
        for mine, whole in zip(part.run("modulated"), together, strict=True):
            assert torch.equal(mine, whole[rows])


@pytest.mark.parametrize("outputs", [1, 64])
def test_two_runs_give_the_same_bits(outputs: int) -> None:
    p = Problem((64, 257, 1152, outputs, 1, 64), (BRAIN, BRAIN))
    for first, second in zip(p.run(), p.run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
def test_half_of_a_batch_exits(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    moves = ActiveSet(256).exit_rows_where(torch.rand(256, generator=draw) < 0.5, 1).to(DEVICE)
    parent = torch.full((258, 257, 1024), math.nan, dtype=dtype, device=DEVICE)
    parent[1:-1] = torch.randn(256, 257, 1024, device=DEVICE).to(dtype)
    want, saved = parent.clone(), torch.full_like(parent, math.nan)
    rows, lanes, sources = moves.long().unbind(1)
    filled = sources >= 0
    want[1 + rows[filled]] = parent[1 + sources[filled]]
    kept = saved.clone()
    kept[1 + lanes] = parent[1 + rows]
    settle_rows(moves, parent[1:-1], saved[1:-1], backend="triton")
    torch.testing.assert_close(parent, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(saved, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("T", "D"), [(257, 1024), (258, 1152), (17, 384)])
def test_skips_join_through_the_composed_map(T: int, D: int) -> None:
    x = torch.randn(100, T, D, device=DEVICE).to(BRAIN)
    skip = torch.randn(256, T, D, device=DEVICE).to(BRAIN)
    lanes = torch.randperm(256, device=DEVICE)[:100].int()
    index = torch.randperm(256, device=DEVICE).int()
    want = torch.cat([x, skip[index[lanes.long()].long()]], -1)
    assert torch.equal(join_skip(x, skip, lanes, index, backend="triton"), want)


def test_noise_of_a_whole_batch_is_that_of_the_cpu() -> None:
    seeds, step = torch.arange(64) * 2**40 + 5, torch.arange(64) % 50
    state = SolverState(torch.zeros(64, 4, 64, 64, device=DEVICE))
    coefficients = torch.zeros(64, len(COLUMNS), device=DEVICE)
    coefficients[:, COLUMNS.index("noise")] = 1
    end = torch.ones(64, dtype=torch.bool, device=DEVICE)
    rows = StepRows(coefficients, ~end, end, data=False, history=0, inner=False)
    noise = Noise(seeds.to(DEVICE), step.to(DEVICE), 1)
    solver_step(state, torch.zeros_like(state.x), rows, noise=noise, backend="triton")
    want = philox_normal(seeds, step, 1, 4 * 64 * 64)
    torch.testing.assert_close(state.x.flatten(1).cpu(), want, rtol=2.0**-23, atol=1e-15)
