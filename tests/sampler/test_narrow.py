"""A narrow network is the whole one with fewer heads and channels, made of the same weights."""

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import adadiff
from adadiff.config import PRESETS, ModelConfig
from adadiff.forward.forward import forward
from adadiff.forward.narrow import narrow
from adadiff.model import Model
from adadiff.models.dit import DiTConfig
from adadiff.models.uvit import UViTConfig
from sampler.slim import NETWORKS, WIDTHS, fresh, masked
from sampler.tiny import UVIT, inputs


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("width", WIDTHS[:-1])
@torch.no_grad()
def test_it_is_the_whole_network_with_heads_and_channels_masked(kind: str, width: float) -> None:
    model = fresh(kind).double()
    given = inputs(model.backbone)
    expected, whole = (m.backbone(*given.all) for m in (masked(model, width), model))
    found = narrow(model, width).backbone(*given.all)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert (found - whole).abs().max() > 1e-2  # else a narrow network that is whole would pass


@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_samples_exit_in_it_as_in_the_masked_network(kind: str) -> None:
    model = fresh(kind).double()
    given, policy = inputs(model.backbone), "exit:0.5"
    found, expected = (forward(m, *given.all, policy=policy) for m in (narrow(model, 0.5), masked(model, 0.5)))
    assert torch.equal(found.exit_layer, expected.exit_layer)
    assert len(found.exit_layer.unique()) > 1
    torch.testing.assert_close(found.prediction, expected.prediction, rtol=1e-10, atol=1e-10)
    plain = forward(narrow(model, 0.5), *given.all)  # blocks run and fused passes as in a model of its own
    torch.testing.assert_close(plain.prediction, narrow(model, 0.5).backbone(*given.all)[:, :3], rtol=1e-10, atol=1e-10)


def test_the_whole_width_is_the_model_itself() -> None:
    model = fresh()
    assert narrow(model, 1.0) is model
    assert narrow(model, 1) is model


def test_multiply_adds_are_those_of_its_products() -> None:
    """Counted by the sizes of the weights; attention's own two products beside them."""
    for kind in NETWORKS:
        model = fresh(kind)
        for width in WIDTHS:
            network = narrow(model, width).backbone
            for block in network.blocks:
                T, inner = network.tokens, block.attn.proj.in_features
                weights = sum(v.numel() for k, v in block.named_parameters() if k.endswith("weight") and v.ndim > 1)
                assert block.macs(T) == T * weights + 2 * T * T * inner
                assert inner == 3 * (16 if kind != "dit" else 12) // 3 * {0.25: 1, 0.5: 2, 0.8: 3, 1.0: 3}[width]


def test_nothing_is_copied_and_what_is_edited_is_seen() -> None:
    model = fresh()
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    network = narrow(model, 0.5)
    assert {value.untyped_storage().data_ptr() for value in network.parameters()} <= own
    assert network is narrow(model, 0.5)
    given = inputs(model.backbone)

    def is_right() -> bool:
        with torch.no_grad():
            found = narrow(model, 0.5).backbone(*given.all)
            return torch.allclose(found, masked(model, 0.5).backbone(*given.all), rtol=1e-4, atol=1e-4)

    before = network.backbone(*given.all)
    for value in model.backbone.parameters():  # as averages are swapped in
        value.data.mul_(1.5)
    assert is_right()
    assert (network.backbone(*given.all) - before).abs().max() > 1e-2  # in the network made before, too


@pytest.mark.parametrize("what", ["other data", "another parameter", "another dtype", "assigned", "an exit"])
@torch.no_grad()
def test_replaced_weights_are_noticed(what: str) -> None:
    model, other = fresh(), fresh()
    network = narrow(model, 0.25)
    given = inputs(model.backbone)
    for value in other.parameters():
        value.mul_(1.5)
    block = model.backbone.blocks[2]
    if what == "other data":
        block.mlp.fc1.weight.data = other.backbone.blocks[2].mlp.fc1.weight.data
    elif what == "another parameter":
        block.attn.qkv.weight = nn.Parameter(other.backbone.blocks[2].attn.qkv.weight)
    elif what == "another dtype":
        model.double()
    elif what == "assigned":
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        model.exits = other.exits
    assert narrow(model, 0.25) is network
    assert network.exits is model.exits
    expected = masked(model, 0.25).backbone(*given.all)
    torch.testing.assert_close(network.backbone(*given.all), expected, rtol=1e-4, atol=1e-4)


def test_it_is_gone_with_its_model() -> None:
    model = fresh()
    gone = [weakref.ref(model), weakref.ref(narrow(model, 0.5))]
    del model
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_a_slimmable_model_and_its_narrow_networks_are_saved(tmp_path: Path) -> None:
    model = fresh("dit")
    given = inputs(model.backbone)
    adadiff.save(model, tmp_path / "slim.safetensors")
    again = adadiff.load(tmp_path / "slim.safetensors")
    assert again.config == model.config
    assert again.config.widths == WIDTHS
    adadiff.save(narrow(model, 0.5), tmp_path / "half.safetensors")
    half = adadiff.load(tmp_path / "half.safetensors")
    assert (half.config.network.width, half.config.widths) == (0.5, None)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.8 * (tmp_path / "slim.safetensors").stat().st_size
    with torch.no_grad():
        expected = narrow(model, 0.5).backbone(*given.all)
        assert torch.equal(narrow(again, 0.5).backbone(*given.all), expected)
        torch.testing.assert_close(half.backbone(*given.all), expected)  # of contiguous weights


def test_configurations_of_one_width_are_written_as_before() -> None:
    for config in PRESETS.values():
        values = config.to_dict()
        assert "widths" not in values
        assert "width" not in values["network"]
        assert ModelConfig.from_dict(values) == config


def test_models_that_are_not_slimmable_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width 0\.5 needs a model that was trained at several widths"):
        narrow(fresh(widths=None), 0.5)
    with pytest.raises(ValueError, match=r"asks for width 0\.3; this model was trained at 0\.25, 0\.5, 0\.8, 1$"):
        narrow(fresh(), 0.3)
    changed = fresh()
    changed.backbone.blocks[0].mlp.fc1 = nn.Sequential(changed.backbone.blocks[0].mlp.fc1)
    with pytest.raises(ValueError, match=r"weights differ from its configuration: .*mlp\.fc1"):
        narrow(changed, 0.5)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((0.5, 0.25, 1.0), "ascending"),
        ((0.5, 0.5, 1.0), "ascending"),
        ((1.0,), "2 to 16"),
        (("half", 1.0), "2 to 16"),
        ((True, 1.0), "2 to 16"),
        (0.5, "2 to 16"),
        ((0.0, 1.0), "end with 1"),
        ((0.5, 0.75), "end with 1"),
        ((float("nan"), 1.0), "ascending"),
        (tuple(i / 17 for i in range(1, 18)), "2 to 16"),
    ],
)
def test_widths_that_make_no_sense_are_refused(widths: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(UVIT, "linear", widths=widths)


def test_a_width_is_a_share() -> None:
    for kind in (UViTConfig, DiTConfig):
        for width in (0, -0.5, 1.5, float("nan"), "0.5", True):
            with pytest.raises(ValueError, match="width must be a share"):
                kind(8, 3, 2, 48, 6, 3, num_classes=5, width=width)
    with pytest.raises(ValueError, match="need a network that has a width, which must be 1"):
        ModelConfig(dataclasses.replace(UVIT, width=0.5), "linear", widths=WIDTHS)
    Model(ModelConfig(dataclasses.replace(UVIT, width=0.5), "linear"))  # a network of its own
