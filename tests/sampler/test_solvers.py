"""Solver tables against diffusers in float64, and ragged batches against one scheduler for each sample."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import diffusers.schedulers.scheduling_ddpm as ddpm_module
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from adadiff.diffusion.flow import FlowEuler
from adadiff.diffusion.heun import Heun
from adadiff.diffusion.noise import INITIAL, SOLVER_STEP, initial_noise, step_noise
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.singlestep import DPMSolverFast, DPMSolverPPFast
from adadiff.diffusion.solvers import DDIM, DDPM, DPMSolverPP2M, EulerMaruyama, solver_from
from adadiff.diffusion.tables import PackedTables, Solver, SolverTable, TableSet, pack
from adadiff.diffusion.unipc import UniPC
from adadiff_kernels import COLUMNS, SolverState, philox_normal, solver_step, solver_step_reference

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

SHAPE = (2, 3, 5)
COMMON = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def exact(scheduler: object) -> object:
    """A diffusers scheduler on a float64 table: betas in float64, cumulative product by numpy."""
    beta = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - beta))
    return scheduler


def column(table: SolverTable, name: str) -> Tensor:
    return table.coefficients[:, COLUMNS.index(name)]


def network(x: Tensor, t: Tensor) -> Tensor:
    """A nonlinear stand-in for eps(x, t); t: one time a sample, or one for all."""
    t = torch.as_tensor(t, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
    return torch.tanh(x) * (0.3 + 0.7 * t / 1000) + 0.1 * torch.sin(t / 50)


# ---- tables ----


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    ("spacing", "steps"),
    # DDIMScheduler steps by 1000 // steps, which is on a trailing grid only where steps divides 1000
    [("leading", 1), ("leading", 7), ("leading", 50), ("trailing", 2), ("trailing", 8), ("trailing", 250)],
)
def test_ddim_rows_are_the_scheduler_s_responses(eta: float, spacing: str, steps: int) -> None:
    scheduler = exact(DDIMScheduler(clip_sample=False, timestep_spacing=spacing, **COMMON))
    scheduler.set_timesteps(steps)
    table = DDIM(eta, spacing).table(NoiseSchedule("linear"), steps)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

    def respond(t: Tensor, eps: Tensor, x: Tensor, z: Tensor) -> float:
        return scheduler.step(eps, t, x, eta=eta, variance_noise=z).prev_sample.item()

    rows = [(respond(t, zero, one, zero), respond(t, one, zero, zero)) for t in scheduler.timesteps]
    base, cur = torch.tensor(rows, dtype=torch.float64).unbind(1)
    noise = torch.tensor([respond(t, zero, zero, one) for t in scheduler.timesteps], dtype=torch.float64)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(column(table, "base"), base, rtol=1e-10, atol=0)
    torch.testing.assert_close(column(table, "cur"), cur, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(column(table, "noise"), noise, rtol=1e-10, atol=1e-11)
    assert_plain(table)


def ddim_of_diffusers(steps: int) -> DDIMScheduler:
    scheduler = exact(DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **COMMON))
    scheduler.set_timesteps(steps)
    return scheduler


def runs_of_diffusers(steps: int, eta: float) -> tuple[Tensor, Tensor]:
    """x from 1 on in float64: by diffusers' scheduler, and by the rows of ours with their name."""
    scheduler = ddim_of_diffusers(steps)
    table = DDIM(eta, "trailing-diffusers").table(NoiseSchedule("linear"), steps)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    theirs = ours = torch.ones(1, 1, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        z = torch.full_like(ours, math.sin(i))
        theirs = scheduler.step(network(theirs, t), t, theirs, eta=eta, variance_noise=z).prev_sample
        base, cur, noise = (column(table, name)[i] for name in ("base", "cur", "noise"))
        ours = base * ours + cur * network(ours, t) + noise * z
    return theirs, ours


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("steps", [*range(1, 61), 67, 75, 99, 101, 128, 150, 300, 333, 498, 501, 600, 750, 999, 1000])
def test_ddim_with_the_landing_places_of_diffusers(steps: int, eta: float) -> None:
    theirs, ours = runs_of_diffusers(steps, eta)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_where_diffusers_repeats_a_timestep_it_is_refused() -> None:
    """numpy.arange gives one number too many where its stride rounds down. The others, all of them, have theirs."""
    refused = []
    for steps in range(1, 1001):
        try:
            t = DDIM(spacing="trailing-diffusers").table(NoiseSchedule("linear"), steps).t
        except ValueError as error:
            assert "end with -1" in str(error)  # noqa: PT017 (many of them)
            refused.append(steps)
        else:
            assert t.tolist() == ddim_of_diffusers(steps).timesteps.tolist()
    assert refused == [steps for steps in range(1, 1001) if -1 in ddim_of_diffusers(steps).timesteps]
    assert len(refused) == 62


def test_ours_lands_where_the_next_step_begins_and_theirs_at_sixteen_step_counts() -> None:
    schedule, same = NoiseSchedule("linear"), []
    for steps in range(1, 1001):
        ours = DDIM().table(schedule, steps)
        after = torch.cat([schedule.log_alpha_bar(ours.t[1:]).exp(), torch.ones(1, dtype=torch.float64)])
        a = schedule.log_alpha_bar(ours.t).exp()
        torch.testing.assert_close(column(ours, "base"), (after / a).sqrt(), rtol=1e-12, atol=0)
        try:
            theirs = DDIM(spacing="trailing-diffusers").table(schedule, steps)
        except ValueError:
            continue
        if torch.allclose(theirs.coefficients, ours.coefficients, rtol=1e-9, atol=1e-12):
            same.append(steps)
    assert same == [steps for steps in range(1, 1001) if 1000 % steps == 0]
    assert len(same) == 16


def test_the_landing_places_of_diffusers_are_ddim_s_alone() -> None:
    assert solver_from("ddim:0.5,spacing=trailing-diffusers") == DDIM(0.5, "trailing-diffusers")
    with pytest.raises(ValueError, match="has spacings"):
        DDPM("trailing-diffusers").table(NoiseSchedule("linear"), 7)
    with pytest.raises(ValueError, match="has spacings"):
        DDIM(spacing="trailing-diffusers").table(NoiseSchedule("vp"), 7)
    first = DDIM(spacing="trailing-diffusers").table(NoiseSchedule("stable_diffusion"), 7)
    assert first.t[0] == 1000


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 7, 48, 250])
def test_ddpm_rows_are_the_scheduler_s_responses(spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = exact(DDPMScheduler(clip_sample=False, timestep_spacing=spacing, **COMMON))
    scheduler.set_timesteps(steps)
    table = DDPM(spacing).table(NoiseSchedule("linear"), steps)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

    def respond(t: Tensor, eps: Tensor, x: Tensor, z: Tensor) -> float:
        monkeypatch.setattr(ddpm_module, "randn_tensor", lambda *_, **__: z)
        return scheduler.step(eps, t, x).prev_sample.item()

    rows = [(respond(t, zero, one, zero), respond(t, one, zero, zero)) for t in scheduler.timesteps]
    base, cur = torch.tensor(rows, dtype=torch.float64).unbind(1)
    noise = torch.tensor([respond(t, zero, zero, one) for t in scheduler.timesteps], dtype=torch.float64)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(column(table, "base"), base, rtol=1e-10, atol=0)
    torch.testing.assert_close(column(table, "cur"), cur, rtol=1e-9, atol=1e-11)
    # the scheduler's variance is at least 1e-20, where ours is 0
    torch.testing.assert_close(column(table, "noise"), noise, rtol=1e-10, atol=1.1e-10)
    assert column(table, "noise")[-1] == 0
    assert_plain(table, "spread")


def assert_plain(table: SolverTable, *filled: str) -> None:
    """m is eps, nothing is stored, every row ends its step."""
    assert (column(table, "pe") == 1).all()
    for name in {"px", "m0", "m1", "m2", "spread"} - set(filled):
        assert (column(table, name) == 0).all()
    assert not table.push.any()
    assert table.end.all()


def test_a_learned_range_variance_is_the_scheduler_s(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"clip_sample": False, "timestep_spacing": "leading", "variance_type": "learned_range"}
    scheduler = exact(DDPMScheduler(**options, **COMMON))
    scheduler.set_timesteps(10)
    packed = pack([DDPM("leading").table(NoiseSchedule("linear"), 10)])
    x, eps, z = (step_noise(torch.tensor([i, i + 9]), torch.tensor([0, 0]), SHAPE) for i in range(3))
    v = torch.tanh(step_noise(torch.tensor([5, 6]), torch.tensor([0, 0]), SHAPE))
    monkeypatch.setattr(ddpm_module, "randn_tensor", lambda *_, **__: z)
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(torch.cat([eps, v], 1), t, x).prev_sample
        state = packed.start(x)
        _, rows = packed.rows(np.zeros(2, dtype=np.int64), np.full(2, i))
        solver_step(state, eps, rows, z=z, variance=v)
        torch.testing.assert_close(state.x, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "stable_diffusion", "vp"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 15, 50, 999])
