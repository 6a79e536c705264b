"""What every network of the package has to do, asked of each by its name: a further one is a line in tiny.NETWORKS.

Wanted values are those of the network's own plain modules, one sample at a time (tiny.case).
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adadiff
from adadiff.calibration.calibrating import Calibrating
from adadiff.config import ModelConfig
from adadiff.forward import runner
from adadiff.forward.forward import forward
from adadiff.forward.narrow import narrow
from adadiff.forward.options import ExecutionOptions
from adadiff.model import Model
from adadiff.models import FAMILIES
from adadiff.models.uvit import UViT
from adadiff.policies.exits import Full, Replay, Threshold
from adadiff.training.config import TrainConfig
from adadiff.training.objective import Objective
from adadiff.uem import PAPER, ExitConfig
from pretend import elsewhere
from recorder import recorded
from sampler import tiny
from sampler.captured import Captured, depths
from sampler.tiny import BATCH, case, thresholds

LANES = torch.arange(BATCH)
KINDS = [kind for kind in tiny.NETWORKS if kind != "dit_nan"]
each = pytest.mark.parametrize("kind", KINDS)


def test_every_family_is_asked() -> None:
    assert set(FAMILIES) <= set(KINDS)


@each
def test_the_whole_network_is_its_own_forward(kind: str) -> None:
    c = case(kind, PAPER, torch.float32)
    wanted = c.backbone(*c.given.all)[:, : c.given.x.shape[1]]
    found = forward(c, *c.given.all, policy=Full())
    torch.testing.assert_close(found.prediction, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.prediction, c.predictions[-1], rtol=1e-4, atol=1e-5)


@each
@settings(max_examples=8)
@given(draw=st.data())
def test_any_exit_pattern_gives_each_sample_its_own_layer(kind: str, draw: st.DataObject) -> None:
    c = case(kind, PAPER, torch.float32)
    layers = draw.draw(st.lists(st.integers(1, c.num_layers), min_size=BATCH, max_size=BATCH))
    found = forward(c, *c.given.all, policy=Replay(), threshold=torch.tensor(layers, dtype=torch.float32))
    assert found.exit_layer.tolist() == layers
    torch.testing.assert_close(found.prediction, c.exiting(torch.tensor(layers)), rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("config", [PAPER, ExitConfig(head="block")], ids=["linear", "block"])
def test_samples_leave_by_their_uncertainty(kind: str, config: ExitConfig) -> None:
    c = case(kind, config, torch.float32)
    threshold = thresholds(c)
    found = forward(c, *c.given.all, policy=Threshold(0.5), threshold=threshold, record_scores=True)
    below = torch.cat([c.uncertainties[:-1] < threshold, torch.ones(1, BATCH, dtype=torch.bool)])
    assert torch.equal(found.exit_layer.long(), below.int().argmax(0) + 1)
    torch.testing.assert_close(found.prediction, c.exiting(found.exit_layer), rtol=1e-4, atol=1e-5)


@each
def test_a_sample_is_the_same_bits_in_any_batch(kind: str) -> None:
    c = case(kind, PAPER, torch.float32)
    own = {"policy": Threshold(0.5), "execution": ExecutionOptions(batch_invariant=True)}
    threshold = thresholds(c)
    everybody = forward(c, *c.given.all, threshold=threshold, **own)
    assert len(everybody.exit_layer.unique()) > 1
    for lanes in (LANES.flip(0), LANES[[3]], LANES[[7, 2, 11]]):
        some = forward(c, *c.given[lanes].all, threshold=threshold[lanes], **own)
        assert torch.equal(some.prediction, everybody.prediction[lanes])
        assert torch.equal(some.exit_layer, everybody.exit_layer[lanes])


@each
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_captured_pieces_do_the_same(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "is_fused", lambda *_: fused)
    c = case(kind, PAPER, torch.float32)
    with recorded(monkeypatch) as graphs:
        call = Captured(elsewhere(c), c, max_lanes=16)
        for _ in range(3):  # run, captured, replayed
            for depth in depths(BATCH, c.num_layers).values():
                call.agrees(LANES, policy=Replay(), threshold=depth)
    assert graphs.replays > 0


@each
def test_branches_are_the_block(kind: str) -> None:
    """What a fused pass makes of a block's branches is what the block itself gives, for rows in any order."""
    c = case(kind, PAPER, torch.float32)
    rows, cond = c.backbone.embed(*c.given.all)
    for block in c.backbone.blocks:
        if not hasattr(block, "branches") or block.skip_from is not None:
            continue
        lanes = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))[:8].int()
        x = rows[lanes.long()]
        wanted = block(x.clone(), cond, row_to_lane=lanes)
        found, _, _ = runner.fused_block(block, x.clone(), cond, None, lanes, None)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert {branch.unit for branch in block.branches} <= {"attention", "cross", "mlp"}
        assert sum(branch.macs(c.backbone.tokens) for branch in block.branches) == block.macs(c.backbone.tokens)
        rows = block(rows, cond)


@each
def test_patches_and_images(kind: str) -> None:
    c = case(kind, PAPER, torch.float32)
    images = c.given.x
    patches = c.backbone.patchify(images)
    assert patches.shape == (BATCH, c.backbone.tokens - c.backbone.num_prefix_tokens, c.backbone.patch_dim)
    assert torch.equal(c.backbone.unpatchify(patches), images)


CONFIGS = {"uvit": tiny.UVIT, "dit": tiny.DIT, "pixart": tiny.PIXART, "mmdit": tiny.MMDIT}
every_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str, exits: ExitConfig | None = PAPER, **change: object) -> Model:
    return tiny.served(ModelConfig(dataclasses.replace(CONFIGS[family], **change), "linear", exits=exits))


