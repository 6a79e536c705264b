"""Estimates of the error of reuse: how they are fitted, which levels they get, and `adadiff calibrate-reuse`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import adadiff
from adadiff.calibration.reuse_errors import GAINS, POWERS, TRIED, Once, ReuseErrors, fitted
from adadiff.calibration.reuse_levels import Rule, Work, front, level_for, of_steps, on_line
from adadiff.config import ModelConfig
from adadiff.policies.estimated import EstimatedReuse, Spent
from adadiff.policies.estimated_file import read_estimates
from sampler import shell
from sampler.cached_rest import Plan, by_hand, models
from sampler.shell import config, error_line, run, saved
from sampler.tiny import PIXART, scramble

ctrl_c = shell.ctrl_c
WORK = Work(0.2)
PROFILE = torch.tensor([0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -3.0], dtype=torch.float64)
RULE = Rule(PROFILE, 2.3)


def deviations(halves: int = 1, n: int = 50) -> torch.Tensor:
    drawn = torch.randn(len(PROFILE), halves, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 2 * drawn


def test_regression_finds_what_depends_on_growth() -> None:
    """Noise aside, errors that depend linearly on three channels; the first step has seen no growth."""
    generator = torch.Generator().manual_seed(0)
    S, n, D = 4, 4000, 5
    grown = torch.rand(S, 1, n, D, generator=generator, dtype=torch.float64)
    true = torch.tensor([3.0, -2.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    log = grown[2, 0] @ true - 7 + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    weights, offsets, found = fitted(grown, log.exp())
    torch.testing.assert_close(weights[2] * 1.2, true, rtol=0.05, atol=0.05)  # a penalty of a fifth shrinks by a sixth
    assert np.corrcoef(found[2, 0], log)[0, 1] > 0.99
    assert abs(np.corrcoef(found[3, 0], log)[0, 1]) < 0.1  # another step's growth tells nothing
    assert weights[0].tolist() == [0.0] * D
    assert found[1:].mean((1, 2)).abs().max() < 1e-9
    assert offsets[0] == 0


def test_both_halves_of_guidance_learn_the_error_of_their_sample() -> None:
    grown = torch.rand(3, 2, 40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log = 2 * grown[1, 0, :, 0]
    _, _, apart = fitted(grown, log.exp())
    weights, _, _ = fitted(grown.flatten(1, 2)[:, None], log.repeat(2).exp())
    torch.testing.assert_close(apart[1, 1], apart[1, 1])
    torch.testing.assert_close(weights, fitted(grown, log.exp())[0])


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("level", [-6.0, -2.5, 0.0, 3.0])
def test_simulated_steps_are_those_of_the_rule(level: float, halves: int) -> None:
    """One lane and number at a time; a sample reuses if both of its halves may, by the mean over its full steps."""
    given = deviations(halves)
    found = RULE.full_steps(level, given)
    for i in range(given.shape[2]):
        full = [0]
        for s in range(len(PROFILE)):
            means = given[full[1:] or [0], :, i].mean(0).tolist()
            errors = [float(PROFILE[s]) + mean + 2.3 * math.log(max(s - full[-1], 1)) for mean in means]
            may = s >= 2 and max(errors) <= level
            assert bool(found[s, i]) != may
            full += [s] if s and not may else []


def test_levels_spend_what_is_asked() -> None:
    for share in (0.45, 0.6, 0.8, 0.9):
        level = level_for(share, RULE, deviations(), WORK)
        assert WORK.share(RULE.full_steps(level, deviations())) == pytest.approx(share, abs=0.01)
    one = torch.zeros(len(PROFILE), 1, 1, dtype=torch.float64)
    schedules = of_steps(RULE, WORK)
    for share, level in schedules.items():
        assert WORK.share(RULE.full_steps(level, one)) == share
    assert min(schedules) < 0.45
    every = {WORK.share(RULE.full_steps(float(level), one)) for level in np.linspace(-9, 9, 2001)}
    assert every - {1.0} == set(schedules)


def test_work_is_what_reports_count() -> None:
    policy = [Plan(every=2, order=1).policy, "reuse:every=3,order=1"]
    for kind in ("uvit", "dit"):
        for text in policy:
            _, report = adadiff.sample(models()[kind], 3, steps=7, class_labels=1, policy=text)
            share = Work.of(models()[kind]).share(~report.reused[:, :, 0])
            assert share == pytest.approx(report.macs / report.macs_full)


def test_the_power_of_age_and_the_gain_with_the_least_error_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each compared at one share, whatever shares its two runs really had; the power by step, the gain by sample."""
    errors = ReuseErrors(models()["uvit"], n=32, steps=6)
    tried = []

    def measured(policy: EstimatedReuse, full: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, float]:
        """Errors fall with the share, tenfold in 0.1; with the second of the three, they are half of the others'."""
        if not isinstance(policy, EstimatedReuse):
            return torch.rand(len(full), dtype=torch.float64), 0.5
        known, share = policy.estimates, 0.4 + 0.02 * len(tried)
        tried.append((policy.by, known.age_power, known.weights))
        second = len(tried) - 1 in (2, 3, 8, 9)
        return torch.full((len(full),), 10 ** (-10 * share) * (1 if second else 2), dtype=torch.float64), share

    monkeypatch.setattr(errors, "_errors", measured)
    found = errors.run()
    assert [one[:2] for one in tried[:6]] == [("step", power) for power in POWERS for _ in TRIED]
    assert {one[:2] for one in tried[6:12]} == {("sample", POWERS[1])}
    assert found.age_power == POWERS[1]
    assert found.weights == tried[8][2]
    largest = np.array(tried[10][2])  # of the last gain, 1
    for i, gain in enumerate(GAINS):
        np.testing.assert_allclose(np.array(tried[6 + 2 * i][2]), gain * largest, rtol=1e-5)
    assert np.abs(largest).max() > 0


