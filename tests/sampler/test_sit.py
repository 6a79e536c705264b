"""SiT: the network of DiT, told another time, its velocity, and its samplers, against its formulas."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.config import PRESETS, ModelConfig
from adadiff.conversion.convert import convert
from adadiff.diffusion.flow import FlowEuler, FlowSDE
from adadiff.diffusion.noise import step_noise
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.tables import SolverTable
from adadiff.models.dit import DiT, DiTConfig
from adadiff.uem import PAPER
from adadiff_kernels import COLUMNS
from sampler.tiny import scramble

SIT = DiTConfig(6, 3, 2, dim=36, depth=3, heads=3, num_classes=5, learned_variance=False, sit_time=True)


def theirs(state: dict[str, Tensor], x: Tensor, s: Tensor, labels: Tensor) -> Tensor:
    """The velocity of the authors' SiT at time s, from 0, noise, to 1, data: a DiT that is given s and whose second
    half of the outputs is dropped (models.py, forward)."""
    config = DiTConfig(6, 3, 2, dim=36, depth=3, heads=3, num_classes=5)
    network = DiT(config)
    network.load_state_dict(state)
    with torch.no_grad():
        return network(x, s, labels)[:, :3]


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PRESETS, "tiny_sit", ModelConfig(SIT, "flow", null_label=4, prediction_type="flow"))
    return "tiny_sit"


def checkpoint(path: Path, **settings: object) -> dict[str, Tensor]:
    network = DiT(DiTConfig(6, 3, 2, dim=36, depth=3, heads=3, num_classes=5))
    scramble(network, 0.2, seed=9)
    torch.save({"ema": network.state_dict(), **({"args": settings} if settings else {})}, path)
    return network.state_dict()


def test_their_velocity_with_the_other_sign_at_the_other_time(preset: str, tmp_path: Path) -> None:
    state = checkpoint(tmp_path / "sit.pt", model="SiT-XL/2", path_type="Linear", prediction="velocity")
    found = convert(tmp_path / "sit.pt", tmp_path / "sit.safetensors", preset)
    assert found.layout == "sit"
    model = adadiff.load(tmp_path / "sit.safetensors")
    assert model.config.prediction_type == "flow"
    x, s, labels = torch.randn(4, 3, 6, 6), torch.tensor([0.0, 0.25, 0.8, 1.0]), torch.arange(4)
    with torch.no_grad():
        ours = model.backbone(x, 1000 * (1 - s), labels)
    torch.testing.assert_close(ours, -theirs(state, x, s, labels), rtol=1e-4, atol=1e-5)


def test_a_dit_is_no_sit(preset: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "a.pt", model="SiT-S/2", path_type="GVP")
    with pytest.raises(ValueError, match="path_type is 'GVP', but only the linear path of SiT is supported"):
        convert(tmp_path / "a.pt", tmp_path / "a.safetensors", preset)
    checkpoint(tmp_path / "b.pt", prediction="noise")
    with pytest.raises(ValueError, match="networks of this configuration predict the velocity"):
        convert(tmp_path / "b.pt", tmp_path / "b.safetensors", preset)


def walk(table: SolverTable, velocity: Callable, x: Tensor, seeds: Tensor) -> Tensor:
    """Along rows of a table without history, in float64, with the noise of our samplers."""
    for step, row in enumerate(table.coefficients):
        c = dict(zip(COLUMNS, row.tolist(), strict=True))
        assert (c["px"], c["pe"]) == (0, 1)
        noise = step_noise(seeds, torch.full_like(seeds, step), x.shape[1:]).double()
        x = c["base"] * x + c["cur"] * velocity(x, table.t[step]) + c["noise"] * noise
    return x


def field(x: Tensor, s: Tensor) -> Tensor:
    """A velocity from noise to data that is no straight line."""
    return torch.sin(x + 2 * s) - 0.3 * x * s


@pytest.mark.parametrize("steps", [2, 3, 7, 50])
@pytest.mark.parametrize("norm", [1.0, 0.4])
def test_the_sde_sampler_of_the_authors(steps: int, norm: float) -> None:
    """transport/integrators.py and transport.py: Euler-Maruyama on linspace(0, 1 - last, steps), diffusion norm *
    sigma, and a last step of the mean alone. The noise is ours."""
    solver = FlowSDE(norm=norm)
    x, seeds = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.arange(3)
    found = walk(solver.table(NoiseSchedule("flow"), steps), lambda x, t: -field(x, 1 - t / 1000), x, seeds)
    grid = torch.linspace(0, 1 - 0.04, steps, dtype=torch.float64)

    def drift(x: Tensor, s: Tensor) -> Tensor:
        v = field(x, s)
        score = (s * v - x) / (1 - s)  # get_score_from_velocity of a linear path
        return v + norm * (1 - s) * score

    for step, s in enumerate(grid[:-1]):
        h = grid[step + 1] - s
        dw = step_noise(seeds, torch.full_like(seeds, step), x.shape[1:]).double() * math.sqrt(h)
        x = x + drift(x, s) * h + math.sqrt(2 * norm * (1 - s)) * dw
    x = x + drift(x, grid[-1]) * 0.04
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_without_diffusion_it_is_the_ode() -> None:
    """To the order of the step: both go where the velocity leads."""
    x, seeds = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.arange(2)
    velocity = lambda x, t: -field(x, 1 - t / 1000)  # noqa: E731
    schedule = NoiseSchedule("flow")
    sde = walk(FlowSDE(norm=0.0).table(schedule, 1000), velocity, x, seeds)
    ode = walk(FlowEuler().table(schedule, 1000), velocity, x, seeds)
    assert float((sde - ode).abs().max()) < 0.02 * float((ode - x).abs().max())


def test_bad_input() -> None:
    for settings, said in (
        ({"norm": -1.0}, "norm must be"),
        ({"last": 1.0}, "last must lie"),
        ({"last": 0}, "last must"),
    ):
        with pytest.raises(ValueError, match=said):
            FlowSDE(**settings)
    with pytest.raises(ValueError, match="for models of schedule 'flow'"):
        FlowSDE().table(NoiseSchedule("linear"), 10)
    with pytest.raises(ValueError, match="from 2 to 1000"):
        FlowSDE().table(NoiseSchedule("flow"), 1)


def test_a_sit_with_exits_draws() -> None:
    model = adadiff.Model(ModelConfig(SIT, "flow", null_label=4, exits=PAPER, prediction_type="flow")).eval()
    scramble(model, 0.1)
    for solver in ("flow-euler", "flow-sde", "heun", "unipc"):
        images, report = adadiff.sample(
            model, 3, steps=5, solver=solver, policy="exit:depth=2", class_labels=1, guidance_scale=2.0
        )
        assert bool(torch.isfinite(images).all())
        assert set(report.exit_layer[..., 0].unique().tolist()) == {2}


def test_reuse_after_an_initial_image_needs_a_solver_s_steps_not_what_is_left_of_them() -> None:
    """Flow-SDE has no schedule of a single step."""
    model = adadiff.Model(ModelConfig(SIT, "flow", null_label=4, exits=PAPER, prediction_type="flow")).eval()
    image = torch.zeros(1, *model.backbone.sample_shape)
    given = {"steps": 4, "solver": "flow-sde", "class_labels": 1, "init_image": image, "strength": 0.3}
    images, _ = adadiff.sample(model, 1, policy="reuse:every=2", **given)
    assert torch.equal(images, adadiff.sample(model, 1, **given)[0])


def test_presets_at_their_published_sizes() -> None:
    """The paper's table: SiT-S 33, B 130, L 458, XL 675 million."""
    for name, millions in {"sit_s_2_256": 33, "sit_b_2_256": 130, "sit_l_2_256": 458, "sit_xl_2_256": 675}.items():
        with torch.device("meta"):
            weights = sum(p.numel() for p in DiT(PRESETS[name].network).parameters())
        assert weights / 1e6 == pytest.approx(millions, abs=1)
