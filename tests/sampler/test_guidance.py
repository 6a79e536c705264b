"""Guidance as each family does it, and a variance that the network predicts, against loops in float64."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from adadiff.config import PRESETS, ModelConfig
from adadiff.diffusion.noise import initial_noise, step_noise
from adadiff.engine.engine import Engine
from adadiff.forward.forward import forward, run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.model import Model
from adadiff.models.dit import DiTConfig
from adadiff.models.uvit import UViTConfig
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.sampling.sampler import sample
from adadiff.uem import PAPER
from sampler.tiny import SERVED, served

# four channels, as latents have; guidance touches three unless told otherwise
LATENT = ModelConfig(
    UViTConfig(image_size=4, channels=4, patch=2, dim=16, depth=4, heads=2, num_classes=4),
    "linear",
    null_label=3,
    exits=PAPER,
    guided_channels=3,
)
STEPS = 6


def eps_of(model: Model, x: Tensor, t: float, label: int) -> Tensor:
    """The full network's prediction for one lane, float64 [C, H, W]."""
    given = x[None].float(), torch.tensor([t]).float(), torch.tensor([label])
    return forward(model, *given, policy="full").prediction[0].double()


def grid(steps: int) -> tuple[list[float], list[float]]:
    """Trailing timesteps of the linear schedule, and alpha_bar there; it ends with 1."""
    beta = torch.tensor([1e-4 + k * (0.02 - 1e-4) / 999 for k in range(1000)], dtype=torch.float64)
    table = (1 - beta).cumprod(0).tolist()
    index = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    return [float(i) for i in index], [*(table[i] for i in index), 1.0]


def by_hand(
    model: Model, seed: int, label: int, scale: float, channels: int, interval: tuple[float, float]
) -> tuple[Tensor, list[bool]]:
    """DDIM: the image in float64, and at which steps there was guidance. scale: as in diffusers, 1 is none."""
    times, alpha_bar = grid(STEPS)
    x = initial_noise(torch.tensor([seed]), model.backbone.sample_shape)[0].double()
    guided = []
    for k, t in enumerate(times):
        eps = eps_of(model, x, t, label)
        guided.append(interval[0] <= t <= interval[1])
        if guided[-1]:
            uncond = eps_of(model, x, t, 3)
            for c in range(channels):
                eps[c] = uncond[c] + scale * (eps[c] - uncond[c])
        x0 = (x - math.sqrt(1 - alpha_bar[k]) * eps) / math.sqrt(alpha_bar[k])
        x = math.sqrt(alpha_bar[k + 1]) * x0 + math.sqrt(1 - alpha_bar[k + 1]) * eps
    return x, guided


def assert_close(image: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(image.double(), wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))


EVER = (-math.inf, math.inf)


def test_an_interval_between_two_steps_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """999 is a time of the network at these steps, 300 to 301 holds none."""
    given = {"steps": STEPS, "class_labels": 1, "guidance_scale": [2.0, 1.0]}
    sample(served(LATENT), 2, guidance_interval=(999, 999.25), **given)
    assert not caplog.messages
    for _ in range(2):
        sample(served(LATENT), 2, guidance_interval=(300, 301.25), **given)
    assert [text for text in caplog.messages if "contains none of the times of 6 steps" in text] == caplog.messages[:1]
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_guidance_by_hand(batch_invariant: bool) -> None:
    """Samples of one batch that guide other channels at other times, one of them nowhere, one not at all."""
    model = served(LATENT)
    channels = [3, 4, 1, 3, 2]
    intervals = [EVER, (200.0, 700.0), (999.0, 999.0), (300.0, 301.0), (0.0, 500.0)]  # 999 is a timestep, 300 is none
    scales, labels = [2.5, 1.7, 3.0, 2.0, 1.0], [0, 1, 2, 0, 1]
    images, report = sample(
        model,
        5,
        steps=STEPS,
        class_labels=labels,
        guidance_scale=scales,
        guidance_interval=torch.tensor(intervals),
        guided_channels=channels,
        batch=3,
        execution=ExecutionOptions(batch_invariant=batch_invariant),
    )
    for i in range(5):
        wanted, guided = by_hand(model, i, labels[i], scales[i], channels[i], intervals[i])
        assert_close(images[i], wanted)
        runs = [scales[i] != 1 and on for on in guided]
        assert (report.exit_layer[:, i, 1] > 0).tolist() == runs
    assert (report.exit_layer[:, :, 0] == model.num_layers).all()


def test_each_family_guides_what_it_was_published_with() -> None:
    """U-ViT all channels (eval_ldm_discrete.py), DiT the first three (models.py): config.guided_channels."""
    assert PRESETS["imagenet256_uvit_huge"].guided_channels is None
    settings = {"steps": 3, "class_labels": [1], "guidance_scale": 2.5}
    three = sample(served(LATENT), 1, **settings)[0]
    every = sample(served(replace(LATENT, guided_channels=None)), 1, **settings)[0]
    assert torch.equal(three, sample(served(LATENT), 1, guided_channels=3, **settings)[0])
    assert torch.equal(every, sample(served(LATENT), 1, guided_channels=4, **settings)[0])
    assert not torch.equal(three, every)