def test_lines() -> None:
    assert on_line([(0.4, 1.0), (0.6, 3.0)], 0.5) == pytest.approx(2)
    assert on_line([(0.4, 1.0), (0.4, 3.0)], 0.5) == 1


def test_reuse_in_one_step() -> None:
    _, report = adadiff.sample(models()["uvit"], 2, steps=6, class_labels=1, policy=Once(3))
    assert report.reused[:, :, 0].T.tolist() == [[False, False, False, True, False, False]] * 2


def test_levels_that_a_cheaper_one_beats_are_dropped() -> None:
    spent = [Spent(2.0, 0.5, 3.0, 2, 4), Spent(4.0, 0.4, 5.0, 4, 6), Spent(3.0, 0.5, 1.0, 0, 2)]
    assert front(spent) == (spent[1], spent[2])
    assert front([*spent, Spent(1.0, 0.6, 1.0, 0, 2), Spent(0.0, 0.7, 0.9, 0, 1)]) == (
        *(spent[1], spent[2]),
        Spent(0.0, 0.7, 0.9, 0, 1),
    )


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_growth_is_watched_in_the_order_of_the_samples(scale: float) -> None:
    """Features of each sample, in batches of 2, against one sample by hand."""
    errors = ReuseErrors(models()["uvit"], n=32, steps=5, guidance_scale=scale, batch=5)
    errors.n, errors.batch = 5, 2
    grown, images = errors._watched(_Bar())
    assert grown.shape == (5, 1 if scale == 1 else 2, 5, models()["uvit"].config.network.dim)
    for i in range(5):
        seen: list[torch.Tensor] = []
        plan = Plan(every=1, order=1)
        made = by_hand(models()["uvit"], plan, 5, errors.seed + i, i % 3, scale, seen=seen)
        torch.testing.assert_close(images[i], made.x, rtol=2e-3, atol=2e-3)
        features = torch.stack([one.abs().mean(1)[0] for one in seen]).unflatten(0, (5, -1))
        torch.testing.assert_close(grown[:, :, i], features, rtol=1e-2, atol=1e-4)


class _Bar:
    def update(self, n: int = 1) -> None:
        pass


LINE = "--n 32 --steps 6 --batch 16 --solver dpm++2m"


