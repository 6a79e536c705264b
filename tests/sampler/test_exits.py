"""Exits in both published readings, against the modules they are described by."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adadiff.config import PRESETS, ModelConfig
from adadiff.conversion.convert import translate
from adadiff.forward.all_layers import all_layers
from adadiff.forward.forward import forward
from adadiff.heads import HEADS
from adadiff.model import Model
from adadiff.models.uvit import UViT
from adadiff.policies.exits import Depth, Full, Patience, Threshold
from adadiff.uem import DUODIFF, OFFICIAL, PAPER, ExitConfig, Exits
from numerics import assert_as_accurate
from sampler.adaln import AdaLN
from sampler.tiny import BATCH, UVIT, case, inputs, plain_layers, scramble

F32 = torch.float32
CONFIGS = [ExitConfig(m, t, s) for m in (False, True) for t in (False, True, "bias") for s in (False, True)]


def with_exits(backbone: nn.Module, exits: Exits | None) -> SimpleNamespace:
    """What `forward` needs of a model."""
    return SimpleNamespace(backbone=backbone, exits=exits)


class LTE(nn.Module):
    """The official module: a linear map of patch tokens to certainties of every pixel and channel."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.lte = nn.Linear(dim, outputs)

    def forward(self, patches: Tensor) -> Tensor:
        return torch.sigmoid(self.lte(patches))


class OfficialUViT(UViT):
    """The published network and the official UEMs under one state dict, as their checkpoints are."""

    def __init__(self) -> None:
        super().__init__(UVIT)
        self.lte_classifer = nn.ModuleList(LTE(self.dim, self.patch_dim) for _ in self.blocks)
        scramble(self, 0.15, seed=3)

    def certainties(self, given) -> Tensor:
        """[L, B]: what the official sampler compares, for each sample."""
        rows = plain_layers(self, given)
        maps = [lte(layer[:, self.num_prefix_tokens :]) for lte, layer in zip(self.lte_classifer, rows, strict=True)]
        return torch.stack([self.unpatchify(values).flatten(1).mean(1) for values in maps])


def official() -> tuple[OfficialUViT, UViT, Exits]:
    theirs = OfficialUViT().requires_grad_(False)
    model = Model(ModelConfig(UVIT, "vp", exits=OFFICIAL)).requires_grad_(False)
    model.load_state_dict(translate("official", theirs.state_dict(), model.config, "theirs"))
    return theirs, model.backbone, model.exits


def test_official_certainties_become_uncertainties() -> None:
    theirs, backbone, exits = official()
    given = inputs(backbone)
    certainty, exact = theirs.certainties(given), theirs.double().certainties(given)
    result = forward(with_exits(backbone, exits), *given.all, policy=Threshold(1e-6), record_scores=True)
    assert_as_accurate(result.scores[:-1], 1 - certainty[:-1], 1 - exact[:-1])
    assert certainty.std() > 0.02


@pytest.mark.parametrize("quantile", [0.5, 0.7, 0.85])
def test_official_exits_are_those_of_their_loop(quantile: float) -> None:
    """Their loop for a batch of one: exit when the mean certainty exceeds it; of in-blocks, at the second time."""
    theirs, backbone, exits = official()
    given = inputs(backbone)
    certainty = theirs.certainties(given)
    values = certainty.flatten().sort().values
    start = int(quantile * len(values))
    gap = values[start : start + 10].diff().argmax()
    least = float(values[start:][gap : gap + 2].mean())  # in the widest gap nearby, so that rounding decides nothing
    wanted = []
    for b in range(BATCH):
        counter, exited = 0, len(certainty)
        for i, c in enumerate(certainty[:-1, b].tolist()):
            if c > least:
                counter += 1
                if i >= len(backbone.in_blocks) or counter > 1:
                    exited = i + 1
                    break
        wanted.append(exited)
    result = forward(with_exits(backbone, exits), *given.all, policy=Patience(1 - least))
    assert result.exit_layer.tolist() == wanted
    assert len(set(wanted)) > 1


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", ["uvit", "dit", "adaln"])
def test_training_sees_what_inference_decides_by(kind: str, config: ExitConfig) -> None:
    c, exact = case(kind, config, F32), case(kind, config, F32, exact=True)
    predictions, scores, *_ = all_layers(c.backbone, c.exits, *c.given.all)
    assert_as_accurate(torch.stack(predictions), c.predictions, exact.predictions)
    outputs = c.backbone.patch_dim if config.map else 1
    assert {score.shape for score in scores} == {(BATCH, c.backbone.tokens - c.backbone.num_prefix_tokens, outputs)}
    u = torch.stack([score.flatten(1).mean(1) for score in scores])
    assert_as_accurate(u, c.uncertainties, exact.uncertainties)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_parameters_are_those_the_readings_have(config: ExitConfig) -> None:
    backbone = UViT(UVIT)
    exits = Exits(backbone, config)
    P = 12 if config.map else 1
    wanted = {"weight": (7, P, 48), "bias": (7, P)}
    if config.time == "bias":
        wanted["time_bias"] = (26, 7, P)
    elif config.time:
        wanted["time_weight"] = (7, P, 48)
    if not config.shared_head:  # the last layer has the network's own
        head = {f"{k}.{n}" for k in ("norm", "decoder_pred", "final_layer") for n in ("weight", "bias")}
        shapes = {key: tuple(backbone.state_dict()[key].shape) for key in head}
        wanted |= {f"heads.{i}.{key}": shape for i in range(6) for key, shape in shapes.items()}
    assert {key: tuple(value.shape) for key, value in exits.state_dict().items()} == wanted
    assert (exits.macs(16), exits.outputs) == (P * 48 * 16, P)