def conditions(model: Model, n: int) -> dict[str, Tensor]:
    """What `sample` is told of n samples, by name."""
    context = tiny.inputs(model.backbone, n).context
    return {"text_embeds": context} if context.is_floating_point() else {"class_labels": context}


def training(made: Model) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """The loss of three samples in float64, and the weights that learn: all but positions that are fixed."""
    made = made.double().requires_grad_(True)
    made.backbone.pos_embed.requires_grad_(isinstance(made.backbone, UViT))
    objective, given = Objective(made, TrainConfig()), tiny.inputs(made.backbone, 3)
    x, t, context = given.x.double(), given.t.round(), given.context
    context = context.double() if context.is_floating_point() else context
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    return lambda: objective(x, t, context, target)[0], {k: v for k, v in made.named_parameters() if v.requires_grad}


@every_family
def test_a_training_step_changes_the_loss_as_its_gradient_says(family: str) -> None:
    variance = {"learned_variance": False} if "learned_variance" in vars(CONFIGS[family]) else {}
    made = copy.deepcopy(model_of(family, exits=None, **variance))
    tiny.scramble(made.backbone, 0.1)  # so that the loss is no steeper than those one meets
    loss, weights = training(made)
    first = loss()
    first.backward()
    length = sum(float(weight.grad.square().sum()) for weight in weights.values())
    step = 1e-4 * float(first.detach()) / length  # the loss is float32: what it changes by has three digits
    ends = []
    with torch.no_grad():
        for steps in (1, -2):  # one step up the gradient, then one down from where it was
            for weight in weights.values():
                weight += steps * step * weight.grad
            ends.append(float(loss()))
    assert (ends[0] - ends[1]) / 2 == pytest.approx(step * length, rel=0.01)


@every_family
def test_every_weight_of_network_exits_and_variance_learns(family: str) -> None:
    loss, weights = training(copy.deepcopy(model_of(family)))
    loss().backward()
    assert [name for name, weight in weights.items() if weight.grad is None or not bool(weight.grad.any())] == []


@every_family
@pytest.mark.parametrize("policy", ["cache:threshold=1", "reuse:every=2", "reuse:every=2,level=layer+exit:0.5"])
def test_samples_reuse_and_are_the_same_bits_in_any_batch(family: str, policy: str) -> None:
    made = model_of(family)
    if "layer" in policy and not hasattr(made.backbone.blocks[0], "branches"):
        with pytest.raises(ValueError, match="branches"):
            adadiff.sample(made, 1, policy=policy, steps=4, **conditions(made, 1))
        return
    given, told = conditions(made, 5), {"policy": policy, "steps": 6, "seed": 8}
    own = {"execution": ExecutionOptions(batch_invariant=True)}
    together, report = adadiff.sample(made, 5, **told, **given, **own)
    assert report.reuses > 0
    plain, _ = adadiff.sample(made, 5, **{**told, "policy": "full"}, **given, **own)
    assert not torch.equal(together, plain)
    for i in range(5):
        mine = {name: values[i : i + 1] for name, values in given.items()}
        alone, _ = adadiff.sample(made, 1, **{**told, "seed": 8 + i}, **mine, **own)
        assert torch.equal(alone[0], together[i])


@every_family
def test_a_cache_that_never_hits_changes_no_bit(family: str) -> None:
    made = model_of(family)
    told = {"steps": 4, "seed": 2, **conditions(made, 3)}
    wanted, _ = adadiff.sample(made, 3, policy="full", **told)
    found, report = adadiff.sample(made, 3, policy="cache:threshold=0", **told)
    assert report.reuses == 0
    assert torch.equal(found, wanted)


@every_family
def test_a_narrow_network_is_its_part_of_the_whole_one(family: str) -> None:
    """The first third of heads and MLP channels: what the whole network makes where all others are silent."""
    if not hasattr(CONFIGS[family], "width"):
        pytest.skip("networks of this family are never narrow")
    slim = dataclasses.replace(model_of(family).config, widths=(1 / 3, 1.0), exits=None)
    made = tiny.served(slim)
    given = tiny.inputs(made.backbone, 3)
    silenced = copy.deepcopy(made)
    for block in silenced.backbone.blocks:
        for product, share in ((block.attn.proj, 1 / 3), (block.mlp.fc2, 1 / 3)):
            product.weight.detach()[:, round(product.in_features * share) :] = 0
    wanted = silenced.backbone(*given.all)
    torch.testing.assert_close(narrow(made, 1 / 3).backbone(*given.all), wanted, rtol=1e-4, atol=1e-5)


@every_family
def test_it_is_calibrated_for_a_budget(family: str) -> None:
    made = model_of(family)
    calibration = Calibrating(made, [0.7], n=16, steps=4, text_embeds=conditions(made, 16).get("text_embeds"))
    measured = calibration.run().budgets[0].adaptive
    assert measured.share == pytest.approx(0.7, abs=0.15)  # on 16 samples that it was not made by
    policy = calibration.model.calibration.policy("budget", 0.7)
    told = {"n": 16, "steps": 4, "seed": calibration.seed + 16, **conditions(made, 16)}
    if "class_labels" in told:  # in turns
        told["class_labels"] = torch.arange(16) % made.config.classes
    _, report = adadiff.sample(calibration.model, policy=policy, **told)
    assert report.macs / report.macs_full == measured.share


@every_family
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    made = model_of(family)
    adadiff.save(made, tmp_path / "model.safetensors")
    again = adadiff.load(tmp_path / "model.safetensors")
    assert again.config == made.config
    assert type(again.backbone) is FAMILIES[family].network
    given = tiny.inputs(made.backbone, 3)
    with torch.no_grad():
        assert torch.equal(again.backbone(*given.all), made.backbone(*given.all))
