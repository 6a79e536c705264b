"""What every network of the package has to do, asked of each by its name: a further one is a line in tiny.NETWORKS.

Wanted values are those of the network's own plain modules, one sample at a time (tiny.case).
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adadiff.forward import runner
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.models import FAMILIES
from adadiff.policies.exits import Full, Replay, Threshold
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


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    import adadiff
    from adadiff.config import ModelConfig

    config = {"uvit": tiny.UVIT, "dit": tiny.DIT, "pixart": tiny.PIXART, "mmdit": tiny.MMDIT}[family]
    made = adadiff.Model(ModelConfig(config, "linear", exits=PAPER)).eval()
    tiny.scramble(made, 0.2)
    adadiff.save(made, tmp_path / "model.safetensors")
    again = adadiff.load(tmp_path / "model.safetensors")
    assert again.config == made.config
    given = tiny.inputs(made.backbone, 3)
    with torch.no_grad():
        assert torch.equal(again.backbone(*given.all), made.backbone(*given.all))
    assert isinstance(SimpleNamespace(backbone=again.backbone).backbone, FAMILIES[family].network)