def test_official_parameter_count_of_cifar10() -> None:
    """80,028 in the official code: 13 layers of D = 512 and 2 x 2 x 3 outputs."""
    with torch.device("meta"):
        exits = Exits(UViT(PRESETS["cifar10_uvit_small"].network), OFFICIAL)
    assert sum(parameter.numel() for parameter in exits.parameters()) == 80_028


def test_heads_are_used_where_they_belong() -> None:
    c = case("uvit", PAPER, F32)
    heads = [c.exits.head(c.backbone, layer) for layer in range(1, 8)]
    assert heads[:6] == list(c.exits.heads)
    assert heads[6] == c.backbone.head
    shared = case("uvit", OFFICIAL, F32)
    assert {shared.exits.head(shared.backbone, layer) for layer in range(1, 8)} == {shared.backbone.head}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_offsets_are_the_time_part_in_float32(config: ExitConfig) -> None:
    exits = case("adaln", config, torch.bfloat16).exits
    time = torch.randn(5, AdaLN.time_dim).bfloat16()
    t = torch.tensor([0.0, 12.25, 500.0, 999.0, 1000.0])  # an end, off an end's fraction, on one, the last
    if config.time == "bias":
        nn.init.normal_(exits.time_bias)
    offsets = exits.offsets(time, t)
    assert offsets.dtype == F32
    for layer in range(AdaLN.depth):
        for lane in range(5):
            want = exits.bias[layer].double()
            if config.time == "bias":
                ends = exits.time_bias[:, layer].double().detach().numpy()
                curve = [np.interp(float(t[lane]), np.linspace(0, 1000, len(ends)), end) for end in ends.T]
                want = want + torch.tensor(curve)
            elif config.time:
                want = want + exits.time_weight[layer].double() @ time[lane].double()
            torch.testing.assert_close(offsets[layer, lane].double(), want, rtol=1e-6, atol=1e-6)


def test_a_network_without_exits_is_run_in_full() -> None:
    c = case("uvit", PAPER, F32)
    assert torch.equal(
        forward(with_exits(c.backbone, None), *c.given.all, policy=Full()).prediction, c.backbone(*c.given.all)
    )


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_every_token_has_a_say_where_the_exits_want_it(dtype: torch.dtype) -> None:
    c, exact = case("uvit", DUODIFF, dtype), case("uvit", DUODIFF, dtype, exact=True)
    u = forward(c, *c.given.all, policy=Threshold(1e-6), record_scores=True).scores
    assert_as_accurate(u[:-1], c.uncertainties[:-1], exact.uncertainties[:-1])
    patches_only = case("uvit", dataclasses.replace(DUODIFF, every_token=False), dtype, exact=True).uncertainties
    assert (patches_only - exact.uncertainties).abs().median() > 1e-2
    macs = forward(c, *c.given.all, policy=Threshold(1e-6))
    assert macs.macs - macs.macs_full == BATCH * 6 * 18 * 48


def test_exits_that_score_every_token_are_not_trained() -> None:
    c = case("uvit", DUODIFF, F32)
    with pytest.raises(ValueError, match="for inference"):
        all_layers(c.backbone, c.exits, *c.given.all)


@pytest.mark.parametrize("name", ["map", "time", "shared_head", "every_token"])
@pytest.mark.parametrize("value", [1, "yes", None])  # nor "bias"
def test_settings_that_are_no_truth_values_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"exits.{name}"):
        ExitConfig(**{name: value})


@pytest.mark.parametrize("kind", ["uvit", "dit", "adaln"])
@pytest.mark.parametrize("config", [ExitConfig(), ExitConfig(head="mlp"), ExitConfig(head="block")], ids=str)
def test_copied_heads_say_what_the_networks_own_says(kind: str, config: ExitConfig) -> None:
    """An MLP or a block starts as nothing, so that a head behind it is the copy, too."""
    backbone = case(kind, PAPER, F32).backbone
    exits = Exits(backbone, config)
    exits.copy_heads(backbone)
    given = inputs(backbone, 5)
    rows, cond = backbone.embed(*given.all)
    lanes = torch.arange(5, dtype=torch.int32)
    patches = rows[:, backbone.num_prefix_tokens :]
    wanted = backbone.head(patches, cond, lanes)
    for layer in range(1, len(backbone.blocks)):
        assert torch.equal(exits.head(backbone, layer)(patches, cond, lanes), wanted)


