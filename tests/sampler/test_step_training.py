"""Step selectors trained on tiny networks: what is recorded and measured, by plain draws; the command, its Ctrl-C."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

import adadiff
from adadiff import checkpoint
from adadiff.calibration import step_training
from adadiff.calibration.step_training import StepTraining, dealt_at_random, measured, root_mean_square
from adadiff.model import Model
from adadiff.models.uvit import UViTConfig
from adadiff.output.shards import read
from adadiff.policies.step_selector import MeasuredSteps, Ratio
from sampler.clip import make_clip
from sampler.shell import config, ctrl_c, error_line, interrupt_call, pixels, run, saved  # noqa: F401
from sampler.test_step_selector import TEXT, texts
from sampler.tiny import SERVED, scramble, served

CANDIDATES = (2, 3, 5)


def rms(one: torch.Tensor, other: torch.Tensor) -> float:
    pairs = zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / one.numel())


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_recorded_errors_are_those_of_plain_draws(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of two and three rows, and from a part that is there already."""
    monkeypatch.setattr(step_training, "PIECE", 7)
    training = StepTraining(served(), CANDIDATES, n=8, seed=40, guidance_scale=scale)
    kept: list[torch.Tensor] = []
    errors = training.record(done=kept.append)
    assert [len(one) for one in kept] == [2, 4, 6, 8]
    for i, row in enumerate(errors.tolist()):
        settings = {"seed": 40 + i, "class_labels": i % 3, "guidance_scale": scale}
        images = [adadiff.sample(served(), 1, steps=steps, **settings)[0] for steps in CANDIDATES]
        assert row == pytest.approx([rms(image, images[-1]) for image in images], rel=1e-5, abs=1e-5)
    assert float(errors[:, 0].min()) > 0.01
    torch.testing.assert_close(training.record(errors[:3]), errors, rtol=1e-5, atol=1e-5)
    assert torch.equal(training.record(errors), errors)


def test_random_dealing_is_the_mean_of_all_ways_to_deal() -> None:
    errors = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deal = [0, 2, 2, 1]
    chosen = torch.nn.functional.one_hot(torch.tensor(deal)).T.double()
    squares = [[float(errors[c, i]) ** 2 for i, c in enumerate(way)] for way in itertools.permutations(deal)]
    wanted = [math.sqrt(sum(way[i] for way in squares) / len(squares)) for i in range(4)]
    assert dealt_at_random(errors, chosen).tolist() == pytest.approx(wanted)


def test_measured_by_hand() -> None:
    own, fixed, dealt = (torch.full((6,), value, dtype=torch.float64) for value in (0.03, 0.06, 0.04))
    own[0] = 0.3
    found = measured(own, torch.tensor([2, 2, 2, 5, 5, 5]), fixed, dealt, bar=0.05)
    error = math.sqrt((5 * 0.03**2 + 0.3**2) / 6)
    assert (found.n, found.mean_steps, found.fixed_steps) == (6, 3.5, 4)
    assert found.error == pytest.approx(error)
    assert found.above_bar == pytest.approx(1 / 6)
    assert found.fixed.ratio == pytest.approx(error / 0.06)
    assert found.random.ratio == pytest.approx(error / 0.04)
    assert found.low < error < found.high
    assert found.fixed.low == pytest.approx(found.low / 0.06)  # theirs are the same for all samples
    none = measured(own, torch.tensor([2] * 6), 0 * fixed, dealt, bar=0.05)
    assert none.fixed == Ratio(0.0, None, None, None)


def test_what_is_measured_is_drawn_from_other_noises() -> None:
    training = StepTraining(served(), CANDIDATES, n=9, seed=70, bar=15.0)
    selector = training.run()
    chosen, found = selector.steps_of_classes, selector.config.measured
    assert len(set(chosen)) > 1
    labels = [0, 1, 2, 0]
    draw = {"class_labels": labels, "seed": [79, 80, 81, 82]}
    reference, _ = adadiff.sample(served(), 4, steps=5, **draw)
    own, report = adadiff.sample(served(), 4, steps=[chosen[label] for label in labels], **draw)
    mean = report.steps.double().mean().item()
    fixed, _ = adadiff.sample(served(), 4, steps=math.ceil(mean), **draw)
    assert (found.n, found.mean_steps, found.fixed_steps) == (4, mean, math.ceil(mean))
    assert found.error == pytest.approx(float(root_mean_square(own, reference).square().mean().sqrt()), rel=1e-5)
    assert found.fixed.error == pytest.approx(
        float(root_mean_square(fixed, reference).square().mean().sqrt()), abs=1e-5
    )
    assert selector.config.n == 9
    assert served().step_selector is None


