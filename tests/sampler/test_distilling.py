"""Progressive distillation, the oracle, and the command that makes a cascade of both."""

import copy
import dataclasses
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff import checkpoint
from adadiff.config import ModelConfig
from adadiff.data import sources
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.sampling.cascade_file import read_cascade
from adadiff.sampling.oracle import OracleConfig
from adadiff.training import distilling, progressive
from adadiff.training.discriminator import Labelled, separation, train_oracle
from adadiff.training.distilling import DistillConfig
from adadiff.training.progressive import ddim_step, eps_between, halve, step_pairs, two_step_target
from sampler import shell
from sampler.shell import config, error_line, run, saved
from sampler.tiny import scramble

ctrl_c, tiny = shell.ctrl_c, shell.tiny
SMALL = "--steps 2 --halvings 2 --updates 3 --batch 5 --oracle-updates 4 --samples 100"


@cache
def teacher() -> adadiff.Model:
    made = adadiff.Model(config())
    scramble(made.backbone, 0.15, seed=3)
    return distilling.plain(made)


@pytest.mark.parametrize("steps", [1, 4, 7, 50])
@pytest.mark.parametrize("schedule", ["linear", "stable_diffusion"])
def test_pairs_are_two_steps_of_the_teacher_and_one_of_the_student(schedule: str, steps: int) -> None:
    noise = NoiseSchedule(schedule)
    pairs = step_pairs(noise, steps)
    whole = torch.stack([pairs.t, pairs.middle], 1).flatten()
    t, alpha_bar = noise.grid(2 * steps, "trailing")
    assert torch.equal(whole, t)
    assert torch.equal(torch.stack([pairs.a, pairs.a_middle], 1).flatten(), alpha_bar[:-1])
    assert torch.equal(pairs.a_after, alpha_bar[2::2])
    assert torch.equal(pairs.t, noise.grid(steps, "trailing")[0])


def test_a_schedule_without_such_lists_is_refused() -> None:
    with pytest.raises(ValueError, match="'vp' does not have"):
        step_pairs(NoiseSchedule("vp"), 4)


def test_the_target_makes_one_step_of_two() -> None:
    """By hand in float64: two DDIM steps of a teacher whose eps is known, then the paper's target in x0, and its loss
    with truncated SNR weights."""
    pairs, index = step_pairs(NoiseSchedule("stable_diffusion"), 3), torch.tensor([0, 2, 1, 2, 0])
    x = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x) * (0.3 + t.double() / 1000).view(-1, 1, 1, 1)

    target, weight = two_step_target(predict, x, pairs, index)
    student = target + 0.01 * torch.cos(x)  # any other prediction
    for i, k in enumerate(index.tolist()):
        a, b, c = (float(value[k]) for value in (pairs.a, pairs.a_middle, pairs.a_after))
        z, times = x[i : i + 1], (pairs.t[k : k + 1], pairs.middle[k : k + 1])
        for here, after, time in ((a, b, times[0]), (b, c, times[1])):
            eps = predict(z, time.float())
            x0 = (z - (1 - here) ** 0.5 * eps) / here**0.5
            z = after**0.5 * x0 + (1 - after) ** 0.5 * eps
        own = target[i : i + 1]
        one = c**0.5 * (x[i : i + 1] - (1 - a) ** 0.5 * own) / a**0.5 + (1 - c) ** 0.5 * own
        torch.testing.assert_close(one, z, rtol=1e-10, atol=1e-10)
        ratio = ((1 - c) / (1 - a)) ** 0.5
        wanted = (z - ratio * x[i : i + 1]) / (c**0.5 - ratio * a**0.5)  # x tilde of the paper
        guess = (x[i : i + 1] - (1 - a) ** 0.5 * student[i : i + 1]) / a**0.5
        in_x0 = max(a / (1 - a), 1) * (guess - wanted).square()
        in_eps = weight[i] * (student[i : i + 1] - own).square()
        torch.testing.assert_close(in_eps, in_x0, rtol=1e-9, atol=1e-12)


def test_eps_between_undoes_a_step() -> None:
    """Down to a = 1, where no noise is left."""
    draw = torch.Generator().manual_seed(2)
    x, eps = (torch.randn(4, 3, dtype=torch.float64, generator=draw) for _ in range(2))
    a = torch.tensor([[0.005], [0.2], [0.7], [0.5]], dtype=torch.float64)
    after = torch.tensor([[0.2], [1.0], [0.9], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(eps_between(x, ddim_step(x, eps, a, after), a, after), eps, rtol=1e-9, atol=1e-9)


def test_a_student_learns_and_its_teacher_does_not() -> None:
    before, losses = copy.deepcopy(teacher().state_dict()), []
    given = {"updates": 24, "batch": 8, "lr": 2e-3, "label_drop": 0.1, "seed": 1}
    student = halve(teacher(), sources.load("digits"), 2, **given, on_update=lambda k, loss: losses.append(loss))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(torch.equal(value, before[key]) for key, value in teacher().state_dict().items())
    again = halve(teacher(), sources.load("digits"), 2, **given)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in student.state_dict().items())
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_a_loss_that_is_not_finite_ends_it() -> None:
    broken = copy.deepcopy(teacher())
    broken.backbone.blocks[0].mlp.fc1.weight.data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="at update 0"):
        halve(broken, sources.load("digits"), 2, updates=2, batch=4, lr=1e-3, label_drop=0.0, seed=0)


def test_separation_is_the_area_under_the_roc_curve() -> None:
    """Of six pairs: 1 > 0; 2 > 0 and 2 = 2; 3 > 0 and 3 > 2."""
    assert separation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0])) == 4.5 / 6


