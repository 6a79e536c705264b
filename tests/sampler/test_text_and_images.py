"""Samples that begin at an image or are told by text, against loops written again in float64."""

import math
from functools import cache

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from adadiff.config import ModelConfig
from adadiff.diffusion.noise import initial_noise
from adadiff.engine.engine import Engine
from adadiff.forward.options import ExecutionOptions
from adadiff.model import Model
from adadiff.models.uvit import UViTConfig
from adadiff.sampling.sampler import sample
from adadiff.uem import PAPER
from sampler.tiny import SERVED, Inputs, plain_layers, plain_predictions, plain_uncertainties, served

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

EXACT = ExecutionOptions(batch_invariant=True)
SHAPE = (1, 4, 4)
TEXT = ModelConfig(UViTConfig(4, 1, 2, 16, 4, 2, context_tokens=3, context_dim=5), "stable_diffusion", exits=PAPER)


@cache
def schedule(name: str, steps: int) -> tuple[list[float], list[float]]:
    """Times the network is told and alpha_bar there, noisiest first; alpha_bar ends with 1."""
    if name == "vp":
        times = [1 - k * (1 - 1e-3) / (steps - 1) for k in range(steps)] if steps > 1 else [1.0]
        return [999 * t for t in times], [*(math.exp(-0.1 * t - 9.95 * t * t) for t in times), 1.0]
    low, high, power = (1e-4, 0.02, 1) if name == "linear" else (0.00085**0.5, 0.012**0.5, 2)
    betas = [(low + k * (high - low) / 999) ** power for k in range(1000)]
    alpha_bar = torch.tensor([1 - beta for beta in betas], dtype=torch.float64).cumprod(0).tolist()
    index = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    first = 0 if name == "linear" else 1
    return [float(i + first) for i in index], [*(alpha_bar[i] for i in index), 1.0]


def lane(model: Model, t: float, x: Tensor, context: Tensor | None, threshold: float | None) -> tuple[Tensor, int]:
    """Prediction [C, H, W] in float64 and exit layer of one lane, by plain modules."""
    given = Inputs(x[None].float(), torch.tensor([t]).float(), context if context is None else context[None])
    rows = plain_layers(model.backbone, given)
    layer = len(rows)
    if threshold is not None:
        u = plain_uncertainties(model.backbone, model.exits, given, rows)[:-1, 0].tolist()
        layer = next((k for k, value in enumerate(u, start=1) if value < threshold), layer)
    return plain_predictions(model.backbone, model.exits, given, rows)[layer - 1, 0].double(), layer


