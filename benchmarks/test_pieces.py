"""Single operators for pytest-benchmark: `pytest benchmarks`. There are no assertions on time."""

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import adadiff
from adadiff.diffusion.solvers import DDIM, DPMSolverPP2M
from adadiff.diffusion.tables import pack
from adadiff.policies.exits import Full, Replay
from adadiff_kernels import ActiveSet, Score, join_skip, philox_normal, residual_uem, settle_rows, solver_step

LANES = 64
T, D = 257, 512  # U-ViT-S/2 at its CIFAR-10 shape


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@torch.inference_mode()
def test_plan(benchmark: BenchmarkFixture) -> None:
    """Every other of 64 lanes exits, which takes the most moves."""
    mask = torch.arange(LANES) % 2 == 0
    moves = benchmark.pedantic(
        lambda active: active.exit_rows_where(mask, 1), setup=lambda: ((ActiveSet(LANES),), {}), rounds=300
    )
    assert (len(moves), int((moves[:, 2] >= 0).sum())) == (LANES // 2, LANES // 4)


@torch.inference_mode()
def test_moves(benchmark: BenchmarkFixture) -> None:
    """32 rows of half a megabyte each are saved, and 16 others move into their places."""
    moves = ActiveSet(LANES).exit_rows_where(torch.arange(LANES) % 2 == 0, 1)
    rows, saved = torch.randn(2, LANES, T, D)
    benchmark(settle_rows, moves, rows, saved)


@pytest.mark.parametrize("scored", [False, True], ids=["sum", "sum and score"])
@torch.inference_mode()
def test_fused_pass(benchmark: BenchmarkFixture, scored: bool) -> None:
    n = 7  # lanes of a micro-batch of the engine
    x, branch, lanes = torch.randn(n, T, D), torch.randn(n, T, D), torch.arange(n, dtype=torch.int32)
    score = Score(torch.randn(1, D) / D**0.5, torch.zeros(n, 1), num_prefix_tokens=1) if scored else None
    benchmark(residual_uem, x, branch, row_to_lane=lanes, score=score, out=torch.empty_like(x))


@pytest.mark.parametrize("way", ["eager call", "registered operator"])
@torch.inference_mode()
def test_dispatch(benchmark: BenchmarkFixture, way: str) -> None:
    """Overhead of a call, with tiny inputs of join_skip."""
    x, registered = torch.randn(2, 3, 8), torch.ops.adadiff_kernels.join_skip.default
    if way == "registered operator":
        benchmark(registered, x, x, None, None, None)
    else:
        benchmark(join_skip, x, x)


@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP2M()], ids=["ddim", "dpm++2m"])
@torch.inference_mode()
def test_solver_step(benchmark: BenchmarkFixture, solver: DDIM | DPMSolverPP2M) -> None:
    """64 samples of 3 x 32 x 32, each at its own step."""
    tables = pack([solver.table(adadiff.build("digits").schedule, 50)])
    x, eps = torch.randn(2, LANES, 3, 32, 32)
    state = tables.start(x)
    _, rows = tables.rows(np.zeros(LANES, dtype=np.int64), np.arange(LANES) % 50)
    benchmark(solver_step, state, eps, rows)


@torch.inference_mode()
def test_philox(benchmark: BenchmarkFixture) -> None:
    """Initial noise of 64 samples of 3 x 32 x 32."""
    benchmark(philox_normal, torch.arange(LANES), torch.zeros(LANES, dtype=torch.int64), 0, 3 * 32 * 32)


@pytest.mark.parametrize("case", ["plain", "engine", "no exits", "spread"])
@torch.inference_mode()
def test_forward(benchmark: BenchmarkFixture, case: str) -> None:
    """One forward pass of the digits network, 64 lanes at different timesteps, random weights."""
    model = adadiff.build("digits")
    x, t, labels = torch.randn(LANES, 1, 8, 8), torch.linspace(0, 999, LANES), torch.arange(LANES) % 10
    lane = torch.arange(LANES)
    depth = {"no exits": torch.full((LANES,), 13.0), "spread": (3 + lane * 7 % 11).float()}.get(case)
    if case == "plain":
        benchmark(model.backbone, x, t, labels)
    else:
        policy = Full() if depth is None else Replay()
        benchmark(adadiff.forward, model, x, t, labels, policy=policy, threshold=depth)
