"""What a network predicts: one place tells it as something else, and sampling, training and calibration go by it."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from torch import Tensor

import adadiff
from adadiff.calibration import recording
from adadiff.checkpoint import load, save
from adadiff.config import ModelConfig
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.prediction import (
    PREDICTION_TYPES,
    conversion,
    predicted_noise,
    predicted_sample,
    target_of,
)
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.solvers import solver_from
from adadiff.diffusion.tables import TableSet, converted
from adadiff.forward.forward import run_forward
from adadiff.forward.output import ForwardOutput
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.sampling.sampler import sample
from adadiff.training.config import TrainConfig
from adadiff.training.losses import VarianceLoss
from adadiff.training.progressive import predict_eps
from adadiff.training.trainer import Trainer
from adadiff_kernels import SolverState, StepRows, solver_step_reference
from sampler.tiny import SERVED, served

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

LINEAR = NoiseSchedule("linear")
TOLD = [kind for kind in PREDICTION_TYPES if kind != "epsilon"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the formulas ----


def by_name(kind: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The papers' definitions."""
    if kind == "v_prediction":
        return alpha * eps - sigma * x0
    return {"epsilon": eps, "sample": x0, "flow": eps - x0}[kind]


@pytest.mark.parametrize("schedule", ["linear", "vp", "flow"])
@pytest.mark.parametrize("wanted", PREDICTION_TYPES)
@pytest.mark.parametrize("given", PREDICTION_TYPES)
def test_every_prediction_tells_every_other(given: str, wanted: str, schedule: str) -> None:
    t = torch.tensor([3.0, 250.5, 700.0, 996.0], dtype=torch.float64)  # near both ends, where something vanishes
    alpha, sigma = (value[:, None] for value in NoiseSchedule(schedule).alpha_sigma(t))
    x0, eps = normal(4, 7), normal(4, 7, seed=1)
    x, prediction = alpha * x0 + sigma * eps, by_name(given, x0, eps, alpha, sigma)
    px, pe = conversion(given, wanted, alpha, sigma)
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(px * x + pe * prediction, by_name(wanted, x0, eps, alpha, sigma), **close)
    torch.testing.assert_close(predicted_sample(given, prediction, x, alpha, sigma), x0, **close)
    torch.testing.assert_close(predicted_noise(given, prediction, x, alpha, sigma), eps, **close)
    torch.testing.assert_close(target_of(given, x0, eps, alpha, sigma), prediction, **close)


def test_what_is_told_as_itself_keeps_its_bits() -> None:
    """And noise as x0 is (x - sigma eps) / alpha to the bit, as it was before there was anything else."""
    alpha, sigma = LINEAR.alpha_sigma(torch.arange(1000, dtype=torch.float64))
    for kind in ("epsilon", "sample"):
        px, pe = conversion(kind, kind, alpha, sigma)
        assert not px.any()
        assert (pe == 1).all()
    px, pe = conversion("epsilon", "sample", alpha, sigma)
    assert torch.equal(px, 1 / alpha)
    assert torch.equal(pe, -sigma / alpha)
    x, eps = normal(1000), normal(1000, seed=1)
    assert torch.equal(predicted_sample("epsilon", eps, x, alpha, sigma), (x - sigma * eps) / alpha)
    assert target_of("epsilon", x, eps, alpha, sigma) is eps


def test_flow_is_told_at_pure_noise_and_noise_is_not() -> None:
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for kind in TOLD:
        assert all(value.isfinite().all() for value in conversion(kind, "flow", none, one))
    assert not conversion("epsilon", "flow", none, one)[0].isfinite().any()


# ---- tables ----


def network(x: Tensor, t: float) -> Tensor:
    """A nonlinear stand-in for eps(x, t)."""
    return torch.tanh(x) * (0.3 + 0.7 * t / 1000) + 0.1 * math.sin(t / 50)


def as_told(kind: str, x: Tensor, t: float) -> Tensor:
    """The same network, which predicts something else."""
    alpha, sigma = LINEAR.alpha_sigma(torch.tensor(t, dtype=torch.float64))
    eps = network(x, t)
    return by_name(kind, (x - sigma * eps) / alpha, eps, alpha, sigma)