def test_multistep_rows_state_the_paper(schedule: str, steps: int) -> None:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2 and diffusers' midpoint form, sample by sample in numpy."""
    spacing = "uniform" if schedule == "vp" else "linspace"
    _, alpha_bar = NoiseSchedule(schedule).grid(steps, spacing)
    a = alpha_bar.numpy().astype(np.longdouble)
    alpha, sigma = np.sqrt(a), np.sqrt(1 - a)
    table = DPMSolverPP2M().table(NoiseSchedule(schedule), steps)
    eps = np.sin(np.arange(steps) * 1.7) + 0.2
    x, m_before, lam_before, kept = np.longdouble(1.3), None, None, 0.0
    own = np.longdouble(1.3)
    for i in range(steps):
        m = (x - sigma[i] * eps[i]) / alpha[i]
        lam = np.log(alpha[i] / sigma[i])
        if i == steps - 1:
            x_next = m
        else:
            h = np.log(alpha[i + 1] / sigma[i + 1]) - lam
            d = m if i == 0 else m + h / (2 * (lam - lam_before)) * (m - m_before)
            x_next = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * d
        px, pe, base, cur, noise, spread, m0, m1, m2 = table.coefficients[i].tolist()
        own_m = px * own + pe * eps[i]
        own_next = base * own + m0 * kept + cur * own_m
        assert float(own_next) == pytest.approx(float(x_next), rel=1e-10, abs=1e-10 * float(abs(m))), i
        assert (noise, spread, m1, m2, bool(table.end[i])) == (0, 0, 0, 0, True)
        # from here on the exact trajectory, so that rounding does not add up over 999 steps
        x, own, m_before, lam_before = x_next, x_next, m, lam
        if table.push[i]:
            kept = m


