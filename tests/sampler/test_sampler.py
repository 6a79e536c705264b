"""The sampling loop against loops written again for one sample, and its promises about batches, reports and input."""

import math
from functools import cache

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from adadiff.config import ModelConfig
from adadiff.diffusion.noise import initial_noise, step_noise
from adadiff.diffusion.solvers import DDIM, DPMSolverPP2M
from adadiff.forward.forward import run_forward
from adadiff.forward.output import ForwardOutput
from adadiff.model import Model
from adadiff.policies.exits import Depth, Replay, Threshold
from adadiff.sampling.sampler import SamplerRun, sample
from adadiff.uem import PAPER
from sampler.tiny import UVIT, Inputs, plain_layers, plain_predictions, plain_uncertainties, scramble

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

CONFIG = ModelConfig(UVIT, "linear", null_label=4, exits=PAPER)
SHAPE = (3, 8, 8)
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


@cache
def model(config: ModelConfig = CONFIG) -> Model:
    made = Model(config).requires_grad_(False).eval()
    scramble(made.backbone, 0.15, seed=1)
    if made.exits is not None:
        scramble(made.exits, 0.15, seed=2)
    return made


def lane(t: int, x: Tensor, label: int, threshold: float | None) -> tuple[Tensor, int]:
    """Prediction [C, H, W] and exit layer of one lane, by plain modules."""
    backbone, exits = model().backbone, model().exits
    given = Inputs(x[None].float(), torch.tensor([float(t)]), torch.tensor([label]))
    rows = plain_layers(backbone, given)
    layer = len(rows)
    if threshold is not None:
        u = plain_uncertainties(backbone, exits, given, rows)[:-1, 0]
        layer = next((k for k, value in enumerate(u.tolist(), start=1) if value < threshold), layer)
    return plain_predictions(backbone, exits, given, rows)[layer - 1, 0].double(), layer


def by_hand(
    seed: int, steps: int, label: int = 4, scale: float = 1.0, threshold: float | None = None, solver: str = "ddim"
) -> tuple[Tensor, list[list[int]]]:
    """One sample: image [C, H, W] and the exit layers of its lanes at each step (0: no such lane)."""
    x = initial_noise(torch.tensor([seed]), SHAPE)[0].double()
    times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    trace = []
    for k, t in enumerate(times):
        eps, depth = lane(t, x, label, threshold)
        depths = [depth, 0]
        if scale != 1:
            uncond, depths[1] = lane(t, x, 4, threshold)
            eps = uncond + scale * (eps - uncond)
        trace.append(depths)
        a = ALPHA_BAR[t]
        after = ALPHA_BAR[times[k + 1]] if k + 1 < steps else torch.ones((), dtype=torch.float64)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        if solver == "ddim":
            x = after.sqrt() * x0 + (1 - after).sqrt() * eps
        else:  # the posterior of Ho et al. 2020, equations 6 and 7
            beta = 1 - a / after
            mean = after.sqrt() * beta / (1 - a) * x0 + (a / after).sqrt() * (1 - after) / (1 - a) * x
            z = step_noise(torch.tensor([seed]), torch.tensor([k]), SHAPE)[0]
            x = mean + (beta * (1 - after) / (1 - a)).sqrt() * z
    return x, trace


SEEDS, STEPS, LABELS = [7, 0, 2**62, 5, 6], [3, 5, 1, 2, 4], [0, 3, 1, 2, 0]
SCALES = [1.0, 1.8, 1.0, 3.0, 1.4]


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("batch", [2, 64])
def test_full_network_by_hand(solver: str, batch: int) -> None:
    images, report = sample(
        model(), 5, steps=STEPS, solver=solver, seed=SEEDS, class_labels=LABELS, guidance_scale=SCALES, batch=batch
    )
    for i, (seed, steps, label, scale) in enumerate(zip(SEEDS, STEPS, LABELS, SCALES, strict=True)):
        image, trace = by_hand(seed, steps, label, scale, solver=solver)
        torch.testing.assert_close(images[i].double(), image, rtol=1e-3, atol=1e-4 * float(image.abs().max()))
        assert report.exit_layer[:steps, i].tolist() == trace
        assert not report.exit_layer[steps:, i].any()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_early_exit_by_hand(batch: int) -> None:
    """Each sample with a threshold of its own, each lane of a guided one deciding for itself."""
    thresholds = [0.3, 0.42, 0.5, 0.55, 0.36]
    images, report = sample(
        model(),
        5,
        steps=STEPS,
        policy="exit:0.99",
        thresholds=thresholds,
        seed=SEEDS,
        class_labels=LABELS,
        guidance_scale=SCALES,
        batch=batch,
    )
    for i, settings in enumerate(zip(SEEDS, STEPS, LABELS, SCALES, thresholds, strict=True)):
        image, trace = by_hand(*settings)
        assert report.exit_layer[: settings[1], i].tolist() == trace
        torch.testing.assert_close(images[i].double(), image, rtol=1e-3, atol=1e-4 * float(image.abs().max()))
    assert len(report.exit_layer.unique()) > 4
    one, _ = sample(
        model(), 1, steps=5, policy=Threshold(0.42), seed=[0], class_labels=[3], guidance_scale=1.8
    )  # a policy's own threshold is that of every sample
    torch.testing.assert_close(one[0], images[1], rtol=1e-3, atol=1e-4 * float(images[1].abs().max()))