def run_rows(solver: str, steps: int, kind: str) -> Tensor:
    table = converted(solver_from(solver).table(LINEAR, steps), LINEAR, kind)
    state = SolverState.start(initial_noise(torch.tensor([3]), (2, 3)).double())
    for i in range(steps):
        one = slice(i, i + 1)
        rows = StepRows(table.coefficients[one], table.push[one], table.end[one])
        z = normal(1, 2, 3, seed=i)
        state = solver_step_reference(state, as_told(kind, state.x, float(table.t[i])), rows, z=z)
    return state.x


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize("solver", ["ddim", "ddim:0.6", "ddpm", "dpm++2m", "unipc:order=3", "heun", "dpm++fast"])
def test_a_network_that_predicts_something_else_goes_the_same_way(solver: str, kind: str) -> None:
    for steps in (1, 2, 3, 7, 20):
        wanted = run_rows(solver, steps, "epsilon")
        atol = 1e-10 * float(wanted.abs().max())
        torch.testing.assert_close(run_rows(solver, steps, kind), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_it_is_what_diffusers_makes_of_it(kind: str) -> None:
    given = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": kind}
    theirs = {
        "ddim": DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **given),
        "unipc": UniPCMultistepScheduler(**given),
    }
    for solver, scheduler in theirs.items():
        scheduler.set_timesteps(10)
        x = initial_noise(torch.tensor([3]), (2, 3)).double()
        for t in scheduler.timesteps:
            x = scheduler.step(as_told(kind, x, float(t)), t, x).prev_sample
        error = (run_rows(solver, 10, kind) - x).abs().max() / x.abs().max()
        assert float(error) < 1e-4, solver  # their sigmas are float32


# ---- sampling ----


def telling(kind: str, calls: list | None = None) -> Callable[..., ForwardOutput]:
    """`run_forward` of a network of noise, told as a prediction of `kind`, variance and exits as they are."""

    def forward(model: adadiff.Model, x: Tensor, t: Tensor, *given: object, **options: object) -> ForwardOutput:
        output = run_forward(model, x, t, *given, **options)
        alpha, sigma = model.schedule.alpha_sigma(t.double())
        px, pe = (value.view(-1, 1, 1, 1) for value in conversion("epsilon", kind, alpha, sigma))
        return dataclasses.replace(output, prediction=(px * x + pe * output.prediction).float())

    return forward


def drawn(kind: str, **settings: object) -> tuple[Tensor, Tensor]:
    """Images, and what was seen of each on the way."""
    model = adadiff.Model(dataclasses.replace(SERVED, prediction_type=kind)).requires_grad_(False).eval()
    model.load_state_dict(served().state_dict())
    batch = Batch(model, 3, forward=telling(kind))
    slots = batch.admit(SampleBatch.of(model, 3, **settings), np.arange(3))
    images, seen = torch.zeros(3, 1, 4, 4), []
    while batch.count:
        tick = batch.tick()
        assert not tick.failed
        seen += [batch.predicted_x0(int(slot)) for slot in tick.slots]
        images[[slots.tolist().index(slot) for slot in tick.done]] = batch.take(tick.done)
    return images, torch.stack(seen)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "unipc:order=3", "heun"])
def test_guidance_exits_starts_and_previews_are_the_same_whatever_is_predicted(solver: str) -> None:
    given = {"solver": solver, "steps": [5, 3, 6], "class_labels": [0, 1, 2], "guidance_scale": [1.0, 2.5, 3.0]}
    given |= {"policy": "exit:0.45", "init_image": torch.zeros(1, 4, 4), "strength": [1.0, 1.0, 0.6]}
    images, seen = drawn("epsilon", **given)
    for kind in TOLD:
        own, also = drawn(kind, **given)
        torch.testing.assert_close(own, images, rtol=0, atol=1e-3 * float(images.abs().max()))
        torch.testing.assert_close(also, seen, rtol=0, atol=1e-3 * float(seen.abs().max()))


def test_tables_of_a_set_are_those_of_its_network() -> None:
    for kind, px, pe in (("epsilon", False, True), ("v_prediction", True, False)):
        tables = TableSet(LINEAR, prediction_type=kind)
        tables.add(solver_from("ddim"), np.array([5]))
        coefficients = tables.packed.coefficients
        assert bool((coefficients[:, 0] != 0).all()) is px
        assert bool((coefficients[:, 1] == 1).all()) is pe


# ---- models, training, calibration ----


def test_a_model_says_what_it_predicts_unless_it_is_noise(tmp_path) -> None:
    assert "prediction_type" not in SERVED.to_dict()
    config = dataclasses.replace(SERVED, prediction_type="v_prediction")
    assert ModelConfig.from_dict(config.to_dict()) == config
    save(adadiff.Model(config), tmp_path / "v.safetensors")
    assert load(tmp_path / "v.safetensors").config.prediction_type == "v_prediction"
    for wrong in ("eps", "v", None, 1):
        with pytest.raises(ValueError, match="prediction_type must be one of epsilon, v_prediction, flow, sample"):
            dataclasses.replace(SERVED, prediction_type=wrong)
    with pytest.raises(ValueError, match="epsilon does not determine the image; prediction_type must be flow"):
        dataclasses.replace(SERVED, schedule="flow")
    with pytest.raises(ValueError, match="prediction type v_prediction instead of epsilon"):
        sample(served(), 1, steps=2, policy="full", shallow_model=adadiff.Model(config))


