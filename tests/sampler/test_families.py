"""A further network is one file: what that file offers is all that saving, loading, sampling and serving need."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import adadiff
from adadiff.config import ModelConfig
from adadiff.model import Model
from adadiff.models import FAMILIES
from adadiff.models.interface import Family, Preset
from adadiff.sampling.capacity import capacity_of
from adadiff.uem import PAPER
from sampler.adaln import AdaLN
from sampler.tiny import scramble


@dataclass(frozen=True)
class ToyConfig:
    channels: int = 3
    num_classes: int = 4
    context_tokens: ClassVar[int] = 0


class Toy(AdaLN):
    def __init__(self, config: ToyConfig):
        super().__init__()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    preset = Preset(ToyConfig(), "linear", null_label=3)
    monkeypatch.setitem(FAMILIES, "toy", Family(ToyConfig, Toy, {"toy": preset}))
    return ModelConfig(**vars(preset), exits=PAPER)


def test_it_is_saved_loaded_sampled_and_served(toy: ModelConfig, tmp_path: Path) -> None:
    model = Model(toy).eval().requires_grad_(False)
    scramble(model, 0.3)
    adadiff.save(model, tmp_path / "toy.safetensors")
    again = adadiff.load(tmp_path / "toy.safetensors")
    assert again.config == toy
    assert isinstance(again.backbone, Toy)
    settings = {"steps": 3, "policy": "exit:0.5", "guidance_scale": 2.5, "class_labels": [0, 2]}
    images, report = adadiff.sample(model, 2, **settings)
    assert report.exit_layer.min() < 5
    assert torch.equal(adadiff.sample(again, 2, **settings)[0], images)
    execution = adadiff.ExecutionOptions(batch_invariant=True)
    with adadiff.Engine(again, capacity_of(again, "1MiB"), execution=execution) as engine:
        served = engine.submit(seed=1, **{**settings, "class_labels": 2}).result()
    torch.testing.assert_close(served, images[1], rtol=1e-3, atol=1e-3)


def test_without_its_line_it_is_not_known(toy: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    values = toy.to_dict()
    monkeypatch.delitem(FAMILIES, "toy")
    with pytest.raises(ValueError, match="no network family is configured by a ToyConfig: uvit, dit"):
        Model(toy)
    with pytest.raises(ValueError, match="unknown network family 'toy', known: 'uvit', 'dit'"):
        ModelConfig.from_dict(values)