def test_dpm_solver_is_that_of_diffusers() -> None:
    steps = [2, 6, 5]
    images, _ = sample(model(), 3, steps=steps, solver="dpm++2m", seed=[3, 4, 5], class_labels=[0, 1, 2])
    for i, count in enumerate(steps):
        scheduler = DPMSolverMultistepScheduler(
            beta_schedule="linear", beta_start=1e-4, beta_end=0.02, final_sigmas_type="zero"
        )
        scheduler.set_timesteps(count)
        x = initial_noise(torch.tensor([3 + i]), SHAPE)
        for t in scheduler.timesteps.tolist():
            x = scheduler.step(lane(t, x[0], i, None)[0][None].float(), t, x).prev_sample
        torch.testing.assert_close(images[i], x[0], rtol=1e-3, atol=1e-3 * float(x.abs().max()))


def test_spellings_of_solvers_and_policies_are_those_objects() -> None:
    settings = {"steps": 3, "class_labels": [0, 1], "seed": [1, 2]}
    for text, solver, policy_text, policy in (
        ("ddim", DDIM(), "exit:depth=2", Depth(2)),
        ("ddim:0.7", DDIM(0.7), "exit:0.45", Threshold(0.45)),
        ("dpm++2m", DPMSolverPP2M(), "full", "full"),
    ):
        named, _ = sample(model(), 2, solver=text, policy=policy_text, **settings)
        given, _ = sample(model(), 2, solver=solver, policy=policy, **settings)
        assert torch.equal(named, given)
    different = [sample(model(), 2, solver=text, **settings)[0] for text in ("ddim", "ddim:0.7", "ddpm", "dpm++2m")]
    assert len({float(images.sum()) for images in different}) == 4


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("solver", ["ddpm", "dpm++2m", "unipc:order=3", "heun"])
def test_an_image_is_the_same_bits_in_any_batch(solver: str) -> None:
    settings = [
        {"seed": seed, "steps": steps, "class_labels": label, "guidance_scale": scale, "thresholds": threshold}
        for seed, steps, label, scale, threshold in zip(
            SEEDS, STEPS, LABELS, SCALES, [0.3, 0.42, 0.5, 0.55, 0.36], strict=True
        )
    ]

    def draw(order: list[int], batch: int) -> tuple[Tensor, Tensor]:
        columns = {key: [settings[i][key] for i in order] for key in settings[0]}
        images, report = sample(model(), len(order), solver=solver, policy="exit:0.5", batch=batch, **columns)
        return images, report.exit_layer

    alone = [draw([i], 1) for i in range(5)]
    for order, batch in (([0, 1, 2, 3, 4], 5), ([4, 2, 0, 3, 1], 2), ([1, 1, 3], 3), ([3, 0, 4, 1], 1)):
        images, exits = draw(order, batch)
        for position, i in enumerate(order):
            assert torch.equal(images[position], alone[i][0][0])
            assert torch.equal(exits[: STEPS[i], position], alone[i][1][:, 0])


@pytest.mark.usefixtures("alone")
def test_nan_in_a_sample_reaches_neither_its_mates_nor_who_takes_its_slot(monkeypatch) -> None:
    def hurt(seeds: Tensor, *rest: object) -> Tensor:
        return initial_noise(seeds, *rest).masked_fill((seeds == 5)[:, None, None, None], math.nan)

    settings = {
        "steps": [4, 5, 5, 4, 3],
        "solver": "dpm++2m",
        "policy": "exit:0.45",
        "class_labels": [0] * 5,
        "batch": 2,
    }
    clean, before = sample(model(), 5, seed=[5, 6, 7, 8, 9], **settings)
    monkeypatch.setattr("adadiff.sampling.batch.initial_noise", hurt)
    with pytest.raises(FloatingPointError, match=r"sample 0 \(seed 5\) holds NaN"):
        sample(model(), 5, seed=[5, 6, 7, 8, 9], **settings)
    # as if nobody looked, to see who else would be hurt
    monkeypatch.setattr("adadiff.sampling.sampler.check_finite", lambda index, images, seeds: ((index, images), None))
    images, after = sample(model(), 5, seed=[5, 6, 7, 8, 9], **settings)
    assert images[0].isnan().all()
    assert after.exit_layer[:4, 0, 0].tolist() == [7] * 4
    assert torch.equal(images[1:], clean[1:])
    assert torch.equal(after.exit_layer[:, 1:], before.exit_layer[:, 1:])


