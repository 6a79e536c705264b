"""The solvers that U-ViT and DiT are published with, against their papers' algorithms written again in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import diffusers.schedulers.scheduling_ddpm as ddpm_module
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from adadiff.diffusion.noise import initial_noise, step_noise
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.singlestep import DPMSolverFast, DPMSolverPPFast
from adadiff.diffusion.solvers import DDIM, DDPM, DPMSolverPP2M, EulerMaruyama
from adadiff.diffusion.tables import Solver, SolverTable, TableSet
from adadiff_kernels import COLUMNS, SolverState, StepRows, solver_step, solver_step_reference

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

SHAPE = (2, 3, 5)
Network = Callable[[Tensor, float], Tensor]  # x, the network's time -> eps


def network(x: Tensor, t: float | Tensor) -> Tensor:
    """A nonlinear stand-in for eps(x, t)."""
    t = torch.as_tensor(t, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
    return torch.tanh(x) * (0.3 + 0.7 * t / 1000) + 0.1 * torch.sin(t / 50)


def start(seed: int = 0) -> Tensor:
    return initial_noise(torch.tensor([seed]), SHAPE).double()


def normal(seed: int, step: int) -> Tensor:
    return step_noise(torch.tensor([seed]), torch.tensor([step]), SHAPE).double()


class Vp:
    """t in [0, 1]; the network is told 999 t."""

    begin, end = 1.0, 1e-4

    @staticmethod
    def log_alpha(t: float) -> float:
        return (-0.1 * t - 9.95 * t * t) / 2

    @staticmethod
    def told(t: float) -> float:
        return 999 * t


class StableDiffusion:
    """t = n / 1000 for n in 1..1000; the network is told n; log alpha is linear in between."""

    begin, end = 1.0, 1e-3
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    logs: ClassVar = roots.square().neg().log1p().cumsum(0).div(2).tolist()

    @classmethod
    def log_alpha(cls, t: float) -> float:
        low = min(max(math.floor(t * 1000 + 1e-9), 1), 999)
        share = t * 1000 - low
        return cls.logs[low - 1] + share * (cls.logs[low] - cls.logs[low - 1])

    @staticmethod
    def told(t: float) -> float:
        return 1000 * t


class Process:
    """alpha, sigma, lambda, and the time of a lambda by bisection."""

    def __init__(self, kind: type[Vp] | type[StableDiffusion]):
        self.kind = kind

    def alpha(self, t: float) -> float:
        return math.exp(self.kind.log_alpha(t))

    def sigma(self, t: float) -> float:
        return math.sqrt(-math.expm1(2 * self.kind.log_alpha(t)))

    def lam(self, t: float) -> float:
        return self.kind.log_alpha(t) - math.log(self.sigma(t))

    def time(self, lam: float) -> float:
        low, high = self.kind.end / 2, self.kind.begin  # lambda falls with t
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if self.lam(middle) > lam else (low, middle)
        return (low + high) / 2


def orders(steps: int) -> list[int]:
    """Section 3.4 of DPM-Solver: K = floor(N / 3) + 1 steps that take N evaluations."""
    K = steps // 3 + 1
    return {0: [3] * (K - 2) + [2, 1], 1: [3] * (K - 1) + [1], 2: [3] * (K - 1) + [2]}[steps % 3]


def noise_step(p: Process, eps: Network, x: Tensor, s: float, u: float, order: int) -> tuple[Tensor, float]:
    """DPM-Solver-1, -2 and -3 (Lu et al. 2022a, algorithms 1 and 2, appendix B): r1 = 1/2, or 1/3 and 2/3."""
    h, told = p.lam(u) - p.lam(s), p.kind.told
    e0 = eps(x, told(s))
    plain = p.alpha(u) / p.alpha(s) * x - p.sigma(u) * math.expm1(h) * e0
    if order == 1:
        return plain, 1
    r1, r2 = (1 / 2, None) if order == 2 else (1 / 3, 2 / 3)
    s1 = p.time(p.lam(s) + r1 * h)
    e1 = eps(p.alpha(s1) / p.alpha(s) * x - p.sigma(s1) * math.expm1(r1 * h) * e0, told(s1))
    if order == 2:
        return plain - p.sigma(u) / (2 * r1) * math.expm1(h) * (e1 - e0), 2
    s2 = p.time(p.lam(s) + r2 * h)
    x2 = p.alpha(s2) / p.alpha(s) * x - p.sigma(s2) * math.expm1(r2 * h) * e0
    x2 = x2 - p.sigma(s2) * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * (e1 - e0)
    e2 = eps(x2, told(s2))
    return plain - p.sigma(u) / r2 * (math.expm1(h) / h - 1) * (e2 - e0), 3


def run_noise(p: Process, eps: Network, x: Tensor, steps: int) -> Tensor:
    plan = orders(steps)
    first, last = p.lam(p.kind.begin), p.lam(p.kind.end)
    times = [p.time(first + (last - first) * k / len(plan)) for k in range(len(plan) + 1)]
    times[0], times[-1] = p.kind.begin, p.kind.end
    evaluations = 0
    for order, s, u in zip(plan, times, times[1:], strict=False):
        x, made = noise_step(p, eps, x, s, u, order)
        evaluations += made
    assert evaluations == steps
    return x


def run_data(p: Process, eps: Network, x: Tensor, steps: int) -> Tensor:
    """DPM-Solver++, singlestep (Lu et al. 2022b, algorithm 1 and appendix A), on a grid that is even in t."""

    def x0(x: Tensor, t: float) -> Tensor:
        return (x - p.sigma(t) * eps(x, p.kind.told(t))) / p.alpha(t)

    grid = [p.kind.begin + (p.kind.end - p.kind.begin) * k / steps for k in range(steps + 1)]
    i = 0
    for order in orders(steps):
        s, u = grid[i], grid[i + order]
        h = p.lam(u) - p.lam(s)
        m0 = x0(x, s)
        plain = p.sigma(u) / p.sigma(s) * x - p.alpha(u) * math.expm1(-h) * m0
        if order == 1:
            new = plain
        else:
            s1 = grid[i + 1]
            r1 = (p.lam(s1) - p.lam(s)) / h
            m1 = x0(p.sigma(s1) / p.sigma(s) * x - p.alpha(s1) * math.expm1(-r1 * h) * m0, s1)
            if order == 2:
                new = plain - p.alpha(u) * math.expm1(-h) * (m1 - m0) / (2 * r1)
            else:
                s2 = grid[i + 2]
                r2 = (p.lam(s2) - p.lam(s)) / h
                x2 = p.sigma(s2) / p.sigma(s) * x - p.alpha(s2) * math.expm1(-r2 * h) * m0
                x2 = x2 + p.alpha(s2) * r2 / r1 * (math.expm1(-r2 * h) / (r2 * h) + 1) * (m1 - m0)
                new = plain + p.alpha(u) / r2 * (math.expm1(-h) / h + 1) * (x0(x2, s2) - m0)
        x, i = new, i + order
    return x


def run_sde(eps: Network, x: Tensor, steps: int, seed: int = 0) -> Tensor:
    """dx = -beta/2 x dt + sqrt(beta) dw backwards: x + (-beta/2 x + beta eps / sigma) dt + sqrt(-beta dt) z."""
    times = [1 - k * (1 - 1e-3) / (steps - 1) for k in range(steps)]
    for k, (t, after) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        beta, dt = 0.1 + 19.9 * t, after - t
        sigma = math.sqrt(-math.expm1(-0.1 * t - 9.95 * t * t))
        x = x + (-beta / 2 * x + beta * eps(x, 999 * t) / sigma) * dt
        if after:
            x = x + math.sqrt(-beta * dt) * normal(seed, k)
    return x


def row_of(table: SolverTable, i: int) -> StepRows:
    """Row i in float64."""
    one = slice(i, i + 1)
    return StepRows(table.coefficients[one], table.push[one], table.end[one])


def run_rows(solver: Solver, schedule: str, steps: int, seed: int = 0, eps: Network = network) -> Tensor:
    """The table's rows in float64, times too."""
    table = solver.table(NoiseSchedule(schedule), steps)
    state = SolverState.start(start(seed))
    for i in range(steps):
        rows = row_of(table, i)
        state = solver_step_reference(state, eps(state.x, float(table.t[i])), rows, z=normal(seed, i))
    return state.x


