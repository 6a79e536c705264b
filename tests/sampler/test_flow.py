"""Flow matching: x = (1 - t) x0 + t eps, its grids and solvers beside diffusers, and models with that schedule."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import adadiff
from adadiff.diffusion.flow import FlowEuler
from adadiff.diffusion.heun import Heun
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.prediction import conversion
from adadiff.diffusion.refining import Refining
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.solvers import DDIM, DPMSolverPP2M, solver_from
from adadiff.diffusion.tables import Solver, converted
from adadiff.diffusion.unipc import UniPC
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import Costs, ForwardOutput
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.sampling.sampler import sample
from adadiff_kernels import SolverState, StepRows, solver_step_reference
from sampler.tiny import SERVED, served

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

FLOW = NoiseSchedule("flow")
STEPS = [1, 2, 3, 7, 20]
X = initial_noise(torch.tensor([3]), (2, 3, 5)).double()
CONFIG = dataclasses.replace(SERVED, schedule="flow", prediction_type="flow")


def network(x: Tensor, t: float | Tensor) -> Tensor:
    """A nonlinear stand-in for the velocity."""
    t = torch.as_tensor(t, dtype=x.dtype)
    return torch.tanh(x) * (0.3 + 0.7 * t / 1000) + 0.1 * torch.sin(t / 50)


def run_rows(solver: Solver, steps: int, call: Callable = network, kind: str = "flow") -> Tensor:
    table, state = converted(solver.table(FLOW, steps), FLOW, kind), SolverState.start(X)
    for i in range(steps):
        one = slice(i, i + 1)
        rows = StepRows(table.coefficients[one], table.push[one], table.end[one])
        state = solver_step_reference(state, call(state.x, float(table.t[i])), rows)
    return state.x


def sigmas(steps: int, shift: float) -> np.ndarray:
    """diffusers' own, which it then rounds to float32: the shift is in the end of the line and in every point."""
    last = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    t = np.linspace(1, last, steps)
    return np.append(shift * t / (1 + (shift - 1) * t), 0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", STEPS)
def test_euler_is_the_scheduler_s(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    table = FlowEuler(shift).table(FLOW, steps)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), sigmas(steps, shift), rtol=0, atol=1e-7)
    np.testing.assert_allclose(table.t.numpy(), 1000 * sigmas(steps, shift)[:-1], rtol=1e-13)
    x, exact = X, X
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, t), t, x).prev_sample
        s, after = sigmas(steps, shift)[i : i + 2]
        exact = exact + (after - s) * network(exact, 1000 * s)
    own = run_rows(FlowEuler(shift), steps)
    torch.testing.assert_close(own, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(own, x.double(), rtol=0, atol=1e-5)  # they step in float32
    if shift == 1:
        assert torch.equal(own, run_rows(DDIM(), steps))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
def test_heun_is_the_scheduler_s(steps: int, shift: float) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    x = X
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    exact, s = X, sigmas(steps, shift)
    for i in range(steps):
        first = network(exact, 1000 * s[i])
        euler = exact + (s[i + 1] - s[i]) * first
        second = first if i == steps - 1 else network(euler, 1000 * s[i + 1])
        exact = exact + (s[i + 1] - s[i]) * (first + second) / 2
    own = run_rows(Heun(shift=shift), 2 * steps - 1)
    torch.testing.assert_close(own, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(own, x.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 3.0), (3, 1.0), (7, 3.0), (20, 1.0)])