def test_training_asks_for_what_the_network_predicts(tmp_path) -> None:
    """The same noisy images at the same times, and x0 and noise told by the target."""
    sizes = {"dim": 16, "depth": 2, "heads": 2}
    inputs = {}
    for kind, schedule in (*((kind, "") for kind in PREDICTION_TYPES), ("flow", "flow")):
        name = f"{kind}{schedule}"
        config = TrainConfig(network=sizes, steps=2, batch=6, prediction_type=kind, schedule=schedule)
        trainer = Trainer(config, tmp_path / name)
        inputs[name] = trainer.inputs(0)
        x, t, _, target = inputs[name]
        assert trainer.model.config.prediction_type == kind
        alpha, sigma = (value.float().view(-1, 1, 1, 1) for value in trainer.model.schedule.alpha_sigma(t.double()))
        x0 = predicted_sample(kind, target, x, alpha, sigma)
        noise = predicted_noise(kind, target, x, alpha, sigma)
        torch.testing.assert_close(alpha * x0 + sigma * noise, x, rtol=0, atol=1e-4)
        if kind == "epsilon":
            wanted = target
        torch.testing.assert_close(noise, wanted, rtol=0, atol=2e-2)  # sigma is 0.01 at the last times
        if not schedule:
            assert torch.equal(x, inputs["epsilon"][0])
    assert 0 <= float(inputs["flowflow"][1].min()) < float(inputs["flowflow"][1].max()) < 1000


def test_a_learned_variance_weighs_errors_of_noise_whatever_is_predicted() -> None:
    t, eps, noise = torch.tensor([0.0, 40.0, 700.0]), normal(3, 1, 2, 2).float(), normal(3, 1, 2, 2, seed=1).float()
    x0 = normal(3, 1, 2, 2, seed=2).float()
    v = [normal(3, 1, 2, 2, seed=k).float() for k in (3, 4)]
    wanted = VarianceLoss(LINEAR)(v, eps, noise, t)
    alpha, sigma = (value.float().view(-1, 1, 1, 1) for value in LINEAR.alpha_sigma(t.double()))
    x = alpha * x0 + sigma * noise
    px, pe = conversion("epsilon", "v_prediction", alpha, sigma)
    target = target_of("v_prediction", x0, noise, alpha, sigma)
    found = VarianceLoss(LINEAR, "v_prediction")(v, px * x + pe * eps, target, t)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="discrete timesteps, which schedule 'flow' does not have"):
        VarianceLoss(NoiseSchedule("flow"), "flow")


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_calibration_and_distillation_go_by_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of a network that is always right are 0, as it tells it; a student is taught noise."""
    model = SimpleNamespace(schedule=LINEAR, config=SimpleNamespace(prediction_type=kind), backbone=None, exits=None)
    images = normal(5, 1, 4, 4).float()

    def right(_: object, __: object, x: Tensor, t: Tensor, ___: object) -> recording.Watched:
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in LINEAR.alpha_sigma(t.double()))
        told = by_name(kind, images.double(), (x - alpha * images) / sigma, alpha, sigma).float()
        return recording.Watched([told, told], torch.zeros(1, 5), torch.zeros(1, 5), [])

    monkeypatch.setattr(recording, "watch", right)
    _, errors = recording.noised_errors(model, images, None, [10.0, 700.0])
    assert float(errors.max()) < 1e-6

    alpha, sigma = (value.view(-1, 1, 1, 1) for value in LINEAR.alpha_sigma(torch.full((5,), 400.0).double()))
    eps = normal(5, 1, 4, 4, seed=1)
    x = (alpha * images + sigma * eps).float()
    told = by_name(kind, images.double(), eps, alpha, sigma).float()
    off = told + 0.5
    found = recording._feature_errors(lambda image: image.flatten(1), model, x, torch.full((5,), 400.0), [off, told])
    shift = (predicted_sample(kind, off, x, alpha, sigma).clamp(-1, 1) - images.clamp(-1, 1)).square()
    torch.testing.assert_close(found[0], shift.flatten(1).mean(1).float(), rtol=1e-3, atol=1e-5)

    model.backbone = lambda *_: torch.cat([told, told], 1)  # and a variance, which is left out
    torch.testing.assert_close(predict_eps(model, x, torch.full((5,), 400.0), None), eps.float(), rtol=0, atol=1e-4)