def test_an_mlp_head_by_its_formula() -> None:
    backbone = case("uvit", PAPER, F32).backbone
    exits = Exits(backbone, ExitConfig(head="mlp"))
    scramble(exits, 0.15, seed=4)
    head, patches = exits.heads[2], torch.randn(3, 16, 48)
    hidden = torch.nn.functional.layer_norm(patches, (48,), head.norm.weight, head.norm.bias) @ head.fc1.weight.T
    hidden = torch.nn.functional.gelu(hidden + head.fc1.bias) @ head.fc2.weight.T + head.fc2.bias
    torch.testing.assert_close(head(patches), head.out(patches + hidden), rtol=1e-4, atol=1e-5)
    assert exits.head_macs(16) == 2 * 48 * 48 * 16
    assert Exits(backbone, PAPER).head_macs(16) == 0


def test_a_block_head_by_its_formula() -> None:
    """48 channels: four attention heads of 12, as 48 / 64 would be none."""
    backbone = case("uvit", PAPER, F32).backbone
    exits = Exits(backbone, ExitConfig(head="block"))
    scramble(exits, 0.15, seed=4)
    head, patches = exits.heads[2], torch.randn(3, 16, 48)
    h = torch.nn.functional.layer_norm(patches, (48,), head.norm1.weight, head.norm1.bias)
    q, k, v = (h @ head.attn.qkv.weight.T).unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.transpose(-1, -2) / 12**0.5).softmax(-1) @ v
    y = patches + mixed.transpose(1, 2).reshape(3, 16, 48) @ head.attn.proj.weight.T + head.attn.proj.bias
    h = torch.nn.functional.layer_norm(y, (48,), head.norm2.weight, head.norm2.bias)
    h = torch.nn.functional.gelu(h @ head.mlp.fc1.weight.T + head.mlp.fc1.bias)
    y = y + h @ head.mlp.fc2.weight.T + head.mlp.fc2.bias
    torch.testing.assert_close(head(patches), head.out(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_work_counts_the_heads_that_were_taken(kind: str) -> None:
    """And a block's products as PyTorch counts them."""
    backbone = case("uvit", PAPER, F32).backbone
    given = inputs(backbone)
    plain, behind = (Exits(backbone, ExitConfig(head=head)) for head in ("linear", kind))
    for depth, early in ((7.0, 0), (4.0, BATCH)):
        a, b = (forward(with_exits(backbone, exits), *given.all, policy=Depth(depth)) for exits in (plain, behind))
        assert b.macs - a.macs == early * behind.head_macs(16)
    patches = torch.randn(1, 16, 48)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products it knows
        behind.heads[0](patches)
    with FlopCounterMode(display=False) as own:
        plain.heads[0](patches)
    assert counter.get_total_flops() - own.get_total_flops() == 2 * behind.head_macs(16)


def test_heads_without_a_counterpart_are_refused() -> None:
    backbone = UViT(UVIT)
    exits = Exits(backbone, PAPER)
    before = {key: value.clone() for key, value in exits.state_dict().items()}
    with pytest.raises(ValueError, match=r"has no norm\.weight of shape"):
        exits.copy_heads(UViT(dataclasses.replace(UVIT, dim=24)))
    assert all(torch.equal(before[key], value) for key, value in exits.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "conv"}, "got 'conv'"),
        ({"shared_head": True, "head": "mlp"}, "shared_head"),
        ({"shared_head": True, "head": "block"}, "shared_head"),
    ],
)
def test_heads_that_cannot_be_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitConfig(**change)


def edit_through_data(exits: Exits) -> None:
    for value in exits.parameters():
        value.data.mul_(2)


HEADS_CHANGE = {
    "an optimiser's step": lambda exits: next(exits.heads[2].parameters()).mul_(2),
    "other weights": lambda exits: exits.load_state_dict({k: v * 0.5 for k, v in exits.state_dict().items()}),
    "another dtype": lambda exits: exits.double(),
    "edited through .data": edit_through_data,
}


@pytest.mark.parametrize("change", HEADS_CHANGE)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_heads_by_lane_are_what_the_heads_are_now(head: str, change: str) -> None:
    backbone = UViT(UVIT)
    exits = Exits(backbone, ExitConfig(head=head))
    scramble(exits, 0.3, seed=5)
    patches, lanes = torch.randn(6, backbone.tokens - backbone.num_prefix_tokens, backbone.dim), torch.arange(6).int()
    layer = torch.tensor([1, 3, 2, 1, 4, 2], dtype=torch.int32)

    def check() -> None:
        rows = patches.to(exits.weight.dtype)
        found = exits.heads_by_lane(rows, None, lanes, layer)
        for lane in range(6):
            own = exits.heads[layer[lane] - 1](rows[lane : lane + 1], None, lanes[lane : lane + 1])
            torch.testing.assert_close(found[lane : lane + 1], own, rtol=1e-4, atol=1e-5)

    check()
    with torch.no_grad():
        HEADS_CHANGE[change](exits)
    check()