KINDS = {"vp": Vp, "stable_diffusion": StableDiffusion}


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 18, 20, 50])  # every remainder by 3; U-ViT's 50, its 20
@pytest.mark.parametrize("solver", [DPMSolverFast(), DPMSolverPPFast()], ids=["eps", "x0"])
def test_singlestep_rows_state_the_papers(solver: Solver, steps: int, schedule: str) -> None:
    run = run_noise if solver == DPMSolverFast() else run_data
    wanted = run(Process(KINDS[schedule]), network, start(), steps)
    got = run_rows(solver, schedule, steps)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


@pytest.mark.parametrize("steps", [2, 3, 50, 250])
def test_euler_maruyama_rows_state_the_sde(steps: int) -> None:
    wanted = run_sde(network, start(), steps)
    got = run_rows(EulerMaruyama(), "vp", steps)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


def test_euler_maruyama_in_one_step_is_refused() -> None:
    """x + 10 x - 20 eps would be no image, and say nothing."""
    with pytest.raises(ValueError, match="no image in 1 step; use 2 or more"):
        EulerMaruyama().table(NoiseSchedule("vp"), 1)


def test_times_the_published_networks_are_told() -> None:
    """First and last of U-ViT's own runs: dpm_solver_pytorch.py at 50, dpm_solver_pp.py at 50 and 20 evaluations."""
    vp, discrete = NoiseSchedule("vp"), NoiseSchedule("stable_diffusion")
    t = DPMSolverFast().table(vp, 50).t
    assert (float(t[0]), round(float(t[-1]), 3)) == (999.0, 0.187)
    for steps, last in ((50, 20.98), (20, 50.95)):
        t = DPMSolverPPFast().table(discrete, steps).t
        assert (float(t[0]), round(float(t[-1]), 2)) == (1000.0, last)
    assert EulerMaruyama().table(vp, 1000).t[[0, -1]].tolist() == pytest.approx([999, 0.999])


