"""UniPC and Heun: whole trajectories in float64 beside diffusers' schedulers, and starts in the middle of a run."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from adadiff.diffusion.heun import Heun
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.refining import Refining
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.tables import Solver, SolverTable, TableSet
from adadiff.diffusion.unipc import UniPC
from adadiff.forward.options import ExecutionOptions
from adadiff.sampling.sampler import sample
from adadiff_kernels import SolverState, StepRows, solver_step, solver_step_reference
from sampler.tiny import served

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

LINEAR, LINEAR_VP = NoiseSchedule("linear"), NoiseSchedule("vp")
COMMON = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
STEPS = [1, 2, 3, 7, 20]  # no room for the order, just room, an odd number, the usual
X = initial_noise(torch.tensor([3]), (2, 3, 5)).double()


@pytest.fixture(autouse=True)
def _theirs_in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)  # diffusers makes its small systems in the default dtype
    yield
    torch.set_default_dtype(torch.float32)


def network(x: Tensor, t: float | Tensor) -> Tensor:
    """A nonlinear stand-in for eps(x, t)."""
    t = torch.as_tensor(t, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
    return torch.tanh(x) * (0.3 + 0.7 * t / 1000) + 0.1 * torch.sin(t / 50)


def exact(scheduler: object, steps: int) -> object:
    """The scheduler with its sigmas in float64, which it rounds to float32 as it makes them."""
    scheduler.set_timesteps(steps)
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
    index = scheduler.timesteps.numpy().round().astype(int)
    scheduler.sigmas = torch.from_numpy(np.append(np.sqrt((1 - a[index]) / a[index]), 0))
    return scheduler


def run_rows(table: SolverTable, x: Tensor, first: int = 0) -> Tensor:
    """Rows in float64 from `first` on, whose times diffusers has, too."""
    state = SolverState.start(x)
    for i in range(first, table.steps):
        one = slice(i, i + 1)
        rows = StepRows(table.coefficients[one], table.push[one], table.end[one])
        state = solver_step_reference(state, network(state.x, float(table.t[i])), rows)
    return state.x


def unipc_of_diffusers(order: int, variant: str, steps: int, first: int = 0) -> Tensor:
    scheduler = exact(UniPCMultistepScheduler(solver_order=order, solver_type=variant, **COMMON), steps)
    scheduler.set_begin_index(first)
    *times, last = scheduler.timesteps[first:]
    x = X
    for t in times:
        x = scheduler.step(network(x, t), t, x).prev_sample
    if variant == "bh1":  # theirs is NaN at sigma = 0 (B, infinity, times 0): what it would be, the predicted x0
        assert not scheduler.step(network(x, last), last, x).prev_sample.isfinite().any()
        s = scheduler.sigmas[-2]
        return x * (1 + s * s).sqrt() - s * network(x, last)
    return scheduler.step(network(x, last), last, x).prev_sample


def heun_of_diffusers(steps: int, spacing: str) -> Tensor:
    scheduler = exact(HeunDiscreteScheduler(timestep_spacing=spacing, **COMMON), steps)
    x = X * (scheduler.sigmas[0] ** 2 + 1).sqrt()  # it steps x / alpha
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_the_scheduler_s_wherever_a_sample_begins(order: int, variant: str, steps: int) -> None:
    """Its order rises from the first evaluation, that of a sample from an image included, and falls at the end."""
    for first in range(min(steps, 4)):
        table = UniPC(order, variant).table_from(LINEAR, steps, first)
        wanted = unipc_of_diffusers(order, variant, steps, first)
        torch.testing.assert_close(run_rows(table, X, first), wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_heun_is_the_scheduler_s(spacing: str, steps: int) -> None:
    """Its N steps are 2 N - 1 evaluations, and ours counts those."""
    table, wanted = Heun(spacing).table(LINEAR, 2 * steps - 1), heun_of_diffusers(steps, spacing)
    assert table.steps == 2 * steps - 1
    torch.testing.assert_close(run_rows(table, X), wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))


def test_an_even_number_of_evaluations_ends_with_two_steps_of_euler() -> None:
    table = Heun().table(LINEAR, 6)
    assert table.t.tolist() == [999, 749, 749, 499, 499, 249]
    assert table.end.tolist() == [False, True, False, True, True, True]
    assert table.starts.tolist() == [True, False, True, False, True, True]
    assert table.push.tolist() == [True, False, True, False, False, False]
    a = torch.cat([LINEAR.log_alpha_bar(table.t).exp(), torch.ones(1)])
    s, x = ((1 - a) / a).sqrt(), X / a[0].sqrt()
    for i, j in ((0, 1), (2, 3)):
        first = network(x * a[i].sqrt(), table.t[i])
        second = network((x + (s[j] - s[i]) * first) * a[j].sqrt(), table.t[j])
        x = x + (s[j] - s[i]) * (first + second) / 2
    for i in (4, 5):
        x = x + (s[i + 1] - s[i]) * network(x * a[i].sqrt(), table.t[i])
    torch.testing.assert_close(run_rows(table, X), x, rtol=1e-12, atol=1e-12)
    for steps in (0, 1001, 2.0):
        with pytest.raises(ValueError, match="steps must be an int from 1 to 1000"):
            Heun().table(LINEAR, steps)


class EvenInLambda(NoiseSchedule):
    """No rounding to a timestep disturbs."""

    def grid(self, steps: int, spacing: str) -> tuple[Tensor, Tensor]:
        a = torch.sigmoid(2 * torch.linspace(-1.5, 1.5, steps))
        return self.time(a.log()), torch.cat([a, torch.ones(1)])


@pytest.mark.parametrize(
    ("solver", "order"),
    # a corrector of order p makes p + 1 of it; the first step of all, of order 1, leaves an error of third order
    [(UniPC(1), 2), (UniPC(2), 3), (UniPC(3), 3), (Heun(), 2)],
    ids=["unipc-1", "unipc-2", "unipc-3", "heun"],
)
def test_order_of_convergence(solver: Solver, order: int) -> None:
    """With Gaussian data eps and the ODE's solution are known; half the step divides the error by 2^order. Read at the
    last evaluation, before the jump to sigma = 0."""

    def error(steps: int) -> float:
        rows = steps if isinstance(solver, UniPC) else 2 * steps - 1
        table, state = solver.table(EvenInLambda("vp"), rows), SolverState.start(torch.ones(1, 1))
        a = LINEAR_VP.log_alpha_bar(table.t).exp()
        spread = (a * 0.5**2 + 1 - a).sqrt()  # the standard deviation at each time, to which solutions are proportional
        for i in range(rows - 1):
            one = slice(i, i + 1)
            own = StepRows(table.coefficients[one], table.push[one], table.end[one])
            state = solver_step_reference(state, (1 - a[i]).sqrt() * state.x / spread[i] ** 2, own)
        return abs(float(state.x / spread[-1] * spread[0]) - 1)

    assert 2**order * 0.7 < error(41) / error(81) < 2**order * 1.5


def test_refining_begins_between_two_points_of_the_grid() -> None:
    """Every evaluation below the noise level is one of the whole list, first of all one at the level itself."""
    for solver, steps in ((Heun(), 7), (Heun(), 8), (Heun(), 20), (UniPC(3), 9)):
        whole = solver.table(LINEAR, steps)
        table = Refining(solver, 0.4).table(LINEAR, steps)
        begin = float(LINEAR.time(torch.tensor(0.6).log()))
        below = whole.t[whole.t < begin]
        distinct = list(dict.fromkeys(below.tolist()))
        assert float(table.t[0]) == begin
        assert list(dict.fromkeys(table.t[1:].tolist())) == distinct
        assert table.steps == 1 + len(below)
        assert table.end[-1]
        assert table.coefficients.isfinite().all()


def test_samples_that_begin_in_the_middle_share_a_state_with_others() -> None:
    """Ragged in float32: four places of three histories, each as alone in float64."""
    jobs = [(UniPC(3), 20, 5, 0), (UniPC(2), 7, 2, 3), (Heun(), 9, 2, 1), (UniPC(3), 20, 0, 2)]
    tables = TableSet(LINEAR)
    which = np.array([tables.add(solver, np.array([n]), np.array([first]))[0] for solver, n, first, _ in jobs])
    x = initial_noise(torch.arange(4), (2, 3, 5))
    state, step = tables.packed.start(x), np.array([first for _, _, first, _ in jobs])
    for tick in range(30):
        own = np.array([i for i, (_, n, _, joins) in enumerate(jobs) if joins <= tick and step[i] < n], dtype=np.int64)
        if not len(own):
            continue
        t, rows = tables.packed.rows(which[own], step[own])
        there = torch.from_numpy(own)
        solver_step(state, network(state.x[there], torch.from_numpy(t)), rows, there)
        step[own] += 1
    assert step.tolist() == [20, 7, 9, 20]
    for i, (solver, n, first, _) in enumerate(jobs):
        table = solver.table_from(LINEAR, n, first) if isinstance(solver, UniPC) else solver.table(LINEAR, n)
        wanted = run_rows(table, x[i : i + 1].double(), first)[0]
        torch.testing.assert_close(state.x[i].double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_state_grows_when_a_deeper_history_joins() -> None:
    """What is there of base and history stays; new places are zeros."""
    tables = TableSet(LINEAR)
    tables.add(UniPC(1), np.array([5]))
    state = tables.packed.start(torch.ones(2, 3, dtype=torch.float32))
    state.history.fill_(7)
    tables.add(UniPC(3), np.array([5]))
    tables.add(Heun(), np.array([5]))
    wide = tables.packed.widen(state)
    assert wide.history.shape == (2, 3, 3)
    assert (wide.history[:, 0] == 7).all()
    assert (wide.history[:, 1:] == 0).all()
    assert torch.equal(wide.base, state.x)
    assert tables.packed.widen(wide) is wide
    with pytest.raises(ValueError, match=r"row 1 lies within a step; steps begin at \[0, 2, 4\]"):
        tables.add(Heun(), np.array([5]), np.array([1]))


@pytest.mark.parametrize("solver", ["unipc:order=3", "heun"])
def test_initial_images_begin_where_each_is_told_to(solver: str) -> None:
    """Three strengths and step counts in a batch of two, bit for bit as alone; what is run is the end of a list."""
    torch.set_default_dtype(torch.float32)
    image = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    steps, strength, first = [9, 6, 4, 9], [0.5, 0.8, 1.0, 1.0], [5, 2, 0, 0]
    if solver == "heun":
        first[0] = 4  # row 5 is a second evaluation
    given = {"solver": solver, "class_labels": 1, "execution": ExecutionOptions(batch_invariant=True)}
    images, report = sample(served(), 4, init_image=image, steps=steps, strength=strength, batch=2, **given)
    run = report.exit_layer[:, :, 0] > 0
    assert [run[:, i].nonzero().flatten().tolist() for i in range(4)] == [
        list(range(begin, count)) for begin, count in zip(first, steps, strict=True)
    ]
    for i in range(4):
        alone, _ = sample(served(), 1, seed=i, init_image=image[i], steps=steps[i], strength=strength[i], **given)
        assert torch.equal(images[i], alone[0])