def test_multistep_history_is_the_last_prediction_and_is_kept_only_for_a_reader() -> None:
    for steps in (1, 2, 3, 4, 9):
        table = DPMSolverPP2M().table(NoiseSchedule("linear"), steps)
        for i in range(steps):
            assert bool(column(table, "m0")[i]) is (0 < i < steps - 1)
            assert bool(table.push[i]) is (0 < i + 1 < steps - 1)
        assert table.reach.tolist() == [int(0 <= i < steps - 1 and steps > 2) for i in range(steps)]


def test_default_spacings_start_at_the_noisiest_time() -> None:
    for solver in (DDPM(), DDIM(), DDIM(0.3), DPMSolverPP2M()):
        assert solver.table(NoiseSchedule("linear"), 7).t[0] == 999
        assert solver.table(NoiseSchedule("stable_diffusion"), 7).t[0] == 1000
        assert solver.table(NoiseSchedule("vp"), 7).t[0] == 999


@pytest.mark.parametrize(("solver", "order"), [(DDIM(), 1), (DPMSolverPP2M(), 2)], ids=["ddim", "2m"])
def test_order_of_convergence(solver: Solver, order: int) -> None:
    """With Gaussian data eps and the ODE's solution are known; half the step divides the error by 2^order.

    The error is read at the last evaluation, before the final jump to sigma = 0.
    """
    spread = 0.5  # standard deviation of the data

    def run(steps: int) -> float:
        packed = pack([solver.table(NoiseSchedule("vp"), steps)])
        table = packed.coefficients.double()
        _, a = NoiseSchedule("vp").grid(steps, "uniform")
        state = SolverState.start(torch.ones(1, 1, dtype=torch.float64))
        for i in range(steps - 1):
            variance = a[i] * spread**2 + 1 - a[i]
            eps = (1 - a[i]).sqrt() * state.x / variance
            _, rows = packed.rows(np.array([0]), np.array([i]))
            state = solver_step_reference(state, eps, rows)
        assert table.isfinite().all()
        solution = ((a[-2] * spread**2 + 1 - a[-2]) / (a[0] * spread**2 + 1 - a[0])).sqrt()
        return abs(float(state.x / solution) - 1)

    ratio = run(40) / run(80)
    assert 2**order * 0.75 < ratio < 2**order * 1.35