def test_streaming_yields_each_sample_once_and_fills_the_places(monkeypatch) -> None:
    steps = [2, 5, 1, 1, 3, 2, 4]
    calls = []

    def counted(*given: object, **options: object) -> ForwardOutput:
        calls.append(len(given[1]))  # x
        return run_forward(*given, **options)

    monkeypatch.setattr("adadiff.sampling.batch.run_forward", counted)
    settings = {"steps": steps, "class_labels": [0] * 7, "guidance_scale": [1.0, 1.0, 2.5, 1.0, 1.0, 1.0, 1.5]}
    sampling = SamplerRun(model(), 7, batch=3, **settings)
    images, seen = torch.zeros(7, *SHAPE), []
    for index, finished in sampling:
        assert finished.shape == (len(index), *SHAPE)
        images[index] = finished
        seen += index.tolist()
        report = sampling.report
        ended = report.exit_layer[torch.tensor(steps)[index] - 1, index, 0]
        assert ended.tolist() == [7] * len(index)
    assert sorted(seen) == list(range(7))
    # three slots: the next sample begins when one ends; guided samples are two lanes
    lanes, waiting, running = [], list(range(3, 7)), {0: 2, 1: 5, 2: 1}
    while running:
        lanes.append(len(running) + sum(i in (2, 6) for i in running))
        ended = [i for i in running if running[i] == 1]
        running = {i: left - 1 for i, left in running.items() if left > 1}
        for _ in ended[: len(waiting)]:
            new = waiting.pop(0)
            running[new] = steps[new]
    assert calls == lanes
    whole, _ = sample(model(), 7, batch=7, **settings)
    torch.testing.assert_close(images, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_a_report_is_a_picture_of_its_moment_and_a_second_run_starts_anew() -> None:
    sampling = SamplerRun(model(), 4, steps=[1, 2, 3, 4], class_labels=[0] * 4, batch=4, policy="exit:depth=2")
    reports = [sampling.report for _ in sampling]
    assert [report.passes for report in reports] == [4, 7, 9, 10]
    assert [report.blocks for report in reports] == [8, 14, 18, 20]
    first = sampling.report
    images = torch.cat([finished for _, finished in sampling])
    again = sampling.report
    assert torch.equal(again.exit_layer, first.exit_layer)
    assert (again.macs, again.macs_full, again.rows_moved) == (first.macs, first.macs_full, first.rows_moved)
    assert images.isfinite().all()


def test_report_by_hand() -> None:
    """Two samples, one of them guided, two steps, two blocks: multiply-adds of the tiny U-ViT, D = 48, T = 18."""
    DD, TD = 18 * 48 * 48, 18 * 18 * 48
    block, skip, ends = 12 * DD + 2 * TD, 2 * DD, 2 * 16 * 12 * 48 + 9 * 3 * 3 * 64
    given = {"steps": [1, 2], "class_labels": [0, 1], "guidance_scale": [1.0, 2.0]}
    _, report = sample(model(), 2, policy="exit:depth=2", **given)
    assert report.exit_layer.tolist() == [[[2, 0], [2, 2]], [[0, 0], [2, 2]]]
    assert (report.num_layers, report.passes, report.blocks, report.blocks_full) == (7, 5, 10, 35)
    assert report.mean_exit_layer == 2
    assert report.macs == 5 * (2 * block + ends)
    assert report.macs_full == 5 * (7 * block + 3 * skip + ends)
    _, scored = sample(model(), 2, policy=Replay(), thresholds=[2, 2], **given)
    assert scored.macs - report.macs == 5 * 2 * 16 * 48  # two scores a lane
    for part in (
        "2 samples",
        "2.00 of 7 blocks a step (28.6%)",
        f"{report.macs / report.macs_full:.1%}",
    ):
        assert part in str(report)


def test_tied_lanes_exit_together() -> None:
    settings = {"steps": 4, "policy": "exit:0.45", "class_labels": [0, 1, 2, 3], "guidance_scale": [2.0, 1.0, 2.0, 2.0]}
    _, apart = sample(model(), 4, **settings)
    _, tied = sample(model(), 4, tied=True, **settings)
    guided = torch.tensor([0, 2, 3])
    assert not torch.equal(apart.exit_layer[:, guided, 0], apart.exit_layer[:, guided, 1])
    assert torch.equal(tied.exit_layer[:, guided, 0], tied.exit_layer[:, guided, 1])
    assert torch.equal(tied.exit_layer[:, 1], apart.exit_layer[:, 1])
    # at the first step both start from the same noise: the pair exits by the larger u, hence never before either
    assert bool((tied.exit_layer[0, guided, 0] >= apart.exit_layer[0, guided].amax(1)).all())


def test_labels_left_out_are_the_null_class() -> None:
    none, _ = sample(model(), 2, steps=2)
    image, _ = by_hand(1, 2, label=4)
    torch.testing.assert_close(none[1].double(), image, rtol=1e-3, atol=1e-3)


def test_bfloat16_network_keeps_a_float32_state() -> None:
    narrow = Model(CONFIG)
    narrow.load_state_dict(model().state_dict())
    images, report = sample(narrow.bfloat16().eval(), 3, steps=3, class_labels=[0, 1, 2])
    full, _ = sample(model(), 3, steps=3, class_labels=[0, 1, 2])
    assert images.dtype == torch.float32
    assert not torch.equal(images, images.bfloat16().float())
    torch.testing.assert_close(images, full, rtol=0, atol=0.05 * float(full.abs().max()))
    assert report.blocks == report.blocks_full