def test_third_order() -> None:
    """With Gaussian data eps and the ODE's solution are known; half the step divides the error by about 8."""
    schedule, spread = NoiseSchedule("vp"), 0.5

    def variance(t: float) -> float:
        a = math.exp(float(schedule.log_alpha_bar(torch.tensor(t, dtype=torch.float64))))
        return a * spread**2 + 1 - a

    def eps(x: Tensor, t: float) -> Tensor:
        a = math.exp(float(schedule.log_alpha_bar(torch.tensor(t, dtype=torch.float64))))
        return math.sqrt(1 - a) * x / variance(t)

    def error(steps: int) -> float:
        solution = math.sqrt(variance(schedule.times[1]) / variance(999.0))
        return float((run_rows(DPMSolverFast(), "vp", steps, eps=eps) / start() / solution - 1).abs().max())

    assert 2**3 * 0.7 < error(95) / error(191) < 2**3 * 1.4  # 32 and 64 steps


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_variances_are_those_of_diffusers(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDPM on DiT's timesteps: the large variance, and the learned one between small and large."""
    learned = torch.tanh(normal(5, 0))
    for variance, theirs in (("large", "fixed_large"), (None, "learned_range")):
        scheduler = DDPMScheduler(
            clip_sample=False, variance_type=theirs, beta_schedule="linear", beta_start=1e-4, beta_end=0.02
        )
        beta = torch.tensor([1e-4 + k * (0.02 - 1e-4) / 999 for k in range(1000)], dtype=torch.float64)
        scheduler.alphas_cumprod = (1 - beta).cumprod(0)
        table = DDPM("respaced", variance).table(NoiseSchedule("linear"), steps)
        scheduler.set_timesteps(timesteps=table.t.long().tolist())
        for i, t in enumerate(scheduler.timesteps):
            x, z = normal(1, i), normal(2, i)
            monkeypatch.setattr(ddpm_module, "randn_tensor", lambda *_, z=z, **__: z)
            eps = network(x, float(t))
            wanted = scheduler.step(torch.cat([eps, learned], 1) if variance is None else eps, t, x).prev_sample
            got = solver_step_reference(SolverState(x), eps, row_of(table, i), z=z, variance=learned).x
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


def test_a_fixed_variance_does_not_ask_the_network() -> None:
    linear = NoiseSchedule("linear")
    for variance, spread in (("small", False), ("large", False), (None, True)):
        table = DDPM("respaced", variance).table(linear, 9)
        assert bool((table.coefficients[:-1, COLUMNS.index("spread")] != 0).all()) is spread
        assert (table.coefficients[-1, [COLUMNS.index("spread"), COLUMNS.index("noise")]] == 0).all()
    small, unset = (DDPM("respaced", variance).table(linear, 9).coefficients for variance in ("small", None))
    assert torch.equal(small[:, COLUMNS.index("noise")], unset[:, COLUMNS.index("noise")])


# ---- ragged batches ----


@dataclass
class Job:
    solver: Solver
    steps: int
    joins: int
    seed: int
    wanted: Callable[[], Tensor]


def jobs(schedule: str) -> list[Job]:
    p = Process(KINDS[schedule])

    def noise(steps: int, joins: int, seed: int) -> Job:
        return Job(DPMSolverFast(), steps, joins, seed, lambda: run_noise(p, network, start(seed), steps))

    def data(steps: int, joins: int, seed: int) -> Job:
        return Job(DPMSolverPPFast(), steps, joins, seed, lambda: run_data(p, network, start(seed), steps))

    def other(solver: Solver, steps: int, joins: int, seed: int) -> Job:
        return Job(solver, steps, joins, seed, lambda: run_rows(solver, schedule, steps, seed))

    made = [noise(20, 0, 1), data(20, 3, 2), noise(50, 1, 3), data(50, 0, 4), noise(5, 7, 5), data(1, 2, 6)]
    made += [noise(6, 9, 7), data(13, 5, 8), other(DPMSolverPP2M(), 9, 1, 9), other(DDIM(), 12, 4, 10)]
    if schedule == "vp":
        made.append(Job(EulerMaruyama(), 31, 2, 11, lambda: run_sde(network, start(11), 31, 11)))
    return made


@pytest.mark.parametrize("schedule", KINDS)
def test_ragged_batch_equals_each_solver_alone_in_float64(schedule: str) -> None:
    """Starts at different ticks, in one float32 state: what a sample needs of base and history is its own."""
    all_jobs = jobs(schedule)
    tables, state = TableSet(NoiseSchedule(schedule)), None
    which = np.array([tables.add(job.solver, np.array([job.steps]))[0] for job in all_jobs])
    state = tables.packed.start(torch.cat([start(job.seed) for job in all_jobs]).float())
    step = np.zeros(len(all_jobs), dtype=np.int64)
    for tick in range(max(job.joins + job.steps for job in all_jobs)):
        running = [i for i, job in enumerate(all_jobs) if job.joins <= tick and step[i] < job.steps]
        own = np.array(running[::-1])
        t, rows = tables.packed.rows(which[own], step[own])
        slots, t = torch.from_numpy(own), torch.from_numpy(t)
        z = torch.cat([normal(all_jobs[i].seed, int(step[i])) for i in own.tolist()]).float()
        solver_step(state, network(state.x[slots], t), rows, slots, z=z if rows.noise else None)
        step[own] += 1
    for i, job in enumerate(all_jobs):
        wanted = job.wanted()[0]
        assert float((state.x[i].double() - wanted).abs().max()) < 1e-4 * float(wanted.abs().max()), job


def test_samples_begin_with_a_whole_step() -> None:
    table = DPMSolverFast().table(NoiseSchedule("vp"), 9)  # orders 3, 3, 2, 1
    assert table.starts.nonzero().flatten().tolist() == [0, 3, 6, 8]
    tables = TableSet(NoiseSchedule("vp"))
    tables.add(DPMSolverFast(), np.array([9]), np.array([6]))
    with pytest.raises(ValueError, match=r"row 4 lies within a step; steps begin at \[0, 3, 6, 8\]"):
        tables.add(DPMSolverFast(), np.array([9]), np.array([4]))


@pytest.mark.parametrize("solver", [DPMSolverFast(), DPMSolverPPFast()], ids=["eps", "x0"])
def test_bad_step_counts(solver: Solver) -> None:
    for steps in (0, -1, 1001, 2.0, True):
        with pytest.raises(ValueError, match="steps must be an int from 1 to 1000"):
            solver.table(NoiseSchedule("vp"), steps)
