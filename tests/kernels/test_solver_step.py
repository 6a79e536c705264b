"""solver_step against its formula in float64, and what it must leave alone."""

import math

import pytest
import torch
from torch import Tensor

from adadiff_kernels import (
    COLUMNS,
    Guidance,
    SolverState,
    StepRows,
    guide,
    solver_step,
    solver_step_reference,
)

SHAPES = [
    pytest.param((1, 1, 1, 1), id="one-element"),
    pytest.param((5, 3, 7, 3), id="odd"),  # 63 elements a sample: no multiple of a vector
    pytest.param((17, 4, 8, 8), id="aligned"),
    pytest.param((3, 130), id="flat"),
    pytest.param((0, 1, 8, 8), id="empty"),
]


def problem(shape: tuple[int, ...], seed: int = 0) -> tuple[SolverState, Tensor, StepRows, Tensor, Tensor]:
    """A state, eps, rows that use everything, z and a learned variance."""
    draw = torch.Generator().manual_seed(seed)
    n, *rest = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw)

    state = SolverState(normal(*shape), normal(*shape), normal(n, 3, *rest))
    push = torch.arange(n) % 3 > 0
    rows = StepRows(normal(n, len(COLUMNS)), push, torch.arange(n) % 2 == 0)
    return state, normal(*shape), rows, normal(*shape), torch.rand(shape, generator=draw) * 2 - 1


def copy(state: SolverState) -> SolverState:
    return SolverState(*(None if v is None else v.clone() for v in (state.x, state.base, state.history)))


def double(state: SolverState) -> SolverState:
    return SolverState(*(None if v is None else v.double() for v in (state.x, state.base, state.history)))


def tensors(state: SolverState) -> list[Tensor]:
    return [v for v in (state.x, state.base, state.history) if v is not None]


def by_element(
    state: SolverState, eps: Tensor, rows: StepRows, z: Tensor, variance: Tensor
) -> tuple[list[list[float]], list[list[float]], list[list[list[float]]]]:
    """The formula of the docstring with Python's floats, one element at a time."""
    new_x, new_base, new_history = [], [], []
    for i, row in enumerate(rows.coefficients.tolist()):
        px, pe, base, cur, noise, spread, m0, m1, m2 = row
        x, b, e, zs, v = (t[i].flatten().tolist() for t in (state.x, state.base, eps, z, variance))
        h = state.history[i].flatten(1).tolist()
        m = [px * p + pe * q for p, q in zip(x, e, strict=True)]
        new = [
            base * b[j]
            + cur * m[j]
            + (m0 * h[0][j] + m1 * h[1][j] + m2 * h[2][j])
            + noise * math.exp(spread * (v[j] + 1) / 2) * zs[j]
            for j in range(len(x))
        ]
        new_x.append(new)
        new_base.append(new if bool(rows.end[i]) else b)
        new_history.append([m, h[0], h[1]] if bool(rows.push[i]) else h)
    return new_x, new_base, new_history


