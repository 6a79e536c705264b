"""Recorded runs of a tiny network, and calibrations made of them, end to end."""

import dataclasses
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adadiff
from adadiff.calibration import calibrating as calibrating_module
from adadiff.calibration import recording as recording_module
from adadiff.calibration.calibrating import Calibrating, work_of
from adadiff.calibration.recording import Recording, measure_weights, noised_errors, record, run
from adadiff.calibration.reliability import reliability_picture
from adadiff.checkpoint import save
from adadiff.forward.all_layers import all_layers
from adadiff.forward.forward import forward, run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.policies.calibrated import CalibratedThresholds, Calibration, Tables
from adadiff.policies.exits import Depth
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.uem import ExitConfig
from sampler.shell import run as command
from sampler.tiny import SERVED, inputs, scramble, served


def test_work_is_what_the_engine_counts() -> None:
    for config in (ExitConfig(), ExitConfig(map=True), ExitConfig(head="mlp"), ExitConfig(head="block")):
        model = adadiff.Model(dataclasses.replace(SERVED, exits=config)).requires_grad_(False).eval()
        work = work_of(model)
        given = inputs(model.backbone, 4)
        context = given.context.clamp(max=2)
        for layer in range(1, 6):
            plain = forward(model, given.x, given.t, context, policy=Depth(layer))
            assert plain.macs == 4 * float(work.exiting[layer - 1])
        assert plain.macs_full == 4 * work.full
        rows = torch.zeros(1, 1, 4)
        rows[..., 1] = 2.0
        policy = CalibratedThresholds(0.5, Tables(5, [500.0], [0.5], rows, torch.full((1, 1), 5)))
        asked = forward(model, given.x, given.t, context, policy=policy)
        assert asked.macs == 4 * (float(work.exiting[1]) + work.score)


def test_recording_is_what_every_layer_says() -> None:
    """By the sampler's own way: the last image, and each forward pass's x rebuilt from it, are those of `sample`."""
    model, labels = served(), [0, 1, 2, 0, 1]
    samples = SampleBatch.of(model, 5, steps=4, seed=9, class_labels=labels)
    seen = []

    def spy():
        def call(model, x, t, context, **given):
            seen.append((x.clone(), t.clone(), context.clone()))
            return run_forward(model, x, t, context, **given)

        return call

    plain = run(model, samples, 8, spy)
    images, _ = adadiff.sample(model, 5, steps=4, seed=9, class_labels=labels)
    torch.testing.assert_close(plain, images, rtol=1e-4, atol=1e-4)
    recording = record(model, samples, 8)
    torch.testing.assert_close(recording.images, images, rtol=1e-4, atol=1e-4)
    assert recording.u.shape == recording.relative.shape == (4, 4, 5)
    for i, (x, t, context) in enumerate(seen):
        predictions, scores, *_ = all_layers(model.backbone, model.exits, x, t, context)
        assert float(recording.t[i]) == float(t[0])
        for k in range(4):
            square = (predictions[k] - predictions[-1]).square().flatten(1).mean(1)
            torch.testing.assert_close(recording.relative[i, k], square, rtol=2e-2, atol=1e-5)
            torch.testing.assert_close(recording.u[i, k], scores[k].mean((1, 2)), rtol=1e-3, atol=1e-4)
    assert torch.equal(recording.error, recording.relative)
    parts = record(model, samples, 2)
    torch.testing.assert_close(parts.u, recording.u, rtol=1e-3, atol=1e-4)
    check_errors_as_features_see_them(model, record(model, samples, 8, halves), seen)


def halves(images: torch.Tensor) -> torch.Tensor:
    """Features [n, 2]: the mean of the upper half and that of the lower half, three times as much."""
    means = images.unflatten(2, (2, -1)).mean((1, 3, 4))
    return means * torch.tensor([1.0, 3.0])


