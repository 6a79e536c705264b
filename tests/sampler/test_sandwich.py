"""Training at several widths: each update is the whole, the smallest and a random width; gradients as of masks."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adadiff.checkpoint import load, save
from adadiff.forward.narrow import narrow
from adadiff.model import Model
from adadiff.training.config import TrainConfig, load_config
from adadiff.training.objective import Objective
from adadiff.training.run_folder import LOG
from adadiff.training.trainer import Trainer, fingerprint
from sampler.slim import WIDTHS, fresh, masked
from sampler.test_training import SHORT, raising, tensors
from sampler.tiny import inputs

SLIM = dataclasses.replace(SHORT, widths=[0.25, 0.5, 0.75, 1.0], network={"dim": 16, "depth": 2, "heads": 4})


@pytest.mark.parametrize("exits", [False, True], ids=["plain", "exits"])
@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_gradients_are_those_of_the_masked_network(kind: str, exits: bool) -> None:
    """Of every width, with the DiT's variance, and of exits, whose parameters all widths share."""
    model = fresh(kind, exits=exits).double()
    config = TrainConfig(widths=list(WIDTHS), loss="supervised", network={"heads": 4})
    objective = Objective(model, config)
    given, noise = inputs(model.backbone, 5), torch.randn(5, *model.backbone.sample_shape).double()
    whole = (given.x.double(), given.t.ceil(), given.context, noise)
    seen = []
    for width in WIDTHS:
        reference = masked(model, width)
        wanted, terms = Objective(reference, dataclasses.replace(config, widths=[]))(*whole)
        wanted.backward()
        model.zero_grad()
        found, own_terms = objective(*whole, width=width)
        found.backward()
        torch.testing.assert_close(found, wanted)
        assert own_terms.keys() == terms.keys()
        for (name, value), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            ours, theirs = (torch.zeros_like(p) if p.grad is None else p.grad for p in (value, other))
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6), name
        seen.append(found.item())
    assert len(set(seen)) == len(WIDTHS)
    assert set(map(id, objective.parameters())) == set(map(id, model.parameters()))


def test_an_update_sums_the_losses_of_its_widths(tmp_path: Path) -> None:
    """By hand: each width on the same images, with times and noise of its own; one step of the optimizer."""
    trainer = Trainer(dataclasses.replace(SLIM, accumulate=3), tmp_path / "a")
    turns = trainer.turns(0)
    model = trainer.model
    alone = dataclasses.replace(trainer.config, widths=[])
    reference = Objective(model, alone)
    total = torch.zeros(())
    for turn, width in enumerate(turns):
        at = Objective(masked(model, width), alone) if width != 1 else reference
        for part in range(3):
            loss, _ = at(*trainer.inputs(0, part, turn))
            gradients = torch.autograd.grad(loss / 3, list(at.model.parameters()), allow_unused=True)
            for value, gradient in zip(model.parameters(), gradients, strict=True):
                if gradient is not None:
                    value.own = getattr(value, "own", 0) + gradient
            total = total + loss.detach() / 3 * (width == 1)
    expected = [getattr(value, "own", None) for value in model.parameters()]
    norm = torch.stack([g.norm() for g in expected if g is not None]).norm()
    terms = trainer.update()
    scale = min(1.0, 1.0 / float(norm))
    for value, own in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(value.grad, own * scale, rtol=1e-3, atol=1e-5)
    assert terms["narrow"].shape == (2,)
    torch.testing.assert_close(terms["loss"], total, rtol=1e-4, atol=1e-5)