@pytest.mark.parametrize("shape", SHAPES)
def test_both_implementations_state_the_formula(shape: tuple[int, ...]) -> None:
    state, eps, rows, z, variance = problem(shape)
    expected = [torch.tensor(part, dtype=torch.float64) for part in by_element(state, eps, rows, z, variance)]
    reference = solver_step_reference(double(state), eps, rows, z.double(), variance)
    stepped = copy(state)
    solver_step(stepped, eps, rows, z=z, variance=variance)
    for want, exact, got in zip(expected, tensors(reference), tensors(stepped), strict=True):
        torch.testing.assert_close(exact, want.view(exact.shape), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(got.double(), want.view(got.shape), rtol=2e-6, atol=2e-5)


def test_slots_step_those_samples_and_no_other() -> None:
    state, *_ = problem((9, 3, 5, 3))
    slots = torch.tensor([7, 0, 4, 2])
    part, eps, rows, z, variance = problem((4, 3, 5, 3), seed=1)
    part = SolverState(*(whole[slots] for whole in tensors(state)))
    stepped = copy(state)
    solver_step(stepped, eps, rows, slots, z=z, variance=variance)
    solver_step(part, eps, rows, z=z, variance=variance)
    others = torch.tensor([1, 3, 5, 6, 8])
    for before, after, alone in zip(tensors(state), tensors(stepped), tensors(part), strict=True):
        assert torch.equal(after[slots], alone)
        assert torch.equal(after[others], before[others])


def select(rows: StepRows, i: int) -> StepRows:
    return StepRows(rows.coefficients[i : i + 1], rows.push[i : i + 1], rows.end[i : i + 1])


@pytest.mark.parametrize("width", [1, 3, 17, 63, 64, 130])
def test_a_sample_alone_has_the_same_bits(width: int) -> None:
    state, eps, rows, z, variance = problem((11, width))
    together = copy(state)
    solver_step(together, eps, rows, z=z, variance=variance)
    for i in range(11):
        one = slice(i, i + 1)
        alone = SolverState(*(whole[one].clone() for whole in tensors(state)))
        solver_step(alone, eps[one], select(rows, i), z=z[one], variance=variance[one])
        for whole, own in zip(tensors(together), tensors(alone), strict=True):
            assert torch.equal(whole[one], own)


@pytest.mark.parametrize("poisoned", ["x", "base", "history", "eps", "z", "coefficients"])
def test_nan_stays_with_its_sample(poisoned: str) -> None:
    state, eps, rows, z, _ = problem((6, 2, 5, 3))
    clean = copy(state)
    solver_step(clean, eps, rows, z=z)
    named = {"x": state.x, "base": state.base, "history": state.history, "eps": eps, "z": z}
    named["coefficients"] = rows.coefficients
    named[poisoned][2] = math.nan
    solver_step(state, eps, rows, z=z)
    healthy = torch.tensor([0, 1, 3, 4, 5])
    assert state.x[2].isnan().all()
    for got, want in zip(tensors(state), tensors(clean), strict=True):
        assert torch.equal(got[healthy], want[healthy])


def test_a_place_taken_over_from_a_nan_sample_starts_clean() -> None:
    state = SolverState.start(torch.full((4, 3), math.nan))
    state.history.fill_(math.nan)
    fresh = torch.randn(2, 3)
    state.restart(torch.tensor([3, 1]), fresh)
    assert torch.equal(state.x[[3, 1]], fresh)
    assert torch.equal(state.base[[3, 1]], fresh)
    assert torch.equal(state.history[[3, 1]], torch.zeros(2, 3, 3))
    assert state.x[[0, 2]].isnan().all()
    zero_history = torch.zeros(2, len(COLUMNS))
    zero_history[:, COLUMNS.index("base")] = 1
    solver_step(
        state,
        torch.zeros(2, 3),
        StepRows(zero_history, torch.tensor([False, False]), torch.tensor([True, True]), noise=False),
        torch.tensor([3, 1]),
    )
    assert torch.equal(state.x[[3, 1]], fresh)


def test_the_state_does_not_share_memory_with_its_start() -> None:
    x = torch.randn(3, 2, 4).transpose(1, 2)
    state = SolverState.start(x)
    assert torch.equal(state.x, x)
    state.x.zero_()
    assert torch.equal(state.base, x)
    assert x.abs().min() > 0


def test_what_the_host_knows_saves_work_and_changes_nothing() -> None:
    """Rows that store nothing, add nothing and take m = eps, with and without being told so."""
    state, eps, rows, z, _ = problem((7, 3, 5))
    column = dict(zip(COLUMNS, rows.coefficients.unbind(1), strict=True))
    for name, value in (("px", 0), ("pe", 1), ("m0", 0), ("m1", 0), ("m2", 0), ("noise", 0)):
        column[name].fill_(value)
    ends, stored = torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)
    careful, told = copy(state), SolverState(state.base.clone())
    careful.x.copy_(state.base)
    solver_step(careful, eps, StepRows(rows.coefficients, stored, ends), z=z)
    knowing = StepRows(rows.coefficients, stored, ends, data=False, history=0, inner=False, noise=False)
    solver_step(told, eps, knowing)
    assert torch.equal(careful.x, told.x)
    assert torch.equal(careful.history, state.history)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_eps_of_another_dtype_is_converted_first(dtype: torch.dtype) -> None:
    state, eps, rows, z, _ = problem((4, 3, 5))
    eps = eps.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # strides of channels-last
    other = copy(state)
    solver_step(state, eps, rows, z=z)
    solver_step(other, eps.float().contiguous(), rows, z=z)
    for got, want in zip(tensors(state), tensors(other), strict=True):
        assert torch.equal(got, want)