# ---- ragged batches ----


@dataclass
class Job:
    """One sample: its solver, its steps, the tick at which it joins, its seed, and how diffusers steps it."""

    name: str
    solver: Solver
    steps: int
    joins: int
    seed: int
    scheduler: Callable[[], object]


def ddim(eta: float, spacing: str) -> Callable[[], object]:
    return lambda: exact(DDIMScheduler(clip_sample=False, timestep_spacing=spacing, **COMMON))


def ddpm(spacing: str) -> Callable[[], object]:
    return lambda: exact(DDPMScheduler(clip_sample=False, timestep_spacing=spacing, **COMMON))


def multistep() -> object:
    return DPMSolverMultistepScheduler(timestep_spacing="linspace", final_sigmas_type="zero", **COMMON)


def unipc(order: int) -> Callable[[], object]:
    return lambda: UniPCMultistepScheduler(solver_order=order, **COMMON)


JOBS = [
    Job("ddim-20", DDIM(spacing="leading"), 20, 0, 11, ddim(0, "leading")),
    Job("2m-1", DPMSolverPP2M(), 1, 3, 12, multistep),
    Job("2m-2", DPMSolverPP2M(), 2, 0, 13, multistep),
    Job("2m-9", DPMSolverPP2M(), 9, 1, 14, multistep),  # fewer than 15: diffusers' lower_order_final
    Job("2m-14", DPMSolverPP2M(), 14, 4, 2**63 - 1, multistep),
    Job("2m-20", DPMSolverPP2M(), 20, 2, 16, multistep),
    Job("2m-21", DPMSolverPP2M(), 21, 5, 16, multistep),
    Job("ddim-eta", DDIM(0.7, "leading"), 13, 7, 17, ddim(0.7, "leading")),
    Job("ddim-eta-trailing", DDIM(0.7), 10, 0, 18, ddim(0.7, "trailing")),
    Job("ddim-trailing", DDIM(), 25, 6, 2**40 + 3, ddim(0, "trailing")),
    Job("ddpm", DDPM(), 16, 2, 20, ddpm("trailing")),
    Job("ddpm-leading", DDPM("leading"), 11, 8, 0, ddpm("leading")),
    Job("unipc-3", UniPC(3), 20, 3, 21, unipc(3)),
    Job("unipc-2", UniPC(), 7, 0, 22, unipc(2)),
    Job("unipc-short", UniPC(3), 3, 9, 23, unipc(3)),
    Job("unipc-1", UniPC(1), 2, 1, 24, unipc(1)),
    Job("heun", Heun(), 9, 4, 25, lambda: HeunDiscreteScheduler(timestep_spacing="trailing", **COMMON)),
]


