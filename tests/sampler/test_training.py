"""Training: its inputs by hand, its resumption bit for bit, and what it does when something goes wrong."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adadiff import training
from adadiff.checkpoint import load, read_tensors
from adadiff.training import CONFIG, LOG, MODEL, STATE, TrainConfig, Trainer, learning_rate

SHORT = TrainConfig(steps=5, batch=3, warmup=2, save_every=2, seed=4)


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
        trainer.loss = raising(3, stop)(trainer.loss)
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
    loss = trainer.loss
    trainer.loss = lambda step: (loss(step)[0] * (math.nan if step == 3 else 1), {"simple": 0.0})
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
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


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not readable"), ('{"stepz": 3}', "unknown key stepz"), ("[]", "a table of values")]
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
    config = TrainConfig(steps=25, batch=16, warmup=5, lr=3e-3, exits=exits, save_every=100)
    trainer = Trainer(config, tmp_path)
    trainer.images, trainer.labels = trainer.images[:4], trainer.labels[:4]
    simple = [trainer.update()["simple"] for _ in range(25)]
    assert sum(simple[-5:]) < 0.8 * sum(simple[:5])


def test_inputs_are_noised_by_the_schedule(tmp_path: Path, monkeypatch) -> None:
    """With every image the constant 0.5 the noise can be read off x, and must be the one that the loss is given."""
    trainer = Trainer(dataclasses.replace(SHORT, batch=400, label_drop=0.25), tmp_path)
    trainer.images = torch.full((50, 1, 8, 8), 0.5)
    trainer.labels = torch.arange(50) % 10
    seen = {}

    def layers(backbone, exits, x, t, context):
        seen.update(x=x, t=t, context=context)
        return [torch.zeros_like(x, requires_grad=True)], [torch.full((len(x), 16, 1), 0.5)]

    def loss(predictions, scores, noise, patchify, uem_weight, ual_weight):
        seen.update(noise=noise, weights=(uem_weight, ual_weight))
        return training.adadiff_loss.original(predictions, scores, noise, patchify, uem_weight, ual_weight)

    loss.original = training.adadiff_loss
    monkeypatch.setattr(training, "all_layers", layers)
    monkeypatch.setattr(training, "adadiff_loss", loss)
    total, _ = trainer.loss(0)
    t = seen["t"].long()
    assert torch.equal(t.float(), seen["t"])
    first, beta = {
        "linear": (0, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
        "stable_diffusion": (1, torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2),
    }[trainer.config.model.schedule]
    assert first <= int(t.min()) < first + 20
    assert first + 980 <= int(t.max()) < first + 1000
    alpha_bar = torch.cumprod(1 - beta, 0)[t - first, None, None, None]
    noise = (seen["x"].double() - alpha_bar.sqrt() * 0.5) / (1 - alpha_bar).sqrt()
    torch.testing.assert_close(noise, seen["noise"].double(), rtol=0, atol=1e-4)
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    dropped = (seen["context"] == 10).float().mean()
    assert 0.18 < float(dropped) < 0.32
    assert set(seen["context"].tolist()) == set(range(11))
    assert torch.equal(total, trainer.loss(0)[0])  # a function of the seed and the step
    assert not torch.equal(total, trainer.loss(1)[0])


def test_the_average_follows_quickly_at_first(tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(SHORT, ema=0.25), tmp_path)
    mean = trainer.average.backbone.pos_embed.double()
    for step, decay in enumerate((2 / 11, 0.25, 0.25), start=1):  # min(ema, (1 + step) / (10 + step))
        trainer.update()
        mean = decay * mean + (1 - decay) * trainer.model.backbone.pos_embed.detach().double()
        torch.testing.assert_close(trainer.average.backbone.pos_embed.double(), mean, rtol=1e-5, atol=1e-7)
        assert trainer.step == step


def test_learning_rate_by_hand() -> None:
    config = TrainConfig(lr=8.0, warmup=4, steps=12)
    rates = [learning_rate(config, step) for step in range(12)]
    cosine = [4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates == pytest.approx([2, 4, 6, 8, *cosine])
    assert learning_rate(TrainConfig(lr=1.0, warmup=0, steps=1), 0) == 1


def test_every_hundredth_step_is_logged(tmp_path: Path, monkeypatch) -> None:
    trainer = Trainer(dataclasses.replace(SHORT, steps=201), tmp_path)
    trainer.save = lambda: None

    def update() -> dict:
        trainer.step += 1
        return {"simple": 1.5, "errors": [2.0]}

    trainer.update = update
    trainer.run(progress=False)
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [(row["step"], row["simple"], row["errors"]) for row in rows] == [(100, 1.5, [2.0]), (200, 1.5, [2.0])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "cifar10_uvit_small"}, "digits"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"batch": -1}, "batch must be a positive integer"),
        ({"batch": 2.0}, "batch must be a positive integer"),
        ({"save_every": 0}, "save_every must be a positive integer"),
        ({"warmup": -1}, "warmup and seed"),
        ({"seed": 0.5}, "warmup and seed"),
        ({"ema": 1.0}, "ema must be in"),
        ({"ema": math.nan}, "ema must be in"),
        ({"label_drop": -0.1}, "label_drop must be in"),
        ({"lr": math.inf}, "lr must be a finite number"),
        ({"lr": -1e-3}, "lr must be a finite number"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number"),
        ({"uem_weight": -1.0}, "uem_weight must be a finite number"),
        ({"ual_weight": math.nan}, "ual_weight must be a finite number"),
    ],
)
def test_impossible_configurations_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)
