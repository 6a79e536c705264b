"""The Triton kernel of the solver step: against its formula in float64, and its noise against Philox on the CPU."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from adadiff_kernels import COLUMNS, Guidance, Noise, SolverState, StepRows, philox_normal, solver_step
from adadiff_kernels.solver_step import solver_step_reference
from numerics import assert_as_accurate

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    pytest.param((5, 3, 7, 3), id="odd"),
    pytest.param((3, 4, 16, 16), id="one-block"),
    pytest.param((2, 1030), id="a-block-and-a-bit"),
    pytest.param((1, 1), id="one-element"),
    pytest.param((0, 1, 8, 8), id="empty"),
]


class Problem:
    """A state with base and history, rows that use everything, z, a learned variance, guidance of every other one."""

    def __init__(self, shape: tuple[int, ...]):
        self.n, *rest = shape
        self.draw = torch.Generator().manual_seed(0)
        self.state = SolverState(self.normal(*shape), self.normal(*shape), self.normal(self.n, 3, *rest))
        push, end = torch.arange(self.n) % 3 > 0, torch.arange(self.n) % 2 == 0
        self.rows = StepRows(self.normal(self.n, len(COLUMNS)), push.to(DEVICE), end.to(DEVICE))
        self.eps, self.z = self.normal(*shape), self.normal(*shape)
        self.variance = torch.tanh(self.normal(*shape))
        row = torch.where(torch.arange(self.n) % 2 == 0, torch.arange(self.n) // 2, -1).flip(0)
        uncond = self.normal((self.n + 1) // 2, *rest)
        self.guidance = Guidance(uncond, row.to(DEVICE), self.normal(self.n))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(DEVICE)

    def guided(self) -> Tensor:
        """eps with guidance, float64."""
        eps = self.eps.double()
        for i, (row, scale) in enumerate(zip(self.guidance.row.tolist(), self.guidance.weight.tolist(), strict=True)):
            if row >= 0:
                eps[i] += scale * (eps[i] - self.guidance.uncond[row].double())
        return eps


def copy(state: SolverState, dtype: torch.dtype = torch.float32) -> SolverState:
    return SolverState(*(None if v is None else v.to(dtype, copy=True) for v in (state.x, state.base, state.history)))


def tensors(state: SolverState) -> list[Tensor]:
    return [v for v in (state.x, state.base, state.history) if v is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_states_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = Problem(shape)
    p.eps = p.eps.to(dtype)
    stepped, same = copy(p.state), copy(p.state)
    given = {"z": p.z, "variance": p.variance, "guidance": p.guidance}
    solver_step(stepped, p.eps, p.rows, **given, backend="triton")
    solver_step(same, p.eps, p.rows, **given, backend="reference")
    exact = solver_step_reference(copy(p.state, torch.float64), p.guided(), p.rows, p.z.double(), p.variance)
    for got, plain, want in zip(tensors(stepped), tensors(same), tensors(exact), strict=True):
        assert_as_accurate(got, plain, want)


@pytest.mark.parametrize("history", [3, 2, 1, 0])
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("data", [True, False])
def test_what_a_row_does_not_use_is_not_needed(data: bool, base: bool, history: int) -> None:
    p = Problem((4, 130))
    state = SolverState(
        p.state.x, p.state.base if base else None, p.state.history[:, :history].contiguous() if history else None
    )
    if not data:
        p.rows.coefficients[:, 0], p.rows.coefficients[:, 1] = 0, 1
    rows = StepRows(p.rows.coefficients, p.rows.push, p.rows.end, data, history, inner=base, noise=False)
    stepped, same = copy(state), copy(state)
    solver_step(stepped, p.eps, rows, backend="triton")
    solver_step(same, p.eps, rows, backend="reference")
    exact = solver_step_reference(copy(state, torch.float64), p.eps.double(), rows)
    if not history:  # the reference takes history for zeros
        assert stepped.history is None
    for got, plain, want in zip(tensors(stepped), tensors(same), tensors(exact), strict=True):
        assert_as_accurate(got, plain, want)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_places_beyond_the_reach_are_left_alone(backend: str) -> None:
    """The history is as deep as the tables in flight need; a step of others reads and shifts what is theirs."""
    p = Problem((4, 130))
    p.state.history[:, 1:] = math.nan
    rows = StepRows(p.rows.coefficients, p.rows.push, p.rows.end, history=1)
    shallow = SolverState(p.state.x.clone(), p.state.base.clone(), p.state.history[:, :1].clone())
    solver_step(p.state, p.eps, rows, z=p.z, backend=backend)
    solver_step(shallow, p.eps, rows, z=p.z, backend=backend)
    assert torch.equal(p.state.x, shallow.x)
    assert torch.equal(p.state.history[:, :1], shallow.history)
    assert p.state.history[:, 1:].isnan().all()


def test_slots_step_those_samples_and_no_other() -> None:
    p, whole = Problem((3, 70)), Problem((7, 70)).state
    slots = torch.tensor([6, 0, 3], device=DEVICE)
    part = SolverState(*(value[slots] for value in tensors(whole)))
    before = copy(whole)
    solver_step(whole, p.eps, p.rows, slots, z=p.z, backend="triton")
    solver_step(part, p.eps, p.rows, z=p.z, backend="triton")
    others = torch.tensor([1, 2, 4, 5], device=DEVICE)
    for after, alone, old in zip(tensors(whole), tensors(part), tensors(before), strict=True):
        assert torch.equal(after[slots], alone)
        assert torch.equal(after[others], old[others])


@pytest.mark.parametrize("stream", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("count", [1, 63, 1030])  # 1030: the second block starts inside the sample's counters
def test_noise_is_that_of_the_sample(count: int, stream: int) -> None:
    """x = 0 and one coefficient of 1 leave the noise itself."""
    seeds, step = torch.tensor([7, 2**63 - 1, 2**32, 0]), torch.tensor([3, 0, 2**32 - 1, 2**31])
    state = SolverState(torch.zeros(4, count, device=DEVICE))
    coefficients = torch.zeros(4, len(COLUMNS), device=DEVICE)
    coefficients[:, COLUMNS.index("noise")] = 1
    none, end = torch.zeros(4, dtype=torch.bool, device=DEVICE), torch.ones(4, dtype=torch.bool, device=DEVICE)
    rows = StepRows(coefficients, none, end, data=False, history=0, inner=False)
    noise = Noise(seeds.to(DEVICE), step.to(DEVICE), stream)
    solver_step(state, torch.zeros_like(state.x), rows, noise=noise, backend="triton")
    wanted = philox_normal(seeds, step, stream, count)
    # other integers would be another value altogether; another float64 logarithm moves the last bit of one in 2^28
    torch.testing.assert_close(state.x.cpu(), wanted, rtol=2.0**-23, atol=1e-15)


def test_nan_stays_with_its_sample() -> None:
    p = Problem((3, 70))
    clean = copy(p.state)
    solver_step(clean, p.eps, p.rows, z=p.z, backend="triton")
    p.eps[1] = math.nan
    solver_step(p.state, p.eps, p.rows, z=p.z, backend="triton")
    assert p.state.x[1].isnan().all()
    for got, want in zip(tensors(p.state), tensors(clean), strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]])


def test_unguided_samples_read_no_other_prediction() -> None:
    p = Problem((4, 70))
    p.guidance.row.fill_(-1)
    p.guidance.uncond.fill_(math.nan)
    guided, plain = copy(p.state), copy(p.state)
    solver_step(guided, p.eps, p.rows, z=p.z, guidance=p.guidance, backend="triton")
    solver_step(plain, p.eps, p.rows, z=p.z, backend="triton")
    for got, want in zip(tensors(guided), tensors(plain), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(4, 4, 3, 5), (2, 3, 20, 20), (3, 70)], ids=["odd", "across-blocks", "flat"])
def test_only_the_first_channels_are_guided(shape: tuple[int, ...]) -> None:
    p = Problem(shape)
    channels = (torch.arange(p.n) % shape[1] + 1).to(DEVICE)
    for i, row in enumerate(p.guidance.row.tolist()):
        if row >= 0:
            p.guidance.uncond[row, int(channels[i]) :] = math.nan
    p.guidance = dataclasses.replace(p.guidance, channels=channels)
    stepped, same = copy(p.state), copy(p.state)
    for state, backend in ((stepped, "triton"), (same, "reference")):
        solver_step(state, p.eps, p.rows, z=p.z, guidance=p.guidance, backend=backend)
    wanted = p.eps.double()
    for i, (row, scale) in enumerate(zip(p.guidance.row.tolist(), p.guidance.weight.tolist(), strict=True)):
        for c in range(int(channels[i]) if row >= 0 else 0):
            wanted[i, c] += scale * (wanted[i, c] - p.guidance.uncond[row, c].double())
    exact = solver_step_reference(copy(p.state, torch.float64), wanted, p.rows, p.z.double())
    for got, plain, want in zip(tensors(stepped), tensors(same), tensors(exact), strict=True):
        assert_as_accurate(got, plain, want)


def test_bad_input_changes_nothing() -> None:
    p = Problem((4, 6, 5))
    before = copy(p.state)
    meta = torch.zeros(4, dtype=torch.int64, device="meta")
    seeds = torch.arange(4, device=DEVICE)

    def refused(match: str, **change: object) -> None:
        given = {"eps": p.eps, "rows": p.rows, "z": p.z, **change}
        with pytest.raises(ValueError, match=match):
            solver_step(p.state, **given, backend="triton")

    refused(r"eps must be \[4, 6, 5\]", eps=p.eps[:3])
    refused("eps must be float32 or bfloat16 or float16, got float64", eps=p.eps.double())
    refused("eps must be contiguous", eps=p.eps.mT.contiguous().mT)
    refused("z must be contiguous", z=p.z.mT.contiguous().mT)
    refused("variance must be on (cpu|cuda:0), got meta", variance=p.variance.to("meta"))
    refused("slots must be on (cpu|cuda:0), got meta", slots=meta)
    refused("seeds must be on (cpu|cuda:0), got meta", z=None, noise=Noise(meta, meta, 0))
    refused("two ways", noise=Noise(seeds, seeds, 0))
    refused("a seed and a step for each of 4", z=None, noise=Noise(seeds[:2], seeds[:2], 0))
    refused("guidance must have 4 rows", guidance=Guidance(p.eps[:, :2], seeds, seeds.float()))
    refused("uncond must be float32 or", guidance=Guidance(p.eps.double(), seeds, seeds.float()))
    for got, want in zip(tensors(p.state), tensors(before), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="step must be int64"):
        Noise(seeds, seeds.int(), 0)
    with pytest.raises(ValueError, match="stream must lie"):
        Noise(seeds, seeds, -1)
    with pytest.raises(ValueError, match="weight must be float32"):
        Guidance(p.eps, seeds, seeds.double())