def test_the_command_writes_what_samples_follow(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, out = saved(tmp_path / "m.safetensors", config()), tmp_path / "reuse.json"
    assert run(f"calibrate-reuse {model} {LINE} --out {out}") == 0
    printed = capsys.readouterr().out
    found = read_estimates(str(out))
    assert (found.steps, found.solver, found.samples, found.guidance_scale) == (6, "dpm++2m", 32, 1.0)
    assert [one.share for one in found.by_sample] == sorted(one.share for one in found.by_sample)
    assert found.by_sample[0].error > found.by_sample[-1].error > 0
    for by in ("sample", "step"):
        for one in getattr(found, f"by_{by}"):
            assert f"{one.share:.3f}" in printed
            # drawn anew on the samples that measured it
            own = {"steps": 6, "solver": "dpm++2m", "seed": found.seed + 32, "class_labels": [i % 10 for i in range(8)]}
            policy = EstimatedReuse(found, one.share, by)
            images, report = adadiff.sample(adadiff.load(model), 8, policy=policy, batch=16, **own)
            full, _ = adadiff.sample(adadiff.load(model), 8, batch=16, **own)
            assert report.macs / report.macs_full == pytest.approx(one.share, abs=1e-9)
            assert float((images - full).double().square().mean()) == pytest.approx(one.error, rel=1e-3)
    again = tmp_path / "again.json"
    assert run(f"calibrate-reuse {model} {LINE} --out {again}") == 0
    assert again.read_text() == out.read_text()
    assert f"--steps 6 --solver dpm++2m --policy estimate:{out},share=" in printed
    assert "never let" not in capsys.readouterr().err
    share = found.by_sample[1].share
    line = f"sample {model} --n 4 --steps 6 --solver dpm++2m --out {tmp_path / 'drawn'} --policy"
    assert run(f"{line} estimate:{out},share={share}") == 0
    report = json.loads((tmp_path / "drawn" / "report.json").read_text())
    assert f"estimate:{out}" in json.dumps(report)


def test_the_command_names_the_guidance_to_draw_with(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, out = saved(tmp_path / "m.safetensors", config()), tmp_path / "reuse.json"
    assert run(f"calibrate-reuse {model} --n 32 --steps 4 --guidance-scale 1.5 --out {out}") == 0
    assert f"--steps 4 --solver ddim --guidance-scale 1.5 --policy estimate:{out}" in capsys.readouterr().out


def test_bad_settings_leave_nothing(tmp_path: Path, capsys) -> None:
    model, out = saved(tmp_path / "m.safetensors", config()), tmp_path / "reuse.json"
    cases = {
        "--n 31": "n must be",
        "--steps 3": "steps must be",
        "--steps 6,7": "one number of steps",
        "--solver nothing": "no solver 'nothing'",
        "--batch 0": "batch must be",
        f"--seed {2**63 - 34}": "seed must be",
        "--solver sampler.own_rules:Own": "no solver",
        "--n 100000 --steps 1000": "GiB",
        f"--out {model}": str(model),
    }
    for more, words in cases.items():
        assert run(f"calibrate-reuse {model} {LINE} --out {out} {more}") == 2, more
        assert words in error_line(capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors"]


def test_a_plain_network() -> None:
    """A network without exits learns the same way."""
    errors = ReuseErrors(models()["plain"], n=32, steps=6)
    found = errors.run()
    assert errors.run() == found
    # by step, every number of full steps can be had, so that a share is missed by less than one step
    schedules = of_steps(Rule.of(found), Work.of(errors.model))
    assert sorted(errors._levels(found, "step", torch.zeros(0))) == sorted(schedules.values())
    _, report = adadiff.sample(
        models()["plain"], 4, steps=6, class_labels=1, policy=EstimatedReuse(found, found.by_sample[0].share)
    )
    assert report.reused.any()


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_network_that_takes_text(scale: float) -> None:
    """Prompts take turns; the null text is read only where there is guidance."""
    model = adadiff.Model(ModelConfig(PIXART, "linear")).requires_grad_(False).eval()
    scramble(model.backbone, 0.2, seed=2)
    drawn = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(0))
    given = {"text_embeds": drawn[:3], "null_text_embeds": drawn[3]}
    found = ReuseErrors(model, n=32, steps=5, guidance_scale=scale, **given).run()
    policy = EstimatedReuse(found, found.by_sample[0].share, "sample")
    null = {"null_text_embeds": drawn[3]} if scale != 1 else {}
    own = {"steps": 5, "guidance_scale": scale, "text_embeds": drawn[:3], **null}
    _, report = adadiff.sample(model, 3, policy=policy, **own)
    assert report.reused.any()
    with pytest.raises(ValueError, match="takes text; give text_embeds"):
        ReuseErrors(model, n=32, steps=5)
