"""Training: its inputs by hand, its resumption bit for bit, and what it does when something goes wrong."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import adadiff
from adadiff.checkpoint import load, read_tensors
from adadiff.data.image_sets import Images
from adadiff.output.pictures import make_grid, to_pixels
from adadiff.training.config import TrainConfig, load_config
from adadiff.training.run_folder import CONFIG, LOG, MODEL, SAMPLES, STATE
from adadiff.training.trainer import Trainer

TINY = {"dim": 16, "depth": 2, "heads": 2}
SHORT = TrainConfig(steps=5, batch=3, warmup=2, save_every=2, seed=4, network=TINY)
DIGITS = dataclasses.replace(SHORT, network={})  # fits the checkpoints in the package


def tensors(folder: Path) -> dict[str, Tensor]:
    state, metadata = read_tensors(folder / STATE)
    assert metadata["step"] == SHORT.steps
    return state | {f"file.{key}": value for key, value in read_tensors(folder / MODEL)[0].items()}


def raising(at: int, error: BaseException, before: bool = True):
    """A wrapper of a function: its call number `at`, from 0, raises."""

    def wrap(function):
        calls = 0

        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if before and calls == at + 1:
                raise error
            result = function(*arguments, **options)
            if calls == at + 1:
                raise error
            return result

        return wrapped

    return wrap


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert Trainer(SHORT, folder).run(progress=False) == folder / MODEL
    return tensors(folder)


@pytest.mark.parametrize(
    ("place", "saved"),
    [
        ("before the loss", 3),
        ("before the weights change", 3),
        ("after the weights change", 2),  # half an update is no state to resume from; the last checkpoint stands
        ("between two updates", 3),
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(uninterrupted, tmp_path: Path, place: str, saved: int) -> None:
    trainer = Trainer(SHORT, tmp_path)
    stop = KeyboardInterrupt()
    if place == "before the loss":
        trainer.inputs = raising(3, stop)(trainer.inputs)
    elif place == "between two updates":
        trainer.update = raising(2, stop, before=False)(trainer.update)
    elif place == "before the weights change":
        trainer.optimizer.zero_grad = raising(3, stop)(trainer.optimizer.zero_grad)
    else:
        trainer.optimizer.step = raising(3, stop, before=False)(trainer.optimizer.step)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False)
    assert read_tensors(tmp_path / STATE)[1]["step"] == saved
    torch.manual_seed(99)  # what the process did before is no part of the state
    resumed = Trainer(SHORT, tmp_path)
    assert resumed.step == saved
    resumed.run(progress=False)
    own = tensors(tmp_path)
    assert own.keys() == uninterrupted.keys()
    assert [key for key in own if not torch.equal(own[key], uninterrupted[key])] == []


def test_the_file_holds_the_average_and_how_it_was_made(uninterrupted, tmp_path: Path) -> None:
    average = {k.removeprefix("average."): v for k, v in uninterrupted.items() if k.startswith("average.")}
    written = {k.removeprefix("file."): v for k, v in uninterrupted.items() if k.startswith("file.")}
    assert written.keys() == average.keys()
    assert all(torch.equal(written[key], average[key]) for key in average)
    assert any(not torch.equal(value, uninterrupted[f"model.{key}"]) for key, value in average.items())
    plain = dataclasses.replace(SHORT, exits=False, steps=1)
    file = Trainer(plain, tmp_path).run(progress=False)
    model = load(file)
    assert model.exits is None
    assert read_tensors(file)[1]["notes"]["train"] == dataclasses.asdict(plain)


def test_a_loss_that_is_nan_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(SHORT, tmp_path)
    inputs = trainer.inputs

    def broken(step: int, part: int) -> tuple[Tensor, ...]:
        x, *others = inputs(step, part)
        return x * (math.nan if step == 3 else 1), *others

    trainer.inputs = broken
    with pytest.raises(FloatingPointError, match=r"the loss is nan .* at step 3"):
        trainer.run(progress=False)
    state, metadata = read_tensors(tmp_path / STATE)
    assert metadata["step"] == 2
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())
    assert Trainer(SHORT, tmp_path).step == 2


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Trainer(SHORT, tmp_path)
    before = (tmp_path / CONFIG).read_bytes()
    with pytest.raises(ValueError, match="another batch, lr; choose another folder"):
        Trainer(dataclasses.replace(SHORT, batch=4, lr=1.0), tmp_path)
    assert (tmp_path / CONFIG).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG]


def test_a_folder_tells_its_configuration_to_other_runs(tmp_path: Path) -> None:
    Trainer(SHORT, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values == {"format_version": 2, **dataclasses.asdict(SHORT)}
    assert load_config(tmp_path / CONFIG, {}) == SHORT
    assert load_config(tmp_path / CONFIG, {"steps": 9}) == dataclasses.replace(SHORT, steps=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable"),
        ('{"format_version": 2, "stepz": 3}', "unknown key stepz"),
        ("[]", "a table of values"),
        ("{}", r"config\.json has format_version None, this release reads 2; .* write \"format_version\": 2$"),
        ('{"format_version": 3}', r"config\.json has format_version 3, this release reads 2$"),
    ],
)
def test_a_folder_with_a_damaged_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        Trainer(SHORT, tmp_path)
    assert (tmp_path / CONFIG).read_text() == text


def test_a_truncated_state_is_refused(tmp_path: Path) -> None:
    Trainer(SHORT, tmp_path).save()
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"state\.safetensors is not a readable"):
        Trainer(SHORT, tmp_path)


def test_an_unwritable_folder_is_refused_before_any_step(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(Trainer, "update", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(OSError, match="taken"):
        Trainer(SHORT, tmp_path / "taken").run(progress=False)


@pytest.mark.parametrize("exits", [True, False])
def test_the_loss_falls_on_a_few_images(tmp_path: Path, exits: bool) -> None:
    config = TrainConfig(steps=25, batch=16, warmup=5, lr=1e-2, exits=exits, network={**TINY, "dim": 32})
    trainer = Trainer(config, tmp_path)
    trainer.data = Images(*trainer.data.batch(torch.arange(4)))
    simple = [float(trainer.update()["simple"]) for _ in range(25)]
    assert sum(simple[-5:]) < 0.8 * sum(simple[:5])


def test_inputs_are_noised_by_the_schedule(tmp_path: Path) -> None:
    """With every image the constant 0.5 the noise can be read off x, and must be the one that the loss is given."""
    trainer = Trainer(dataclasses.replace(SHORT, batch=400, label_drop=0.25), tmp_path)
    trainer.data = Images(torch.full((50, 1, 8, 8), 0.5), torch.arange(50) % 10)
    x, time, labels, given = trainer.inputs(0)
    t = time.long()
    assert torch.equal(t.float(), time)
    first, beta = {
        "linear": (0, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
        "stable_diffusion": (1, torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2),
    }[trainer.config.model.schedule]
    assert first <= int(t.min()) < first + 20
    assert first + 980 <= int(t.max()) < first + 1000
    alpha_bar = torch.cumprod(1 - beta, 0)[t - first, None, None, None]
    noise = (x.double() - alpha_bar.sqrt() * 0.5) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(noise, given.double(), rtol=0, atol=1e-4)
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    dropped = (labels == 10).float().mean()
    assert 0.18 < float(dropped) < 0.32
    assert set(labels.tolist()) == set(range(11))
    again, other = trainer.inputs(0), trainer.inputs(1)  # a function of the seed and the step
    assert all(torch.equal(a, b) for a, b in zip(again, (x, time, labels, given), strict=True))
    assert not torch.equal(other[0], x)


@pytest.mark.parametrize(
    ("loss", "weights"), [("paper", (0.25, 3.0)), ("official", (1.0, 1.0)), ("supervised", (2.0, 0.5))]
)
def test_the_loss_is_the_one_asked_for(tmp_path: Path, loss: str, weights: tuple[float, float]) -> None:
    """What is minimised is L_simple and the two weighted sums of what is logged per layer."""
    config = dataclasses.replace(SHORT, loss=loss, uem_weight=weights[0], ual_weight=weights[1])
    trainer = Trainer(config, tmp_path)
    loss_value, terms = trainer.objective(*trainer.inputs(0))
    assert {name: len(terms[name]) for name in ("uem", "ual", "errors", "relative")} == dict.fromkeys(
        ("uem", "ual", "errors", "relative"), 3
    )
    total = terms["simple"] + weights[0] * terms["uem"].sum() + weights[1] * terms["ual"].sum()
    torch.testing.assert_close(loss_value.detach(), total)
    assert terms["errors"][-1] == terms["simple"]
    assert terms["relative"][-1] == 0
    assert (terms["uem"][-1] == 0) == (loss == "supervised")


def test_a_linear_start_is_one(tmp_path: Path) -> None:
    """Before any update a block adds nothing to its rows, whatever the others hold, and a join passes them on; the
    first updates reach every weight."""
    config = dataclasses.replace(SHORT, start="linear", network={**TINY, "depth": 4})
    trainer = Trainer(config, tmp_path)
    network = trainer.model.backbone
    x, t, labels, _ = trainer.inputs(0)
    rows = network.embed(x, t, labels)[0].detach()
    for block in network.blocks[:3]:
        assert torch.equal(block(rows), rows)
    joined = network.blocks[4].join(rows, torch.zeros_like(rows)).detach()
    rms = rows.square().mean().sqrt()
    assert float((joined - rows).square().mean().sqrt()) < 0.15 * float(rms)  # the published start: 0.99
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    for _ in range(3):
        trainer.update()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(before)


@pytest.mark.parametrize("head", ["linear", "block"])
def test_a_frozen_run_resumes_bit_for_bit(tmp_path: Path, head: str) -> None:
    config = dataclasses.replace(
        DIGITS,
        recipe="frozen",
        init="digits_plain",
        loss="relative",
        exit_options={"head": head},
        steps=3,
        save_every=1,
    )
    file = Trainer(config, tmp_path / "whole").run(progress=False)
    trainer = Trainer(config, tmp_path / "parts")
    trainer.inputs = raising(2, KeyboardInterrupt())(trainer.inputs)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False)
    again = Trainer(config, tmp_path / "parts")
    assert again.step == 2
    own, whole = (load(path).state_dict() for path in (again.run(progress=False), file))
    assert all(torch.equal(own[key], value) for key, value in whole.items())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = Trainer(SHORT, tmp_path)
    trainer.update()
    trainer.save()
    before = [(tmp_path / name).read_bytes() for name in (STATE, MODEL)]
    with torch.no_grad():
        trainer.model.backbone.pos_embed[0, 0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"model\.backbone\.pos_embed hold NaN or infinity at step 1"):
        trainer.save()
    assert [(tmp_path / name).read_bytes() for name in (STATE, MODEL)] == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "canvases:n=5"}, "'canvases:n=5' is 1x16x16 .* draws 1x8x8 in 10"),
        ({"network": {**TINY, "num_classes": 6}, "preset": "cifar10_uvit_small", "label_drop": 0.0}, "draws 3x32x32"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_the_folder_is_touched(
    tmp_path: Path, change: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(dataclasses.replace(SHORT, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_average_follows_quickly_at_first(tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(SHORT, ema=0.25), tmp_path)
    mean = trainer.average.backbone.pos_embed.double()
    for step, decay in enumerate((2 / 11, 0.25, 0.25), start=1):  # min(ema, (1 + step) / (10 + step))
        trainer.update()
        mean = decay * mean + (1 - decay) * trainer.model.backbone.pos_embed.detach().double()
        torch.testing.assert_close(trainer.average.backbone.pos_embed.double(), mean, rtol=1e-5, atol=1e-7)
        assert trainer.step == step


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_the_log_goes_on_where_the_weights_do(tmp_path: Path) -> None:
    """Rows of updates that a kill undid are dropped, and so is a row it cut short."""
    config = dataclasses.replace(SHORT, steps=6, log_every=1, save_every=3)
    Trainer(config, tmp_path / "whole").run(progress=False)
    trainer = Trainer(config, tmp_path / "killed")
    trainer.update = raising(5, MemoryError(), before=False)(trainer.update)  # as a kill: nothing is saved any more
    with pytest.raises(MemoryError):
        trainer.run(progress=False)
    assert [row["step"] for row in rows(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    with open(tmp_path / "killed" / LOG, "a") as file:
        file.write('{"step": 6, "sec')
    again = Trainer(config, tmp_path / "killed")
    assert again.step == 3
    again.run(progress=False)
    whole, killed = rows(tmp_path / "whole"), rows(tmp_path / "killed")
    for row in (*whole, *killed):
        row.pop("seconds")
    assert killed == whole
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    assert {len(whole[0][name]) for name in ("uem", "ual", "errors", "relative")} == {3}


def test_pictures_are_drawn_along_the_way(tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, steps=4, sample_every=2)
    Trainer(config, tmp_path).run(progress=False)
    assert sorted(path.name for path in (tmp_path / SAMPLES).iterdir()) == ["00000002.png", "00000004.png"]
    shown = np.asarray(Image.open(tmp_path / SAMPLES / "00000004.png"))
    model = load(tmp_path / MODEL)
    images, _ = adadiff.sample(model, 36, steps=20, class_labels=[i % 10 for i in range(36)])
    wanted = make_grid([to_pixels(image) for image in images])
    assert np.array_equal(shown, wanted)
    assert shown.std() > 0


def test_tensorboard_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trainer = Trainer(dataclasses.replace(SHORT, tensorboard=True), tmp_path)
    with pytest.raises(ImportError, match=r"adadiff_kernels\[tensorboard\]"):
        trainer.run(progress=False)
    assert trainer.step == 0
