"""UEMs fitted anew: the regression against numpy's, the UEM that says what it found, and what is left alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.calibration.calibrating import Calibrating
from adadiff.calibration.recording import record
from adadiff.calibration.refitting import PENALTIES, Refitting, Sums, fit, refitted, ridge
from adadiff.checkpoint import load, save
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.uem import ExitConfig
from sampler.shell import run as command
from sampler.tiny import SERVED, scramble, served

S, K, D = 3, 2, 5


def observed(n: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [S, K, n, D]; y [S, K, n], linear in x but for noise and what each evaluation adds; the true w [K, D]."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(S, K, n, D)) * [1, 30, 0.01, 2, 1] + draw.normal(size=(S, K, 1, D)) * 5
    w = draw.normal(size=(K, D)) / [1, 30, 0.01, 2, 1]
    y = np.einsum("skni,ki->skn", x, w) + draw.normal(size=(S, K, 1)) * 9 + noise * draw.normal(size=(S, K, n))
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(w)


def summed(x: Tensor, y: Tensor, batch: int) -> Sums:
    sums = Sums(K, D)
    for start in range(0, x.shape[2], batch):
        for s in range(S):
            sums.add(s, x[s, :, start : start + batch], y[s, :, start : start + batch])
    return sums


def halved(x: Tensor, y: Tensor) -> tuple[Sums, Sums]:
    return summed(x[:, :, ::2], y[:, :, ::2], 64), summed(x[:, :, 1::2], y[:, :, 1::2], 64)


def test_the_regression_is_numpys_on_deviations_from_each_evaluation() -> None:
    x, y, _ = observed(23, noise=3.0)
    penalty = torch.tensor(PENALTIES[-2:], dtype=torch.float64)  # one for each layer
    found = ridge(summed(x, y, 7).within(), penalty)
    for k in range(K):
        own = (x - x.mean(2, keepdim=True))[:, k].flatten(0, 1).numpy()
        seen = (y - y.mean(2, keepdim=True))[:, k].flatten().numpy()
        spread = np.sqrt((own**2).sum(0))
        rows = np.concatenate([own / spread, np.sqrt(float(penalty[k])) * np.eye(D)])
        wanted = np.linalg.lstsq(rows, np.concatenate([seen, np.zeros(D)]), rcond=None)[0] / spread
        np.testing.assert_allclose(found[k].numpy(), wanted, rtol=1e-8)


def test_what_is_linear_is_found_and_noise_is_not() -> None:
    x, y, w = observed(400, noise=0.1)
    found, a = fit(halved(x, y))
    torch.testing.assert_close(found, w, rtol=0.05, atol=0.05)
    left = y - torch.einsum("skni,ki->skn", x, found)
    torch.testing.assert_close(a, left.mean(2))
    x, y = x[:, :, :40], observed(40, noise=1.0, seed=1)[1]  # of other x
    halves = halved(x, y)
    told = (fit(halves)[0][:, None] * x).sum(-1).std(2)
    freely = (ridge((halves[0] + halves[1]).within(), torch.zeros(K, dtype=torch.float64))[:, None] * x).sum(-1).std(2)
    assert bool((told < 0.7 * freely).all())


def test_a_channel_that_is_always_the_same_has_no_say() -> None:
    x, y, _ = observed(40, noise=0.1)
    x[..., 2] = 7.0
    found, a = fit(halved(x, y))
    assert float(found[:, 2].abs().max()) == 0
    assert bool(a.isfinite().all())


def ranks(u: Tensor, error: Tensor) -> Tensor:
    """Rank correlations over the samples, [S, K]."""
    own, its = (value.argsort(-1).argsort(-1).double() for value in (u, error))
    own, its = own - own.mean(-1, keepdim=True), its - its.mean(-1, keepdim=True)
    return (own * its).sum(-1) / (own.norm(dim=-1) * its.norm(dim=-1))


@pytest.mark.parametrize(
    "config", [ExitConfig(), ExitConfig(time="bias"), ExitConfig(time=False, map=True, shared_head=True)], ids=str
)
def test_the_uem_says_what_the_regression_found(config: ExitConfig) -> None:
    """Before its sigmoid and on a lane's mean rows: the logarithm of the error in units of its spread, up to what one
    timestep adds, which a UEM blind to time cannot tell."""
    model = served(dataclasses.replace(SERVED, exits=config))
    seen, refitting, labels = [], Refitting(model), [i % 3 for i in range(40)]

    def visit(*given: object) -> None:
        seen.append(given)
        refitting(*given)

    samples = SampleBatch.of(model, 40, steps=5, seed=0, class_labels=labels)
    before = record(model, samples, 16, visit=visit)
    logs = torch.stack([torch.cat([g[3] for g in seen if g[0] == s], 1) for s in range(5)]).double().log()
    assert torch.equal(logs, before.error.double().log())
    fitted = refitted(model, **refitting.fitted())
    said, t = torch.zeros(5, 4, 40), before.t.float()
    _, cond = model.backbone.embed(torch.zeros(5, *model.backbone.sample_shape), t, torch.zeros(5, dtype=torch.long))
    offsets = fitted.exits.offsets(cond.time, t)  # [L, S, P]
    for s in range(5):
        rows = torch.cat([g[2] for g in seen if g[0] == s], 1)  # [K, n, D]
        said[s] = (
            torch.einsum("knd,kpd->kpn", rows, fitted.exits.weight[:-1]).mean(1) + offsets[:-1, s].mean(-1)[:, None]
        )
    wanted = (logs - logs.mean()) / logs.std()
    if config.time is not False:
        torch.testing.assert_close(said.mean(-1), wanted.mean(-1).float(), rtol=0.02, atol=0.02)
    after = record(fitted, samples, 16)
    torch.testing.assert_close(after.images, before.images)
    assert torch.equal(after.error, before.error)
    assert float(ranks(after.u, after.error).mean()) > float(ranks(before.u, before.error).mean()) + 0.2
    torch.testing.assert_close(ranks(after.u, after.error), ranks(said, after.error), rtol=0, atol=0.1)


def test_the_model_given_keeps_its_uems_and_shares_the_rest() -> None:
    given = served()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    calibrating = Calibrating(given, [0.6], n=16, steps=4, refit=True)
    calibration, made = calibrating.run(), calibrating.model
    assert calibration.refit
    assert made.calibration is calibration
    assert given.calibration is None
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"exits.weight", "exits.bias", "exits.time_weight"}
    assert torch.equal(made.exits.weight[-1], given.exits.weight[-1])
    assert made.backbone is given.backbone
    again = Calibrating(given, [0.6], n=16, steps=4, refit=True)
    assert again.run() == calibration
    assert not Calibrating(given, [0.6], n=16, steps=4).run().refit


def test_errors_that_are_all_alike_teach_nothing() -> None:
    model = served()
    refitting = Refitting(model)
    rows = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))
    for step, t in enumerate((900.0, 100.0)):
        refitting(step, t, rows, torch.zeros(4, 12))
    exits = refitted(model, **refitting.fitted()).exits
    assert float(exits.weight[:-1].abs().max()) < 1e-6
    assert all(bool(value.isfinite().all()) for value in exits.parameters())


def test_batches_do_not_matter() -> None:
    """One lane at a time, too, both halves get their share."""
    model, draw = served(), torch.Generator().manual_seed(0)
    rows, relative = torch.randn(2, 4, 13, 16, generator=draw), torch.rand(2, 4, 13, generator=draw) + 0.1
    found = []
    for batch in (13, 1, 4):
        refitting = Refitting(model)
        for lanes in torch.arange(13).split(batch):
            for step, t in enumerate((900.0, 100.0)):
                refitting(step, t, rows[step, :, lanes], relative[step, :, lanes])
        found.append(refitted(model, **refitting.fitted()).exits.state_dict())
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "given", [{"steps": 1}, {"steps": 3, "batch": 1}, {"steps": 3, "guidance_scale": 2.5, "batch": 3}]
)
def test_single_steps_and_single_lanes_will_do(given: dict) -> None:
    calibrating = Calibrating(served(), [0.6], n=8, refit=True, **given)
    guidance_scale = given.get("guidance_scale", 1.0)
    assert calibrating.run().guidance_scale == guidance_scale
    assert calibrating.recording.u.shape[-1] == (8 if guidance_scale == 1 else 16)  # lanes
    assert all(bool(value.isfinite().all()) for value in calibrating.model.exits.parameters())
    u = calibrating.recording.u
    assert float(u.std(-1).mean()) > 0.01


def test_by_command(tmp_path: Path) -> None:
    model = adadiff.Model(SERVED)
    scramble(model, 0.25, seed=3)
    save(model, tmp_path / "m.safetensors")
    settings = "--budget 0.6 --n 16 --steps 3 --batch 16"
    assert command(f"calibrate {tmp_path}/m.safetensors {settings} --refit --out {tmp_path}/c.safetensors") == 0
    made = load(tmp_path / "c.safetensors")
    assert made.calibration.refit
    assert not torch.equal(made.exits.weight, model.exits.weight)
    assert all(torch.equal(a, b) for a, b in zip(made.backbone.parameters(), model.backbone.parameters(), strict=True))