def lanes_of(call: Callable[[Callable[..., ForwardOutput]], object]) -> list[int]:
    """The lanes of every forward pass that `call` makes with the function it is given."""
    calls = []

    def counted(*args: object, **options: object) -> ForwardOutput:
        calls.append(len(args[1]))
        return run_forward(*args, **options)

    call(counted)
    return calls


@pytest.mark.parametrize("tied", [False, True])
def test_no_lane_is_run_for_guidance_that_is_not_there(tied: bool) -> None:
    """Three samples; the first is guided at 999 and 832, the second from 499 on, the third between two steps."""
    intervals = torch.tensor([[700.0, 1000.0], [-1.0, 499.0], [600.0, 610.0]])

    def run(counted: Callable[..., ForwardOutput]) -> None:
        batch = Batch(served(LATENT), 3, forward=counted)
        samples = SampleBatch.of(
            served(LATENT),
            3,
            steps=STEPS,
            class_labels=[0, 1, 2],
            guidance_scale=2.0,
            guidance_interval=intervals,
            tied=tied,
            policy="exit:0.5",
        )
        batch.admit(samples, np.arange(3))
        while batch.count:
            batch.take(batch.tick().done)

    times = grid(STEPS)[0]
    assert lanes_of(run) == [3 + (t >= 700) + (t <= 499) for t in times] == [4, 4, 3, 4, 4, 4]


def test_an_engine_takes_these_settings_by_request() -> None:
    model = served(LATENT)
    asked = [
        {"guidance_interval": (200.0, 900.0), "guided_channels": 2},
        {"guidance_interval": (-math.inf, 400.0)},
        {},
    ]
    with Engine(model, 5, threaded=False) as engine:
        handles = [
            engine.submit(seed=i, steps=STEPS, class_labels=i, guidance_scale=2.2, **own) for i, own in enumerate(asked)
        ]
    for i, (handle, own) in enumerate(zip(handles, asked, strict=True)):
        wanted, _ = by_hand(model, i, i, 2.2, own.get("guided_channels", 3), own.get("guidance_interval", EVER))
        assert_close(handle.result(0), wanted)


# ---- learned variance ----


def learned(t: Tensor) -> Tensor:
    """A variance for every lane that follows its time, [B, 1, 1, 1]."""
    return torch.sin(t / 100).view(-1, 1, 1, 1)


def with_variance(*args: object, **options: object) -> ForwardOutput:
    """As a network with 2C outputs: some lanes' variance is NaN, those of the null class, which nobody may read."""
    result = run_forward(*args, **options)
    variance = learned(args[2]).expand_as(result.prediction).clone()
    variance[args[3] == 3] = math.nan
    return replace(result, variance=variance)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("variance", [None, "small", "large"])
def test_ancestral_steps_take_the_variance_of_the_conditional_lane(variance: str | None, batch_invariant: bool) -> None:
    """Improved diffusion: ln of the variance is f ln beta + (1 - f) ln of the posterior's, f = (v + 1) / 2."""
    model, counts = served(LATENT), [3, 6, 5]  # at different times, so that lanes are put into another order
    solver = "ddpm" if variance is None else f"ddpm:variance={variance}"
    execution = ExecutionOptions(batch_invariant=batch_invariant)
    batch = Batch(model, 3, execution=execution, forward=with_variance)
    samples = SampleBatch.of(
        model,
        3,
        steps=counts,
        solver=solver,
        class_labels=[0, 1, 2],
        guidance_scale=[1.0, 2.5, 1.5],
        policy="exit:0.000001",
    )
    slots = batch.admit(samples, np.arange(3))
    for _ in range(max(counts)):
        tick = batch.tick()
        assert not tick.failed
    images = batch.take(slots)
    for i, scale in enumerate((1.0, 2.5, 1.5)):
        seed, (times, alpha_bar) = torch.tensor([i]), grid(counts[i])
        x = initial_noise(seed, model.backbone.sample_shape)[0].double()
        for k, t in enumerate(times):
            a, after = alpha_bar[k], alpha_bar[k + 1]
            eps, uncond = eps_of(model, x, t, i), eps_of(model, x, t, 3)
            eps[:3] = uncond[:3] + scale * (eps[:3] - uncond[:3])
            beta = 1 - a / after
            x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            mean = (math.sqrt(after) * beta * x0 + math.sqrt(1 - beta) * (1 - after) * x) / (1 - a)
            if after < 1:
                posterior = beta * (1 - after) / (1 - a)
                f = {"small": 0.0, "large": 1.0, None: (math.sin(t / 100) + 1) / 2}[variance]
                z = step_noise(seed, torch.tensor([k]), model.backbone.sample_shape)[0].double()
                mean = mean + math.sqrt(beta**f * posterior ** (1 - f)) * z
            x = mean
        assert_close(images[i], x)