def test_a_bar_out_of_reach_takes_the_most_and_a_low_one_the_fewest() -> None:
    errors = StepTraining(served(), CANDIDATES, n=9).record()
    for bar, steps in ((float(errors[:, 1].min()) / 2, 5), (2 * float(errors.max()), 2)):
        with torch.inference_mode():  # of a caller
            assert StepTraining(served(), CANDIDATES, n=9, bar=bar).learnt(errors).steps_of_classes == [steps] * 3


def reader() -> Model:
    made = Model(TEXT).requires_grad_(False).eval()
    scramble(made, 0.3, seed=2)
    return made


def test_prompts_are_told_apart() -> None:
    """24 prompts, one channel of whose first token tells hard ones; every fifth is not learnt from but chosen for."""
    text, is_hard = texts(24), torch.arange(24) % 2 == 1
    text[:, 0, 0] += torch.where(is_hard, 4.0, -4.0)
    training = StepTraining(reader(), CANDIDATES, n=76, text_embeds=text)
    assert set(training.held_out.index.tolist()) == {4, 9, 14, 19}
    assert set(training.rows.index.tolist()) == set(range(24)) - {4, 9, 14, 19}
    errors = torch.tensor([[0.01, 0.01, 0.0], [0.1, 0.02, 0.0]], dtype=torch.float64)
    errors = errors[is_hard[training.rows.index].long()]
    selector = training.learnt(errors)
    assert torch.equal(selector.choose(text), torch.where(is_hard, 3, 2))
    assert training.measure(selector).n == 38


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"candidates": (3, 2)}, "candidates are 2 to 64 numbers of steps"),
        ({"candidates": (3,)}, "candidates are 2 to 64 numbers of steps"),
        ({"candidates": (2, 1001)}, "candidates are 2 to 64 numbers of steps"),
        ({"n": 7}, "n must be an integer >= 8"),
        ({"bar": 0.0}, "bar must be above 0"),
        ({"penalty": math.nan}, "penalty at least 0"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"solver": "ddpm"}, "adds noise, so images of different numbers of steps cannot be compared"),
        ({"solver": "ddim:0.3"}, "adds noise"),
        ({"text_embeds": texts(4)}, "this model takes no text"),
    ],
)
def test_refused(settings: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        StepTraining(served(), **{"n": 9, **settings})


def test_refused_for_other_models() -> None:
    with pytest.raises(ValueError, match=r"text_embeds must be float \[P, 3, 5\]"):
        StepTraining(reader())
    with pytest.raises(ValueError, match="n must be at least 20, a noise for each class or prompt, got 19"):
        StepTraining(reader(), n=19, text_embeds=texts(25))
    with pytest.raises(ValueError, match="guidance needs null_text_embeds"):
        StepTraining(reader(), n=9, text_embeds=texts(4), guidance_scale=2.0)
    network = dataclasses.replace(SERVED.network, num_classes=0)
    model = Model(dataclasses.replace(SERVED, network=network, null_label=None))
    with pytest.raises(ValueError, match="neither classes nor text"):
        StepTraining(model, n=9)


TRAIN = "--candidates 2,3,5 -n 9 --bar 4.2"


@pytest.fixture
def four_classes(tmp_path: Path) -> str:
    """Three that can be asked for, and the null class."""
    network = dataclasses.replace(config().network, num_classes=4)
    return saved(tmp_path / "tiny.safetensors", dataclasses.replace(config(), network=network, null_label=3))


def test_the_command(four_classes: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "made.safetensors"
    assert run(f"train-steps {four_classes} {TRAIN} --out {out}") == 0
    printed = capsys.readouterr().out
    model, before = adadiff.load(out), adadiff.load(four_classes)
    wanted = StepTraining(before, CANDIDATES, n=9, bar=4.2).run()
    assert len(set(wanted.steps_of_classes)) > 1
    assert model.step_selector.config == wanted.config
    assert model.step_selector.steps_of_classes == wanted.steps_of_classes
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    assert checkpoint.read_tensors(out)[1]["notes"] == {"train": {"steps": 7}}
    assert list(tmp_path.glob("*errors*")) == []
    measured: MeasuredSteps = wanted.config.measured
    for shown in (f"{measured.error:.3g}", "the same for all", "dealt at random", f"wrote {out}"):
        assert shown in printed

    assert run(f"inspect {out}") == 0
    page = capsys.readouterr().out
    assert "--steps auto chooses 2, 3, 5 by the class of a sample, with solver ddim" in page
    assert f"adadiff sample {out} --out samples --class-labels 0,1,2 --steps auto" in page
    assert f"{measured.error:.3g}" in page

    chosen = wanted.steps_of_classes
    assert run(f"sample {out} --out {tmp_path / 'o'} --n 4 --class-labels 2,0 --steps auto --format npz") == 0
    assert "auto steps of ddim" in capsys.readouterr().out
    images, _ = adadiff.sample(model, 4, class_labels=[2, 0, 2, 0], steps=[chosen[2], chosen[0]] * 2)
    (shard,) = read(tmp_path / "o")
    for drawn, image in zip(shard["images"], images, strict=True):
        assert (drawn[:, :, 0] == pixels(image)).all()
    assert run(f"sample {out} --out {tmp_path / 'p'} --n 3 --class-labels 0,1,2 --steps auto") == 0
    mean = sum(chosen) / 3
    assert f"; {min(chosen)} to {max(chosen)} steps, {mean:.2f} on average" in capsys.readouterr().out


def test_ctrl_c_keeps_the_errors(
    four_classes: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_training, "PIECE", 9)
    out, partial = tmp_path / "made.safetensors", tmp_path / "made.safetensors.errors.safetensors"
    undo = interrupt_call(monkeypatch, StepTraining, "_errors", 3)
    assert run(f"train-steps {four_classes} {TRAIN} --out {out}") == 130
    assert error_line(capsys.readouterr().err) == (
        f"adadiff: interrupted; errors of 6 of 9 noises are in {partial}; the same command goes on from there"
    )
    undo()
    assert not out.exists()
    assert run(f"train-steps {four_classes} {TRAIN} --out {out} --seed 3") == 2
    assert "holds errors of other settings; remove the file, or give --force" in capsys.readouterr().err
    calls = []
    monkeypatch.setattr(step_training, "sample", lambda *a, **k: calls.append(a[1]) or adadiff.sample(*a, **k))
    assert run(f"train-steps {four_classes} {TRAIN} --out {out} --penalty 2") == 0  # which errors do not depend on
    assert f"{partial} holds errors of 6 of 9 noises; going on from there" in capsys.readouterr().out
    assert calls[:2] == [9, 4]  # the last three noises with three candidates each, then those for measuring
    assert not partial.exists()
    assert adadiff.load(out).step_selector.config.penalty == 2


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("--candidates 5,3", "candidates are 2 to 64 numbers of steps in 1..1000, rising, got [5, 3]"),
        ("--prompts {model}", "this model takes no text; leave --prompts and --text-encoder out"),
        ("--solver ddpm", "adds noise"),
        ("--n 100001", "n must be at most 100,000"),
        ("--out {model}", "it exists; --force replaces it"),
    ],
)
def test_the_command_refuses(
    more: str, why: str, four_classes: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = set(tmp_path.iterdir())
    line = f"train-steps {four_classes} --out {tmp_path / 'made.safetensors'} {more.format(model=four_classes)}"
    assert run(line) == 2
    assert why in error_line(capsys.readouterr().err)
    assert set(tmp_path.iterdir()) == before


def test_commands_that_take_no_auto(four_classes: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(f"calibrate {four_classes} --budget 0.5 --steps auto --out {tmp_path / 'x.safetensors'}")
    assert "takes whole numbers separated by commas, as in 20,30, got 'auto'" in capsys.readouterr().err
    assert run(f"sample {four_classes} --out {tmp_path / 'o'} --class-labels 1 --steps auto") == 2
    assert "steps='auto' needs a model with a step selector" in capsys.readouterr().err


def test_the_command_reads_prompts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    clip = make_clip(tmp_path, 7, channels=12)
    network = UViTConfig(8, 1, 4, 16, 2, 2, context_tokens=7, context_dim=12)
    model = saved(tmp_path / "text.safetensors", dataclasses.replace(TEXT, network=network))
    prompts, out = tmp_path / "prompts.txt", tmp_path / "made.safetensors"
    prompts.write_text("a cat\n\n  a dog \nno\nmy hat\nsea\nfar\n")
    line = f"train-steps {model} --text-encoder {clip} --candidates 2,4 -n 10 --guidance-scale 1.5 --out {out}"
    assert run(line) == 2
    assert "give --prompts, a file with one prompt a line" in capsys.readouterr().err
    assert run(f"{line} --prompts {prompts}") == 0
    assert adadiff.load(out).step_selector.config.context_dim == 12
    capsys.readouterr()
    draw = f"sample {out} --text-encoder {clip} --prompt 'a cat' sea --n 3 --out {tmp_path / 'o'} --steps auto"
    assert run(f"{draw} --guidance-scale 1.5") == 0
    assert " steps, " in capsys.readouterr().out
    assert run(f"{draw} --guidance-scale 2 --force") == 2
    assert "trained for guidance_scale 1.5, got 2.0" in capsys.readouterr().err