def check_errors_as_features_see_them(model: adadiff.Model, recording: Recording, seen: list) -> None:
    for i, (x, t, context) in enumerate(seen):
        predictions, _, *_ = all_layers(model.backbone, model.exits, x, t, context)
        alpha_bar = float(model.schedule.log_alpha_bar(t[:1].double()).exp())
        means = [
            ((x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5).clamp(-1, 1).unflatten(2, (2, -1)).mean((1, 3, 4))
            for eps in predictions
        ]
        for k in range(4):
            above, below = (means[k] - means[-1]).square().mean(0)
            torch.testing.assert_close(recording.error[i, k].mean(), (above + 9 * below) / 2, rtol=2e-2, atol=1e-5)
    error, relative = recording.error, recording.relative
    torch.testing.assert_close(error * relative.mean(-1, keepdim=True), relative * error.mean(-1, keepdim=True))


def test_noised_errors_are_to_the_noise_put_in() -> None:
    model = served()
    images, labels = torch.rand(6, 1, 4, 4) * 2 - 1, torch.tensor([0, 1, 2, 0, 1, 2])
    u, errors = noised_errors(model, images, labels, [10.0, 700.0], seed=3)
    draw = torch.Generator().manual_seed(3)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for i, t in enumerate((10, 700)):
        noise = torch.randn(6, 1, 4, 4, generator=draw)
        a = torch.cumprod(1 - beta, 0)[t]
        x = (a.sqrt() * images + (1 - a).sqrt() * noise).float()
        predictions, scores, *_ = all_layers(model.backbone, model.exits, x, torch.full((6,), float(t)), labels)
        for k in range(4):
            torch.testing.assert_close(errors[i, k], (predictions[k] - noise).square().mean((1, 2, 3)))
            torch.testing.assert_close(u[i, k], scores[k].mean((1, 2)))


@cache
def calibrated(aim: str) -> tuple[Calibrating, Calibration]:
    model = adadiff.Model(SERVED).requires_grad_(False).eval()
    scramble(model.backbone, 0.25, seed=1)
    scramble(model.exits, 0.3, seed=5)
    model.exits.copy_heads(model.backbone)
    features = None if aim == "faithful" else (lambda images: images.flatten(1)[:, ::3])
    budgets = [0.8, 0.5] if aim == "faithful" else [0.5]
    calibrating = Calibrating(model, budgets, aim=aim, n=48, steps=6, batch=48, features=features)
    return calibrating, calibrating.run()


@pytest.mark.parametrize("aim", ["faithful", "distribution"])
def test_budgets_are_met_on_samples_never_seen(aim: str) -> None:
    calibrating, calibration = calibrated(aim)
    assert [b.share for b in calibration.budgets] == ([0.5, 0.8] if aim == "faithful" else [0.5])
    model = calibrating.model
    assert model.calibration is calibration
    settings = {"steps": 6, "seed": 5000, "class_labels": [i % 3 for i in range(96)], "batch": 96}
    full, _ = adadiff.sample(model, 96, **settings)
    for b in calibration.budgets:
        images, report = adadiff.sample(model, 96, policy=f"exit:budget={b.share}", **settings)
        assert abs(report.macs / report.macs_full / b.share - 1) < 0.06
        error = float((images - full).square().mean())
        assert b.adaptive.low / 2 < error < 2 * b.adaptive.high
        assert b.adaptive.low <= b.adaptive.error <= b.adaptive.high
        assert b.static.share >= b.adaptive.share - 0.02
        assert (b.adaptive.frechet is None) == (aim == "faithful")
    assert calibration.budgets[-1].adaptive.error <= calibration.budgets[0].adaptive.error
    assert str(calibration).count("\n") == len(calibration.budgets)
    assert ("Fréchet" in str(calibration)) == (aim == "distribution")


def test_runs_that_take_more_than_was_recorded_are_reckoned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Early exits lead off the way that was recorded. Here they make every run dearer by a fifth."""

    def dearer(*arguments, **settings):
        images, report = adadiff.sample(*arguments, **settings)
        return images, dataclasses.replace(report, macs=round(1.2 * report.macs))

    model = calibrated("faithful")[0].model
    monkeypatch.setattr(calibrating_module, "sample", dearer)
    budget = Calibrating(model, [0.6], n=48, steps=6, batch=48).run().budgets[0]
    assert abs(budget.adaptive.share / 0.6 - 1) < 0.06


def test_budgets_may_differ_between_the_samples_of_a_batch() -> None:
    calibrating, calibration = calibrated("faithful")
    model = calibrating.model
    both = {"steps": 6, "class_labels": [0] * 8, "execution": ExecutionOptions(batch_invariant=True)}
    mixed, _ = adadiff.sample(model, 8, policy="exit:budget=0.5", thresholds=[0.5, 0.8] * 4, **both)
    for share, own in ((0.5, mixed[::2]), (0.8, mixed[1::2])):
        alone, _ = adadiff.sample(model, 8, policy=f"exit:budget={share}", **both)
        assert torch.equal(alone[::2] if share == 0.5 else alone[1::2], own)
    _, report = adadiff.sample(model, 8, policy="exit:table=0.5", **both)
    assert report.exit_layer[:, :, 0].tolist() == [[d] * 8 for d in calibration.budgets[0].depths]


def test_it_is_deterministic() -> None:
    calibrating, calibration = calibrated("faithful")
    given = calibrating.model
    again = Calibrating(given, [0.8], n=48, steps=6, batch=48).run()
    assert given.calibration is calibration  # stays as it was
    assert again.weights == calibration.weights
    assert again.budgets[0] == calibration.budgets[1]


def test_the_last_weight_is_what_the_perturbed_runs_did() -> None:
    """The solver's last step is linear, so a unit of error costs what its coefficient says."""
    calibrating, calibration = calibrated("faithful")
    model = calibrating.model
    alpha_bar = model.schedule.log_alpha_bar(torch.tensor(calibration.t, dtype=torch.float64)).exp()
    assert calibration.weights[-1] == pytest.approx(float((1 - alpha_bar[-1]) / alpha_bar[-1]), rel=1e-3)


def test_weights_follow_the_final_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Final errors that are the mean of those put in times something of the step's: that is found, at the places
    that were measured and, as it is a geometric series, between them."""
    calibrating, _ = calibrated("faithful")
    recording, n = calibrating.recording, calibrating.n
    wanted = torch.logspace(1, -2, len(recording.t), dtype=torch.float64)
    monkeypatch.setattr(recording_module, "run", lambda model, samples, batch, new_forward: new_forward.args)

    def distance(place: tuple[int, int], _: torch.Tensor) -> float:
        at, layer = place
        return float(wanted[at] * recording.error[at, layer - 1].double().mean())

    given = calibrating.model, calibrating._samples(n, calibrating.seed), recording
    torch.testing.assert_close(measure_weights(*given, distance, batch=n, places=3), wanted, rtol=1e-9, atol=0)


def test_a_faithful_aim_counts_errors_as_features_see_them() -> None:
    calibrating = Calibrating(served(), [0.6], n=8, steps=3, features=halves)
    budget = calibrating.run().budgets[0]
    model, labels = calibrating.model, [i % 3 for i in range(8)]
    samples = SampleBatch.of(model, 8, steps=3, seed=calibrating.seed, class_labels=labels)
    assert torch.equal(calibrating.recording.error, record(model, samples, 64, halves).error)
    assert not torch.equal(calibrating.recording.error, calibrating.recording.relative)
    assert budget.adaptive.frechet is not None


def test_reliability_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    calibrating, _ = calibrated("faithful")
    t, u, relative = calibrating.recording.t, calibrating.recording.u, calibrating.recording.relative
    reliability_picture(calibrating.recording, tmp_path / "one.png")
    reliability_picture(calibrating.recording, tmp_path / "two.png", (t, u, relative + 1))
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert (one.width, 2 * one.height) == (two.width, two.height)
    assert len(np.unique(np.asarray(one).reshape(-1, 4), axis=0)) > 100


@pytest.mark.parametrize(
    ("budgets", "change", "message"),
    [
        ([], {}, r"in \(0, 1\], got \[\]"),
        ([0.5, 1.2], {}, r"in \(0, 1\], got \[0.5, 1.2\]"),
        ([0.0], {}, r"in \(0, 1\]"),
        ([math.nan], {}, r"in \(0, 1\]"),
        ([0.5, 0.5], {}, "budgets must differ"),
        ([0.01], {}, "the least that this network can run"),
        ([0.5], {"aim": "quality"}, "aim must be one of faithful, distribution"),
        ([0.5], {"aim": "distribution"}, "no features are known"),
        ([0.5], {"n": 3}, "n must be an integer >= 8"),
        ([0.5], {"steps": 0}, "steps must be at least 1"),
        ([0.5], {"solver": "euler"}, "no solver 'euler'"),
    ],
)
def test_bad_input_is_refused_before_any_work(budgets: list[float], change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibrating(served(), budgets, **change)


def test_a_plain_network_has_nothing_to_calibrate() -> None:
    plain = adadiff.Model(dataclasses.replace(SERVED, exits=None))
    with pytest.raises(ValueError, match="no exits to calibrate"):
        Calibrating(plain, [0.5])


def test_by_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = adadiff.Model(SERVED)
    scramble(model, 0.25, seed=3)
    save(model, tmp_path / "m.safetensors", {"train": {"steps": 7}})
    line = f"calibrate {tmp_path}/m.safetensors --budget 0.6 --out {tmp_path}/c.safetensors --n 16 --steps 3 --batch 16"
    assert command(line) == 0
    printed = capsys.readouterr().out
    assert "error over timestep table" in printed
    drawn = f"sample {tmp_path}/c.safetensors --n 4 --steps 3 --class-labels 1"
    assert command(f"{drawn} --out {tmp_path}/s --policy exit:budget=0.6") == 0
    assert command(f"{drawn} --out {tmp_path}/r --policy exit:budget=0.5") == 2
    assert "calibrated for budgets 0.6" in capsys.readouterr().err
    before = (tmp_path / "c.safetensors").read_bytes()
    assert command(line) == 2
    assert "c.safetensors: it exists; --force replaces it" in capsys.readouterr().err
    line += " --force"
    assert command(line.replace("0.6", "1.6")) == 2
    assert "budgets are shares" in capsys.readouterr().err
    assert command(line + " --data digits") == 2
    assert "give --picture" in capsys.readouterr().err
    assert command(line + f" --data digits --picture {tmp_path}/p.png") == 2
    assert "is (1, 8, 8) in 10 classes, but the model draws (1, 4, 4) in 3" in capsys.readouterr().err
    assert command(line.replace("c.safetensors", "none/c.safetensors")) == 2
    assert (tmp_path / "c.safetensors").read_bytes() == before