def test_unipc_is_the_scheduler_s(steps: int, shift: float, order: int) -> None:
    t = np.linspace(1, 1e-3, steps + 1)[:-1]
    s = shift * t / (1 + (shift - 1) * t)
    s[0] -= 1e-6  # theirs, too, since lambda is not finite at 1
    torch.set_default_dtype(torch.float64)
    try:
        scheduler = UniPCMultistepScheduler(
            solver_order=order, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        scheduler.set_timesteps(steps)
        np.testing.assert_allclose(scheduler.sigmas.numpy()[:-1], s, rtol=0, atol=1e-7)
        scheduler.sigmas = torch.from_numpy(np.append(s, 0))
        scheduler.set_begin_index(0)
        x = X
        for i, time in enumerate(scheduler.timesteps):
            x = scheduler.step(network(x, 1000 * s[i]), time, x).prev_sample
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(run_rows(UniPC(order, shift=shift), steps), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver_is_that_of_diffusers_from_pure_noise_on(steps: int) -> None:
    """Its formulas have limits at sigma = 1, where lambda is not finite: a second step of first order."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(steps)
    t = np.linspace(1, 1e-3, steps + 1)[:-1]
    scheduler.sigmas = torch.from_numpy(np.append(t, 0))
    scheduler.set_begin_index(0)
    x = X
    for i, time in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, 1000 * t[i]), time, x).prev_sample
    torch.testing.assert_close(run_rows(DPMSolverPP2M(), steps), x.double(), rtol=0, atol=1e-5)  # in float32


def velocity(x: Tensor, t: float, spread: float = 0.5) -> Tensor:
    """Of Gaussian data, whose deviation at t is sqrt((1 - t)^2 spread^2 + t^2)."""
    s = t / 1000
    variance = (1 - s) ** 2 * spread**2 + s**2
    return x * (s - (1 - s) * spread**2) / variance


@pytest.mark.parametrize(
    ("solver", "order"),
    [("ddim", 1), ("flow-euler:shift=3", 1), ("heun", 2), ("dpm++2m", 2), ("unipc", 2), ("unipc:order=3", 2)],
)
def test_solvers_go_where_the_ode_goes(solver: str, order: int) -> None:
    """From deviation 1 to that of the data, in proportion, whatever the network predicts of it. The last step, to 0, is
    of first order with all of them, so of the error of second order."""

    def run(steps: int, kind: str) -> Tensor:
        def told(x: Tensor, t: float) -> Tensor:
            alpha, sigma = FLOW.alpha_sigma(torch.tensor(t, dtype=torch.float64))
            px, pe = conversion("flow", kind, alpha, sigma)
            return px * x + pe * velocity(x, t)

        return run_rows(solver_from(solver), steps, told, kind)

    few, many = (float((run(steps, "flow") / (0.5 * X) - 1).abs().max()) for steps in (49, 199))
    assert many < (2e-2, 5e-4)[order - 1]
    assert few / many > 4**order / 2
    for kind in ("sample", "v_prediction"):
        torch.testing.assert_close(run(20, kind), run(20, "flow"), rtol=0, atol=1e-9)


def test_a_model_of_flow_is_sampled_by_what_it_predicts() -> None:
    """Ragged starts and steps, guided pairs and exits, in any company to the bit; the default solver is Euler's."""
    model = adadiff.Model(CONFIG).requires_grad_(False).eval()
    model.load_state_dict(served().state_dict())
    image = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = ExecutionOptions(batch_invariant=True)
    for solver in ("ddim", "flow-euler:shift=3", "heun:shift=3", "unipc:order=3", "dpm++2m"):
        given = {"solver": solver, "policy": "exit:0.45", "class_labels": 1, "guidance_scale": 2.0, "execution": exact}
        steps, strength = [5, 9, 1, 6], [1.0, 0.5, 1.0, 0.4]
        images, _ = sample(model, 4, steps=steps, init_image=image, strength=strength, batch=3, **given)
        assert images.isfinite().all()
        for i in range(4):
            own = {"steps": steps[i], "init_image": image[i], "strength": strength[i]}
            assert torch.equal(sample(model, 1, seed=i, **own, **given)[0][0], images[i])
    plain, euler = (sample(model, 2, steps=4, policy="full", **given)[0] for given in ({}, {"solver": "flow-euler"}))
    assert torch.equal(plain, euler)


def test_an_image_to_begin_from_is_noised_as_the_network_was_trained() -> None:
    model = adadiff.Model(CONFIG).requires_grad_(False).eval()
    seen = []

    def forward(_: object, x: Tensor, t: Tensor, *__: object, **___: object) -> ForwardOutput:
        seen.append((x.clone(), t.clone()))
        return ForwardOutput(torch.zeros_like(x), torch.ones(len(x), dtype=torch.int32), Costs(0, ((0, 0),)), (), 0)

    image = torch.full((1, 4, 4), 3.0)
    samples = SampleBatch.of(model, 1, steps=10, init_image=image, strength=0.4, seed=9, policy="full")
    batch = Batch(model, 1, forward=forward)
    (slot,) = batch.admit(samples, np.arange(1))
    batch.tick()
    (x, t), *_ = seen
    s = float(t) / 1000
    assert s == pytest.approx(1 - (1 - 1e-3) * 6 / 9, abs=1e-6)
    wanted = (1 - s) * image + s * initial_noise(torch.tensor([9]), (1, 4, 4))
    torch.testing.assert_close(x, wanted)
    torch.testing.assert_close(batch.predicted_x0(int(slot)), wanted[0])  # of a velocity of 0


def test_what_flow_has_not_is_refused() -> None:
    for solver in ("ddpm", "dpm-fast", "dpm++fast"):
        with pytest.raises(ValueError, match="schedule 'flow' has no alpha_bar, and this needs one; its solvers are"):
            solver_from(solver).table(FLOW, 4)
    with pytest.raises(ValueError, match="Euler-Maruyama integrates the SDE"):
        solver_from("euler-maruyama").table(FLOW, 4)
    for solver in ("ddim:0.5", "ddim:spacing=trailing"):
        with pytest.raises(ValueError, match="no eta, and no spacing but 'uniform'"):
            solver_from(solver).table(FLOW, 4)
    with pytest.raises(ValueError, match="flow-euler is for models of schedule 'flow'; with 'linear' use ddim"):
        FlowEuler().table(NoiseSchedule("linear"), 4)
    for solver in (Heun(shift=3.0), UniPC(shift=3.0), DPMSolverPP2M(shift=3.0)):
        with pytest.raises(ValueError, match="shift is for schedule 'flow', got 'linear'"):
            solver.table(NoiseSchedule("linear"), 4)
    for text in ("flow-euler:shift=0", "heun:shift=-1", "unipc:shift=nan", "dpm++2m:shift=inf"):
        with pytest.raises(ValueError, match="shift must be a number above 0"):
            solver_from(text)
    with pytest.raises(ValueError, match="refining needs alpha_bar, which schedule 'flow' does not have"):
        Refining(FlowEuler(), 0.5).table(FLOW, 4)
    with pytest.raises(ValueError, match="has spacings"):
        Heun("trailing").table(FLOW, 5)
    with pytest.raises(ValueError, match=r"times of schedule 'flow' are 0\.\.1000"):
        FLOW.alpha_sigma(torch.tensor([1000.5], dtype=torch.float64))