def seeds(jobs: list[Job]) -> Tensor:
    return torch.tensor([job.seed for job in jobs])


def run_ragged(jobs: list[Job], packed: PackedTables, poison: int | None = None) -> Tensor:
    """All jobs in one state; at every tick those that have joined and are not done, the last one first."""
    state = packed.start(initial_noise(seeds(jobs), SHAPE))
    if poison is not None:
        state.x[poison] = torch.nan
    step = np.zeros(len(jobs), dtype=np.int64)
    for tick in range(max(job.joins + job.steps for job in jobs)):
        running = [i for i, job in enumerate(jobs) if job.joins <= tick and step[i] < job.steps]
        if not running:
            continue
        own = np.array(running[::-1])
        t, rows = packed.rows(own, step[own])
        slots = torch.from_numpy(own)
        eps = network(state.x[slots], torch.from_numpy(t))
        z = step_noise(seeds(jobs)[slots], torch.from_numpy(step[own]), SHAPE) if rows.noise else None
        solver_step(state, eps, rows, slots, z=z)
        step[own] += 1
    assert step.tolist() == [job.steps for job in jobs]
    return state.x


def run_with_diffusers(job: Job, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    scheduler = job.scheduler()
    heun = isinstance(scheduler, HeunDiscreteScheduler)
    scheduler.set_timesteps((job.steps + 1) // 2 if heun else job.steps)
    assert len(scheduler.timesteps) == job.steps
    seed = torch.tensor([job.seed])
    x = initial_noise(seed, SHAPE).double()
    x = x * (scheduler.sigmas[0] ** 2 + 1).sqrt().double() if heun else x  # of x / alpha, as it was written
    for i, t in enumerate(scheduler.timesteps):
        z = step_noise(seed, torch.tensor([i]), SHAPE).double()
        eps = network(scheduler.scale_model_input(x, t), t)
        if isinstance(scheduler, DDIMScheduler):
            x = scheduler.step(eps, t, x, eta=job.solver.eta, variance_noise=z).prev_sample
        else:
            monkeypatch.setattr(ddpm_module, "randn_tensor", lambda *_, z=z, **__: z)
            x = scheduler.step(eps, t, x).prev_sample
    return x[0]


def test_ragged_batch_equals_one_diffusers_scheduler_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack([job.solver.table(NoiseSchedule("linear"), job.steps) for job in JOBS])
    result = run_ragged(JOBS, packed)
    for i, job in enumerate(JOBS):
        expected = run_with_diffusers(job, monkeypatch)
        error = float((result[i].double() - expected).abs().max() / expected.abs().max())
        assert error < 1e-4, (job.name, error)


def test_a_sample_has_the_same_bits_without_its_batch_mates() -> None:
    packed = pack([job.solver.table(NoiseSchedule("linear"), job.steps) for job in JOBS])
    together = run_ragged(JOBS, packed)
    for i, job in enumerate(JOBS):
        # its own pack as well, which may need no history and no noise at all
        alone = run_ragged([job], pack([job.solver.table(NoiseSchedule("linear"), job.steps)]))
        assert torch.equal(alone[0], together[i]), job.name


@pytest.mark.parametrize("sick", [0, 5, 10])
def test_a_nan_sample_harms_no_other(sick: int) -> None:
    packed = pack([job.solver.table(NoiseSchedule("linear"), job.steps) for job in JOBS])
    healthy, result = run_ragged(JOBS, packed), run_ragged(JOBS, packed, poison=sick)
    assert result[sick].isnan().all()
    others = [i for i in range(len(JOBS)) if i != sick]
    assert torch.equal(result[others], healthy[others])


def test_pack_gathers_the_rows_of_each_sample() -> None:
    tables = [
        DDIM().table(NoiseSchedule("cosine"), 3),
        DPMSolverPP2M().table(NoiseSchedule("vp"), 5),
        DDPM().table(NoiseSchedule("stable_diffusion"), 1),
    ]
    packed = pack(tables)
    which, step = np.array([2, 1, 0, 1, 0]), np.array([0, 4, 2, 0, 0])
    t, rows = packed.rows(which, step)
    for i, (k, j) in enumerate(zip(which.tolist(), step.tolist(), strict=True)):
        assert t[i] == float(tables[k].t[j].float())
        assert torch.equal(rows.coefficients[i], tables[k].coefficients[j].float())
        assert rows.push[i] == tables[k].push[j]
        assert rows.end[i] == tables[k].end[j]
    none, empty = packed.rows(which[:0], step[:0])
    assert none.shape == (0,)
    assert (empty.data, empty.history, empty.inner, empty.noise) == (False,) * 4


def test_rows_and_state_ask_for_no_more_than_they_need() -> None:
    linear = NoiseSchedule("linear")
    plain, multi = (
        pack([DDIM().table(linear, 4)]),
        pack([DDPM().table(linear, 4), DPMSolverPP2M().table(linear, 4)]),
    )
    x = torch.zeros(2, *SHAPE)
    assert plain.start(x).history is None
    assert plain.start(x).base is None
    assert multi.start(x).history is not None
    zero = np.array([0])

    def asks(packed: PackedTables, table: int, step: int) -> tuple[bool, ...]:
        _, rows = packed.rows(zero + table, zero + step)
        return rows.data, rows.history, rows.inner, rows.noise

    assert asks(plain, 0, 1) == (False, False, False, False)
    assert asks(multi, 0, 1) == (False, False, False, True)
    assert asks(multi, 0, 3) == (False, False, False, False)  # the last step of DDPM adds no noise
    assert asks(multi, 1, 1) == (True, 1, False, False)
    deep = pack([UniPC(order).table(linear, 5) for order in (1, 2, 3)])
    assert [asks(deep, k, 1)[1] for k in range(3)] == [1, 2, 3]  # so many places, from the first row on
    assert deep.start(x).history.shape[1] == 3
    assert multi.start(x).history.shape[1] == 1
    assert asks(deep, 2, 4) == (True, 0, False, False)  # to sigma = 0, by m alone


# ---- noise and names ----


def test_noise_is_philox_s_by_stream() -> None:
    own, step = torch.tensor([5, 9, 2**62]), torch.tensor([0, 3, 19])
    expected = philox_normal(own, torch.zeros_like(own), INITIAL, 30).view(3, *SHAPE)
    assert torch.equal(initial_noise(own, SHAPE), expected)
    expected = philox_normal(own, step, SOLVER_STEP, 30).view(3, *SHAPE)
    assert torch.equal(step_noise(own, step, SHAPE), expected)
    assert not torch.equal(initial_noise(own[:1], SHAPE), step_noise(own[:1], step[:1], SHAPE))
    assert initial_noise(own[:0], SHAPE).shape == (0, *SHAPE)


def test_solver_names() -> None:
    assert solver_from("ddpm") == DDPM()
    assert solver_from("ddim") == DDIM(0.0)
    assert solver_from("ddim:0.5") == DDIM(0.5)
    assert solver_from("ddim:0.5,spacing=leading") == DDIM(0.5, "leading")
    assert solver_from("ddim:spacing=leading,eta=0.5") == DDIM(0.5, "leading")
    assert solver_from("ddpm:spacing=respaced,variance=large") == DDPM("respaced", "large")
    assert solver_from("dpm++2m") == DPMSolverPP2M()
    assert solver_from("dpm++2m:spacing=trailing") == DPMSolverPP2M("trailing")
    assert solver_from("dpm-fast") == DPMSolverFast()
    assert solver_from("dpm++fast") == DPMSolverPPFast()
    assert solver_from("euler-maruyama") == EulerMaruyama()
    assert solver_from("unipc") == UniPC(2, "bh2")
    assert solver_from("unipc:order=3,variant=bh1,spacing=trailing") == UniPC(3, "bh1", "trailing")
    assert solver_from("heun") == Heun()
    assert solver_from("heun:spacing=leading") == Heun("leading")
    assert solver_from("heun:shift=3") == Heun(shift=3.0)
    assert solver_from("flow-euler:shift=3") == FlowEuler(3.0)


def test_bad_input() -> None:
    for text in ("euler", "", "DDIM", "ddim 0.5", ":0.5"):
        with pytest.raises(ValueError, match=r"no solver .*; there are ddpm.*, ddim\[:ETA.*, dpm\+\+2m"):
            solver_from(text)
    for text, said in {
        **dict.fromkeys(("ddim:", "ddim:half", "ddim:eta=half", "ddim:,spacing=leading"), "eta must be a number, got"),
        **dict.fromkeys(("ddim:-0.1", "ddim:1.5", "ddim:nan"), r"eta must lie in \[0, 1\]"),
        "dpm-fast:0.5": "dpm-fast takes no '0.5'",
        "euler-maruyama:spacing=uniform": "euler-maruyama takes no 'spacing=uniform'",
        "ddpm:0.5": "ddpm takes no '0.5'",
        "ddpm:spacing=leading,spacing=leading": "spacing is given twice",
        "dpm++2m:variance=small": r"takes no 'variance=small'. There are dpm\+\+2m\[:spacing=TEXT",
        "unipc:order=2.5": "order must be a whole number, got '2.5'",
    }.items():
        with pytest.raises(ValueError, match=said):
            solver_from(text)
    with pytest.raises(ValueError, match="order of unipc must be 1, 2 or 3, got 4"):
        solver_from("unipc:order=4")
    with pytest.raises(ValueError, match="variant of unipc must be bh1 or bh2, got 'bh3'"):
        solver_from("unipc:variant=bh3")
    with pytest.raises(ValueError, match="variance must be 'small', 'large' or None, got 'learned'"):
        solver_from("ddpm:variance=learned")
    with pytest.raises(ValueError, match="Euler-Maruyama integrates the SDE"):
        EulerMaruyama().table(NoiseSchedule("linear"), 10)
    with pytest.raises(ValueError, match="has spacings"):
        DDIM(spacing="trailing").table(NoiseSchedule("vp"), 10)
    with pytest.raises(ValueError, match="steps must be"):
        DDPM().table(NoiseSchedule("vp"), 0)
    with pytest.raises(ValueError, match="at least one table"):
        pack([])
    packed = pack([DDIM().table(NoiseSchedule("vp"), n) for n in (3, 5)])
    zero = np.array([0])
    for table, step, match in (
        (0, 3, "step must lie"),  # not silently the first row of the next table
        (0, -1, "step must lie"),
        (2, 0, r"table must lie in \[0, 2\)"),
        (-1, 0, "table must lie"),
    ):
        with pytest.raises(ValueError, match=match):
            packed.rows(zero + table, zero + step)
    with pytest.raises(ValueError, match=r"got \[1\] and \[2\]"):
        packed.rows(zero, np.array([0, 1]))


def test_samples_that_step_alike_share_one_table_made_once() -> None:
    """Of 64 samples with three numbers of steps, admitted in two goes: three tables, however many ask for one."""
    made = []

    @dataclass(frozen=True)
    class Counted:
        def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
            made.append(steps)
            return DDIM().table(schedule, steps)

    tables = TableSet(NoiseSchedule("vp"))
    first = tables.add(Counted(), np.array([4, 9] * 16))
    second = tables.add(Counted(), np.array([9, 5] * 16))
    assert made == [4, 9, 5]
    assert len(tables) == 3
    assert tables.packed.steps[first].tolist() == [4, 9] * 16
    assert tables.packed.steps[second].tolist() == [9, 5] * 16