def test_the_row_format_carries_a_third_order_singlestep_solver() -> None:
    """DPM-Solver++(3S) (Lu et al. 2022, appendix; U-ViT, dpm_solver_pp.py): one macro-step in three rows."""
    alpha, sigma = [0.3, 0.45, 0.6, 0.75], [math.sqrt(1 - a * a) for a in (0.3, 0.45, 0.6, 0.75)]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    h = lam[3] - lam[0]
    r1, r2 = (lam[1] - lam[0]) / h, (lam[2] - lam[0]) / h

    def eps_at(x: Tensor, i: int) -> Tensor:
        return torch.tanh(x) * sigma[i]

    x = torch.linspace(-3, 3, 14, dtype=torch.float64).view(2, 7)

    def predicted(at: Tensor, i: int) -> Tensor:
        return (at - sigma[i] * eps_at(at, i)) / alpha[i]

    d_s = predicted(x, 0)
    phi_11, phi_12, phi_1 = math.expm1(-r1 * h), math.expm1(-r2 * h), math.expm1(-h)
    phi_22, phi_2 = phi_12 / (r2 * h) + 1, phi_1 / h + 1
    d_1 = predicted(sigma[1] / sigma[0] * x - alpha[1] * phi_11 * d_s, 1)
    x_2 = sigma[2] / sigma[0] * x - alpha[2] * phi_12 * d_s + r2 / r1 * alpha[2] * phi_22 * (d_1 - d_s)
    d_2 = predicted(x_2, 2)
    expected = sigma[3] / sigma[0] * x - alpha[3] * phi_1 * d_s + alpha[3] * phi_2 / r2 * (d_2 - d_s)

    k, k_last = r2 / r1 * alpha[2] * phi_22, alpha[3] * phi_2 / r2
    read = [(1 / a, -s / a) for a, s in zip(alpha, sigma, strict=True)]
    table = torch.tensor(
        [
            [*read[0], sigma[1] / sigma[0], -alpha[1] * phi_11, 0, 0, 0, 0, 0],
            [*read[1], sigma[2] / sigma[0], k, 0, 0, -alpha[2] * phi_12 - k, 0, 0],
            [*read[2], sigma[3] / sigma[0], k_last, 0, 0, -alpha[3] * phi_1 - k_last, 0, 0],
        ]
    )
    state = SolverState.start(x.float(), history=1)
    for i, (push, end) in enumerate([(True, False), (False, False), (False, True)]):
        given = torch.tensor([push] * 2), torch.tensor([end] * 2)
        rows = StepRows(table[i].expand(2, -1), *given, history=1, noise=False)
        solver_step(state, eps_at(state.x, i), rows)
        if not end:
            assert torch.equal(state.base, x.float())
    torch.testing.assert_close(state.x.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.base, state.x)


