"""What a training starts from and how it computes: checkpoints, a frozen network, parts of a batch, half precision."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adadiff.checkpoint import load, read_tensors
from adadiff.models.layers import attend
from adadiff.training.config import TrainConfig
from adadiff.training.trainer import Trainer, fingerprint

TINY = {"dim": 16, "depth": 2, "heads": 2}
SHORT = TrainConfig(steps=5, batch=3, warmup=2, save_every=2, seed=4, network=TINY)
DIGITS = dataclasses.replace(SHORT, network={})  # fits the checkpoints in the package


def test_frozen_leaves_the_network_as_it_is(tmp_path: Path) -> None:
    config = dataclasses.replace(DIGITS, recipe="frozen", init="digits_plain", loss="relative", batch=16, lr=1e-2)
    before = load("digits_plain")
    trainer = Trainer(config, tmp_path)
    own = before.backbone.state_dict()
    for head in trainer.model.exits.heads:  # copies of the network's own
        assert all(torch.equal(value, own[key]) for key, value in head.state_dict().items())
    first = float(trainer.objective(*trainer.inputs(0))[1]["relative"].sum())
    file = trainer.run(progress=False)
    after = load(file)
    assert fingerprint(after.backbone) == fingerprint(before.backbone) == fingerprint(trainer.model.backbone)
    assert read_tensors(file)[1]["notes"]["network_sha256"] == fingerprint(before.backbone)
    assert not any(parameter.requires_grad for parameter in trainer.model.backbone.parameters())
    assert not torch.equal(after.exits.weight, torch.zeros_like(after.exits.weight))
    assert float(trainer.objective(*trainer.inputs(0))[1]["relative"].sum()) < first
    with pytest.raises(ValueError, match="holds another network"):
        Trainer(dataclasses.replace(config, network=TINY), tmp_path / "other")


def test_fine_tuning_starts_from_the_whole_checkpoint(tmp_path: Path) -> None:
    """Exits of the same kind are kept; of another kind they are made anew."""
    start = load("digits").state_dict()
    trainer = Trainer(dataclasses.replace(DIGITS, init="digits"), tmp_path / "same")
    assert all(torch.equal(value, start[key]) for key, value in trainer.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    trainer.update()
    assert not torch.equal(trainer.model.backbone.pos_embed, start["backbone.pos_embed"])
    other = Trainer(dataclasses.replace(DIGITS, init="digits", exit_options={"time": False}), tmp_path / "other")
    assert torch.equal(other.model.backbone.pos_embed, start["backbone.pos_embed"])
    assert not other.model.exits.weight.any()
    head = other.model.exits.heads[0].decoder_pred.weight
    assert torch.equal(head, start["backbone.decoder_pred.weight"])


def test_half_precision_learns_much_the_same(tmp_path: Path) -> None:
    base = dataclasses.replace(SHORT, batch=8)
    full, half = (Trainer(dataclasses.replace(base, precision=p), tmp_path / p) for p in ("float32", "bfloat16"))
    given = full.inputs(0)
    (a, _), (b, terms) = full.objective(*given), half.objective(*given)
    assert a != b
    assert abs(float(a.detach()) - float(b.detach())) < 0.02 * float(a.detach())
    assert {value.dtype for value in (b, *terms.values(), *half.model.parameters())} == {torch.float32}


def test_attention_in_half_precision_has_the_gradients_of_exact_attention() -> None:
    """5 tokens, 12 channels: neither fills a vector. The rule: no further from float64 than twice PyTorch's own way."""
    torch.manual_seed(0)
    given = torch.randn(3, 2, 7, 5, 12).bfloat16()
    weights = torch.randn(2, 7, 5, 12).double()

    def gradients(of: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        qkv = given.to(dtype, copy=True).requires_grad_()
        made = of(*qkv)
        (made.double() * weights).sum().backward()
        return made.detach().double(), qkv.grad.double()

    exact = gradients(F.scaled_dot_product_attention, torch.float64)
    theirs, ours = gradients(F.scaled_dot_product_attention, torch.bfloat16), gradients(attend, torch.bfloat16)
    for a, b, c in zip(exact, theirs, ours, strict=True):
        assert float((c - a).norm()) <= 2 * float((b - a).norm())


def test_parts_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    """Gradients gathered over parts are those of the whole batch, up to the order of sums."""
    base = dataclasses.replace(SHORT, batch=12)
    whole, parts = (Trainer(dataclasses.replace(base, accumulate=k), tmp_path / str(k)) for k in (1, 3))
    shares = [torch.cat(column) for column in zip(*(parts.inputs(0, part) for part in range(3)), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(shares, whole.inputs(0), strict=True))
    one, three = whole.update(), parts.update()
    torch.testing.assert_close(three["uem"], one["uem"], rtol=1e-4, atol=1e-6)
    for a, b in zip(parts.trained, whole.trained, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