def by_hand(
    model: Model,
    seed: int,
    steps: int,
    run: int,
    start: Tensor | None = None,
    context: Tensor | None = None,
    null: Tensor | None = None,
    scale: float = 1.0,
    threshold: float | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """DDIM over the last `run` of the steps: the image in float64, and the exit layers of its lanes at every step."""
    times, alpha_bar = schedule(model.config.schedule, steps)
    x = initial_noise(torch.tensor([seed]), SHAPE)[0].double()
    trace = [[0, 0] for _ in range(steps)]
    if start is not None:
        a = alpha_bar[steps - run]
        x = math.sqrt(a) * start.double() + math.sqrt(1 - a) * x
    for k in range(steps - run, steps):
        eps, trace[k][0] = lane(model, times[k], x, context, threshold)
        if scale != 1:
            uncond, trace[k][1] = lane(model, times[k], x, null, threshold)
            eps = uncond + scale * (eps - uncond)
        x0 = (x - math.sqrt(1 - alpha_bar[k]) * eps) / math.sqrt(alpha_bar[k])
        x = math.sqrt(alpha_bar[k + 1]) * x0 + math.sqrt(1 - alpha_bar[k + 1]) * eps
    return x, trace


def assert_close(image: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(image.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def with_schedule(name: str) -> Model:
    return served(ModelConfig(SERVED.network, name, null_label=3, exits=PAPER))


def starts(n: int) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["linear", "stable_diffusion", "vp"])
def test_start_images_by_hand(name: str) -> None:
    """Steps kept are those of diffusers, int(steps * strength), but one at least; 0.3 is a little more in float32."""
    model, steps = with_schedule(name), [5, 10, 5, 4, 3]
    strengths, kept = [0.8, 0.3, 0.5, 1.0, 1e-6], [4, 3, 2, 4, 1]
    labels, scales, thresholds = [0, 1, 2, 0, 1], [1.0, 2.5, 1.0, 1.5, 1.0], [0.3, 0.45, 0.5, 0.4, 0.6]
    given = {"steps": steps, "class_labels": labels, "guidance_scale": scales, "thresholds": thresholds}
    images, report = sample(model, 5, policy="exit:0.5", batch=2, init_image=starts(5), strength=strengths, **given)
    for i in range(5):
        image, trace = by_hand(
            model,
            i,
            steps[i],
            kept[i],
            starts(5)[i],
            torch.tensor(labels[i]),
            torch.tensor(3),
            scales[i],
            thresholds[i],
        )
        assert report.exit_layer[: steps[i], i].tolist() == trace
        assert_close(images[i], image)
    assert len(report.exit_layer.unique()) > 3


def test_strength_is_four_fifths_unless_given() -> None:
    settings = {"steps": 10, "class_labels": [0, 1], "init_image": starts(2)}
    usual, report = sample(served(), 2, **settings)
    assert (report.exit_layer[:, :, 0] > 0).sum(0).tolist() == [8, 8]
    assert torch.equal(usual, sample(served(), 2, strength=0.8, **settings)[0])
    assert not torch.equal(usual, sample(served(), 2, strength=0.7, **settings)[0])


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.75, 0.25, 0.125])
def test_a_multistep_solver_begins_at_a_start_image_as_that_of_diffusers(strength: float) -> None:
    """There is no earlier prediction yet: the first step is of first order, wherever it lies."""
    count = 8
    image, _ = sample(
        served(), 1, steps=count, solver="dpm++2m", class_labels=[1], seed=[4], init_image=starts(1), strength=strength
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(count)
    first = count - int(count * strength)
    scheduler.set_begin_index(first)
    times = scheduler.timesteps[first:]
    x = scheduler.add_noise(starts(1), initial_noise(torch.tensor([4]), SHAPE), times[:1])
    for t in times.tolist():
        eps, _ = lane(served(), float(t), x[0], torch.tensor(1), None)
        x = scheduler.step(eps[None].float(), t, x).prev_sample
    torch.testing.assert_close(image, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


def contexts(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 4])
def test_text_with_guidance_by_hand(batch: int) -> None:
    model, null = served(TEXT), contexts(1, seed=9)[0]
    steps, scales, thresholds = [3, 4, 2, 5], [1.0, 3.0, 1.7, 1.0], [0.4, 0.5, 0.45, 0.55]
    images, report = sample(
        model,
        4,
        steps=steps,
        policy="exit:0.5",
        thresholds=thresholds,
        guidance_scale=scales,
        text_embeds=contexts(4),
        null_text_embeds=null,
        batch=batch,
    )
    for i in range(4):
        image, trace = by_hand(
            model,
            i,
            steps[i],
            steps[i],
            context=contexts(4)[i],
            null=null,
            scale=scales[i],
            threshold=thresholds[i],
        )
        assert report.exit_layer[: steps[i], i].tolist() == trace
        assert_close(images[i], image)


def test_requests_bring_their_own_text_and_empty_prompt() -> None:
    """Each guided request has an empty prompt of its own, and those without guidance need none."""
    model, prompts = served(TEXT), contexts(4)
    nulls, scales = [contexts(1, seed=7)[0], None, contexts(1, seed=8)[0], None], [2.5, 1.0, 3.0, 1.0]
    with Engine(model, 3, threaded=False) as engine:
        handles = [
            engine.submit(
                seed=i,
                steps=2 + i,
                text_embeds=prompts[i],
                null_text_embeds=nulls[i],
                guidance_scale=scales[i],
                init_image=starts(4)[i],
            )
            for i in range(4)
        ]
    for i, handle in enumerate(handles):
        kept = int((2 + i) * 0.8)
        image, trace = by_hand(model, i, 2 + i, kept, starts(4)[i], prompts[i], nulls[i], scales[i])
        assert handle.report.exit_layer[:, 0].tolist() == trace[-kept:]
        assert_close(handle.result(0), image)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", ["mine", "theirs"])
def test_what_dtype_mates_bring_does_not_matter(dtype: torch.dtype, first: str) -> None:
    model, mine, theirs = served(TEXT), contexts(1)[0], contexts(1, seed=1)[0].to(dtype)
    plain = sample(model, 1, steps=2, text_embeds=mine[None], execution=EXACT)[0][0]
    with Engine(model, 2, threaded=False, execution=EXACT) as engine:
        order = [mine, theirs] if first == "mine" else [theirs, mine]
        handles = [engine.submit(seed=0, steps=2, text_embeds=context) for context in order]
    assert torch.equal(handles[order.index(mine) if first == "mine" else 1].result(0), plain)


def test_tensors_may_require_grad_and_be_used_again() -> None:
    """A request takes copies; autograd stays with the caller."""
    model, prompt, null, start = served(TEXT), contexts(1)[0], contexts(1, seed=2)[0], starts(1)[0]
    settings = {"seed": 3, "steps": 4, "guidance_scale": 2.0}
    with Engine(model, 4, threaded=False, execution=EXACT) as engine:
        plain = engine.submit(text_embeds=prompt, null_text_embeds=null, init_image=start, **settings)
    mine = [value.clone().requires_grad_() for value in (prompt, null, start)]
    with Engine(model, 4, threaded=False, execution=EXACT) as engine:
        handle = engine.submit(text_embeds=mine[0], null_text_embeds=mine[1], init_image=mine[2], **settings)
        mate = engine.submit(seed=4, steps=2, text_embeds=prompt)
        with torch.no_grad():
            for value in mine:
                value.zero_()
    assert torch.equal(handle.result(0), plain.result(0))
    assert not handle.result(0).requires_grad
    assert mate.result(0).isfinite().all()