def test_each_width_has_times_and_noise_of_its_own(tmp_path: Path) -> None:
    trainer, plain = Trainer(SLIM, tmp_path / "a"), Trainer(dataclasses.replace(SLIM, widths=[]), tmp_path / "b")
    turns = [trainer.inputs(3, turn=turn) for turn in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(turns[0], plain.inputs(3), strict=True))

    def image(x: Tensor, t: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        alpha_bar = trainer.model.schedule.log_alpha_bar(t.double()).exp()[:, None, None, None]
        return (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()

    for one in turns[1:]:
        assert torch.equal(one[2], turns[0][2])
        assert not (one[1] == turns[0][1]).any()
        assert not (one[3] == turns[0][3]).any()
        clear = torch.maximum(one[1], turns[0][1]) < 600  # where noise hides the image, rounding does, too
        torch.testing.assert_close(image(*one)[clear], image(*turns[0])[clear], rtol=1e-3, atol=1e-3)
    assert not (turns[1][3] == turns[2][3]).any()


def test_the_sandwich(tmp_path: Path) -> None:
    trainer = Trainer(SLIM, tmp_path / "a")
    turns = [trainer.turns(step) for step in range(64)]
    assert {tuple(turn[:2]) for turn in turns} == {(1.0, 0.25)}
    assert {turn[2] for turn in turns} == {0.5, 0.75}
    again = Trainer(SLIM, tmp_path / "b")
    assert turns == [again.turns(step) for step in range(64)]
    two = Trainer(dataclasses.replace(SLIM, widths=[0.5, 1.0]), tmp_path / "c")
    assert two.turns(0) == [1.0, 0.5]
    two.update()


def test_a_run_resumes_bit_for_bit_and_its_model_is_slimmable(tmp_path: Path) -> None:
    expected = Trainer(SLIM, tmp_path / "whole").run(progress=False)
    trainer = Trainer(SLIM, tmp_path / "parts")
    trainer.inputs = raising(7, KeyboardInterrupt())(trainer.inputs)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False)
    again = Trainer(SLIM, tmp_path / "parts")
    assert again.step == 2
    again.run(progress=False)
    wanted, found = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())
    model = load(expected)
    assert model.config.widths == (0.25, 0.5, 0.75, 1.0)
    assert narrow(model, 0.25).backbone.blocks[0].attn.heads == 1
    with pytest.raises(ValueError, match="another widths"):
        Trainer(dataclasses.replace(SLIM, widths=[0.5, 1.0]), tmp_path / "whole")


def test_every_width_learns(tmp_path: Path) -> None:
    config = dataclasses.replace(SLIM, exits=False, steps=30, batch=16, warmup=2, log_every=1, lr=1e-2, ema=0.5)
    trainer = Trainer(config, tmp_path)

    def losses(model: Model) -> list[float]:
        x, t, labels, noise = trainer.inputs(10**6)
        with torch.no_grad():
            found = [narrow(model, width).backbone(x, t, labels) for width in (0.25, 0.5, 0.75, 1.0)]
        return [float((one - noise).square().mean()) for one in found]

    before = losses(trainer.model)
    trainer.run(progress=False)
    assert all(a < 0.75 * b for a, b in zip(losses(trainer.model), before, strict=True))
    rows = [json.loads(row) for row in (tmp_path / LOG).read_text().splitlines()]
    assert all(len(row["narrow"]) == 2 for row in rows)


def test_exits_learn_at_all_widths_of_a_frozen_network(tmp_path: Path) -> None:
    config = dataclasses.replace(SLIM, recipe="frozen", init="digits_slim", loss="relative", network={})
    before = load("digits_slim")
    trainer = Trainer(config, tmp_path / "a")
    model = load(trainer.run(progress=False))
    assert model.config.widths == before.config.widths
    assert fingerprint(model.backbone) == fingerprint(before.backbone)
    assert trainer.model.exits.weight.grad.abs().max() > 0
    assert narrow(model, 0.25).exits is model.exits
    for widths in ([], [0.5, 1.0]):
        with pytest.raises(ValueError, match=r"another network.*widths: \(0\.25, 0\.5, 0\.75, 1\.0\)"):
            Trainer(dataclasses.replace(config, widths=widths), tmp_path / "b")


def test_a_narrow_network_is_no_start_of_a_whole_one(tmp_path: Path) -> None:
    save(narrow(load("digits_slim"), 0.5), tmp_path / "half.safetensors")
    config = TrainConfig(init=str(tmp_path / "half.safetensors"), exits=False)
    with pytest.raises(ValueError, match=r"width: 0\.5, the configuration asks for 1\.0"):
        Trainer(config, tmp_path / "a")
    Trainer(dataclasses.replace(config, network={"width": 0.5}), tmp_path / "b").update()


def test_widths_of_a_configuration_are_checked() -> None:
    for widths, message in (([0.5], "2 to 16"), ([0.5, 0.75], "end with 1"), ([1.0, 0.5], "ascending")):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SHORT, widths=widths)
    with pytest.raises(ValueError, match="widths must be of type list"):
        dataclasses.replace(SHORT, widths=0.5)
    config = load_config("digits_slim", {})
    assert config.model.widths == (0.25, 0.5, 0.75, 1.0)
    assert config.init == "digits_plain"