@pytest.mark.parametrize("classes", [0, 2])
def test_an_oracle_learns_what_can_be_told_apart_and_no_more(classes: int) -> None:
    """Brightness tells the sets apart; two halves of one set nothing, and it does not pretend."""
    draw = torch.Generator().manual_seed(3)
    images = torch.randn(600, 1, 4, 4, generator=draw)
    labels = torch.randint(2, (600,), generator=draw) if classes else None
    real, drawn, config = Labelled(images, labels), Labelled(images - 1, labels), OracleConfig(1, 4, classes, width=4)
    found = train_oracle(config, real.take(slice(300)), drawn.take(slice(300, None)), updates=60, seed=0)
    assert found.held_out_auc > 0.9
    same = train_oracle(config, real.take(slice(300)), real.take(slice(300, None)), updates=60, seed=0)
    assert abs(same.held_out_auc - 0.5) < 0.2  # of 60 and 60: 0.05 is one standard deviation


def test_a_cascade_is_made_on_the_command_line(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cascade.safetensors"
    assert run(f"distill {tiny} --data digits {SMALL} --share 0.4 --mode regenerate --out {out}") == 0
    shown = capsys.readouterr().out
    assert f"--policy cascade:{out}" in shown
    assert "the oracle finds the real image in" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cascade.safetensors"]
    found = read_cascade(out, torch.device("cpu"), torch.float32)
    assert (found.settings.steps, found.settings.solver, found.settings.share) == (2, "ddim", 0.4)
    assert (found.settings.mode, found.student.config.exits) == ("regenerate", None)
    images, _ = adadiff.sample(
        found.student, 100, steps=2, class_labels=labels_of_quantiles(), seed=distilling.SEED_OF_SAMPLES + 100
    )
    scores = found.oracle(images, labels_of_quantiles()).double()
    torch.testing.assert_close(
        torch.tensor(found.settings.quantiles, dtype=torch.float64),
        torch.quantile(scores, torch.linspace(0.01, 0.99, 99, dtype=torch.float64)),
        rtol=1e-4,
        atol=1e-4,
    )
    pictures = tmp_path / "pictures"
    line = f"sample {tiny} --out {pictures} --n 12 --steps 4 --class-labels 0,1,2 --policy"
    assert run(f"{line} cascade:{out}") == 0
    assert "went on to the teacher" in capsys.readouterr().out
    assert run(f"{line} cascade:{out},share=2") == 2
    assert "share must be" in error_line(capsys.readouterr().err)
    assert run(f"distill {tiny} --data digits {SMALL} --out {out}") == 2
    assert "--force replaces it" in error_line(capsys.readouterr().err)


def labels_of_quantiles() -> Tensor:
    """Those that `Distilling` draws second, as often as the data has them."""
    data, generator = sources.load("digits"), torch.Generator().manual_seed(100 + 1)
    return data.batch(torch.randint(len(data), (100,), generator=generator))[1]


def test_a_distillation_goes_on_from_its_last_halving(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the second halving: the same command makes the same file; with other settings it refuses."""
    whole, out = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert run(f"distill {tiny} --data digits {SMALL} --out {whole}") == 0
    real, calls = progressive.two_step_target, []

    def interrupted(*given: object) -> object:
        calls.append(given)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return real(*given)

    monkeypatch.setattr(progressive, "two_step_target", interrupted)
    assert run(f"distill {tiny} --data digits {SMALL} --out {out}") == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    state = out.with_name("cut.safetensors.state")
    assert state.exists()
    assert not out.exists()
    assert run(f"distill {tiny} --data digits {SMALL} --seed 1 --out {out}") == 2
    assert "other settings" in error_line(capsys.readouterr().err)
    calls.extend([()] * 9)
    before = len(calls)
    assert run(f"distill {tiny} --data digits {SMALL} --out {out}") == 0
    assert len(calls) == before + 3  # updates of one halving
    assert not state.exists()
    one, other = (checkpoint.read_tensors(path) for path in (whole, out))
    assert one[1] == other[1]
    assert all(torch.equal(value, other[0][key]) for key, value in one[0].items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("--steps 0", "steps must be an integer from 1"),
        ("--halvings 9", "begin with more than 1,000; give fewer"),
        ("--lr 0", "lr must lie in"),
        ("--label-drop 1", "label_drop in"),
        ("--share 0.001", "share must be"),
        ("--sigma 1.5", "sigma must lie"),
        ("--data canvases:n=20", "the data is 1x16x16"),
        ("--data faces", "no training data"),
    ],
)
def test_what_cannot_be_distilled(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, match: str
) -> None:
    data = "" if "--data" in change else "--data digits"
    small = " ".join(SMALL.split()[2:]) if "--steps" in change else SMALL
    small = small.replace("--halvings 2", "") if "--halvings" in change else small
    assert run(f"distill {tiny} {data} {small} {change} --out {tmp_path / 'out.safetensors'}") == 2
    assert match in error_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_settings_are_checked() -> None:
    assert DistillConfig(steps=4, halvings=3).all_steps == [16, 8, 4]
    with pytest.raises(ValueError, match="refine or regenerate"):
        DistillConfig(mode="again")


def test_a_model_with_other_labels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = dataclasses.replace(config().network, num_classes=4)
    few = saved(tmp_path / "few.safetensors", ModelConfig(network, "linear"))
    assert run(f"distill {few} --data digits --out {tmp_path / 'out.safetensors'}") == 2
    assert "in 10 classes, but the model draws 1x8x8 in 4" in error_line(capsys.readouterr().err)