def test_bad_input_changes_nothing() -> None:
    state, eps, rows, z, _ = problem((4, 3, 5))
    before = copy(state)
    bare = SolverState(state.x)

    def refused(match: str, *arguments: object, **named: object) -> None:
        with pytest.raises(ValueError, match=match):
            solver_step(*arguments, **named)

    refused("z is None", state, eps, rows)
    refused(r"eps must be \[4, 3, 5\]", state, eps[:3], rows, z=z)
    refused(r"z must be \[4, 3, 5\]", state, eps, rows, z=z[:, :2])
    refused("z must be float32", state, eps, rows, z=z.double())
    refused("floating point", state, eps.long(), rows, z=z)
    refused("variance must be", state, eps, rows, z=z, variance=z[:1])
    refused("4 rows of coefficients for 2 samples", state, eps[:2], rows, torch.tensor([0, 1]), z=z[:2])
    refused("reaches back 3 predictions, but the state has 0; start it with history=3", bare, eps, rows, z=z)
    no_history = StepRows(rows.coefficients, rows.push, rows.end, history=0)
    refused("state has no base", bare, eps, no_history, z=z)
    refused("must be float32, got torch.float64", double(state), eps, rows, z=z)
    in_double = StepRows(rows.coefficients.double(), rows.push, rows.end)
    refused("got torch.float32 and torch.float64", state, eps, in_double, z=z)
    for got, want in zip(tensors(state), tensors(before), strict=True):
        assert torch.equal(got, want)

    with pytest.raises(ValueError, match="history must be"):
        SolverState(state.x, state.base, torch.cat([state.history, state.history], 1))
    with pytest.raises(ValueError, match="history must be"):
        SolverState(state.x, state.base, state.x.clone())
    with pytest.raises(ValueError, match="base must be"):
        SolverState(state.x, state.base.double())
    with pytest.raises(ValueError, match="contiguous"):
        SolverState(torch.randn(5, 3).T)
    with pytest.raises(ValueError, match=r"coefficients \[n, 9\]"):
        StepRows(rows.coefficients[:, :8], rows.push, rows.end)
    with pytest.raises(ValueError, match="push"):
        StepRows(rows.coefficients, rows.push[:2], rows.end)
    with pytest.raises(ValueError, match=r"push and end must be bool, got torch\.int64"):
        StepRows(rows.coefficients, rows.push.long(), rows.end)


def test_guidance_follows_each_sample_s_own_scale() -> None:
    cond, uncond = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, -1.0]]), torch.tensor([[0.5, 1.0]] * 3)
    guided = guide(cond.bfloat16(), uncond.bfloat16(), torch.tensor([0.0, 0.5, 2.0]))
    assert guided.tolist() == [[1.0, 2.0], [4.25, 7.0], [20.0, -5.0]]
    cond[1] = math.nan
    assert guide(cond, uncond, torch.ones(3)).isnan().all(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"weight \[n\], got \[3, 2\], \[3, 2\], \[2\]"):
        guide(cond, uncond, torch.ones(2))
    with pytest.raises(ValueError, match="cond and uncond"):
        guide(cond, uncond[:1], torch.ones(3))


def test_only_the_first_channels_are_guided() -> None:
    """DiT guides three of four; the others are the conditional ones to the bit, whatever the unconditional are."""
    draw = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(4, 4, 3, 5, generator=draw), torch.randn(4, 4, 3, 5, generator=draw)
    scale, channels = torch.tensor([0.5, 3.0, -1.0, 2.0]), torch.tensor([3, 1, 4, 2])
    for i, count in enumerate(channels.tolist()):
        uncond[i, count:] = math.nan
    got = guide(cond, uncond, scale, channels)
    row = torch.tensor([1, -1, 0, 3])
    by_row = Guidance(uncond, row, scale, channels).apply(cond)
    for i, count in enumerate(channels.tolist()):
        wanted = cond[i, :count] + scale[i] * (cond[i, :count] - uncond[i, :count])
        torch.testing.assert_close(got[i, :count], wanted)
        assert torch.equal(got[i, count:], cond[i, count:])
    assert torch.equal(by_row[1], cond[1])
    assert torch.equal(by_row[3], got[3])
    assert torch.equal(by_row[0, 3:], cond[0, 3:])
    for wrong in (channels[:3], channels.int(), channels.float()):
        with pytest.raises(ValueError, match=r"channels must be int64 \[4\]"):
            guide(cond, uncond, scale, wrong)
        with pytest.raises(ValueError, match=r"channels must be int64 \[4\]"):
            Guidance(uncond, row, scale, wrong)