def test_dit_is_sampled_as_published() -> None:
    """Both halves in one call, three channels guided, the rest and the variance of the first half, nine respaced
    steps (DiT, models.py and gaussian_diffusion.py)."""
    network = DiTConfig(image_size=4, channels=4, patch=2, dim=16, depth=3, heads=2, num_classes=4)
    model = served(ModelConfig(network, "linear", null_label=3, guided_channels=3))
    steps, scale, labels = 9, 2.5, torch.tensor([0, 2])
    settings = {"steps": steps, "solver": "ddpm:spacing=respaced", "class_labels": labels, "guidance_scale": scale}
    images, _ = sample(model, 2, **settings)

    beta = torch.tensor([1e-4 + k * (0.02 - 1e-4) / 999 for k in range(1000)], dtype=torch.float64)
    table, times = (1 - beta).cumprod(0), [round(k * 999 / 8) for k in range(9)]
    seeds = torch.arange(2)
    x = initial_noise(seeds, (4, 4, 4)).double()
    for i, k in enumerate(reversed(range(9))):
        t, a, after = times[k], float(table[times[k]]), float(table[times[k - 1]]) if k else 1.0
        halves = torch.cat([x, x]).float(), torch.full((4,), float(t)), torch.cat([labels, torch.tensor([3, 3])])
        out = model.backbone(*halves).double()
        three, rest = out[:, :3], out[:2, 3:]
        eps = torch.cat([three[2:] + scale * (three[:2] - three[2:]), rest[:, :1]], 1)
        own = 1 - a / after
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = (math.sqrt(after) * own * x0 + math.sqrt(1 - own) * (1 - after) * x) / (1 - a)
        if k:
            share = (rest[:, 1:] + 1) / 2
            logarithm = share * math.log(own) + (1 - share) * math.log(own * (1 - after) / (1 - a))
            z = step_noise(seeds, torch.full_like(seeds, i), (4, 4, 4)).double()
            x = x + torch.exp(logarithm / 2) * z
    for image, wanted in zip(images, x, strict=True):
        assert_close(image, wanted)


def test_deterministic_steps_do_not_read_it() -> None:
    def nan(*args: object, **options: object) -> ForwardOutput:
        result = run_forward(*args, **options)
        return replace(result, variance=torch.full_like(result.prediction, math.nan))

    images = []
    for call in (run_forward, nan):
        batch = Batch(served(LATENT), 2, forward=call)
        samples = SampleBatch.of(served(LATENT), 2, steps=3, solver="dpm++2m", class_labels=[0, 1])
        slots = batch.admit(samples, np.arange(2))
        for _ in range(3):
            batch.tick()
        images.append(batch.take(slots))
    assert torch.equal(*images)


# ---- singlestep solvers in the sampler ----


@pytest.mark.parametrize("solver", ["dpm-fast", "dpm++fast"])
def test_initial_images_begin_with_a_whole_step(solver: str) -> None:
    """Orders 3, 3, 2 at 8 evaluations: strength 0.5 asks for row 4, which lies within the step that begins at 3."""
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    settings = {"steps": 8, "solver": solver, "class_labels": [0, 1], "init_image": images}
    images, report = sample(served(), 2, strength=[0.5, 0.25], **settings)
    assert (report.exit_layer[:, :, 0] > 0).tolist() == [[False, False]] * 3 + [[True, False]] * 3 + [[True, True]] * 2
    same = sample(served(), 2, strength=[5 / 8, 2 / 8], **settings)[0]
    assert torch.equal(images, same)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (LATENT, {"guidance_interval": 3.0}, r"guidance_interval must be \(low, high\) or \[2, 2\], got shape \[\]"),
        (LATENT, {"guidance_interval": [1, 2, 3]}, r"or \[2, 2\], got shape \[3\]"),
        (LATENT, {"guidance_interval": (5, 4)}, "low <= high"),
        (LATENT, {"guidance_interval": (0, math.nan)}, "low <= high"),
        (LATENT, {"guidance_interval": "often"}, r"must be \(low, high\), got 'often'"),
        (LATENT, {"guided_channels": 0}, r"guided_channels must lie in 1\.\.4, got \[0\]"),
        (LATENT, {"guided_channels": [3, 5]}, r"guided_channels must lie in 1\.\.4"),
        (LATENT, {"guided_channels": 1.5}, "guided_channels must be whole numbers"),
        (SERVED, {"guided_channels": 3}, r"guided_channels must lie in 1\.\.1"),
        (SERVED, {"solver": "euler-maruyama"}, "Euler-Maruyama integrates the SDE"),
        (SERVED, {"solver": "ddpm:variance=learned"}, "variance must be"),
    ],
    ids=str,
)
def test_bad_input_is_named_before_any_work(config: ModelConfig, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(served(config), 2, class_labels=[0, 1], guidance_scale=2.0, **settings)


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match=r"guided_channels must lie in 1\.\.4, got 5"):
        replace(LATENT, guided_channels=5)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="latent_scale must be a positive number"):
            replace(LATENT, latent_scale=scale)
