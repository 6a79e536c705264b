"""Blocks are called plainly, or fused, as on a GPU: biases, norms and scores belong to the pass that adds a branch.

Both give the same results, within rounding. Here the passes are PyTorch's, then Triton's in its interpreter, with the
whole forward pass around them. Which of the two is run is the network's and the device's, see `BlockRunner`.
"""

import copy
import logging
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from adadiff.forward import runner
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.forward.placement import Skip
from adadiff.forward.runner import fused_block, plain_block
from adadiff.policies.exits import Replay
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
from adadiff_kernels import LayerScores, dispatch
from numerics import assert_as_accurate
from sampler.tiny import BATCH, Case, case

LANES = torch.arange(BATCH)
NETWORKS = [
    pytest.param("uvit", PAPER, id="uvit-paper"),
    pytest.param("uvit", OFFICIAL, id="uvit-official"),
    pytest.param("dit", PAPER, id="dit-paper"),
    pytest.param("adaln", PAPER, id="adaln-paper"),  # whose branches keep their biases
]
COUNT_SYNCS = [None, "sync", "lagged"]  # None: the host decides


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator that Triton has runs in its interpreter, where tensors of the CPU would get PyTorch."""
    pytest.importorskip("triton", reason="Triton is not installed")
    usual = dispatch.choose

    def choose(backend: str | None, *given: object, **named: object) -> str | None:
        return usual(backend or "triton", *given, **{**named, "needs_grad": False})

    monkeypatch.setattr(dispatch, "choose", choose)


def outputs(kind: str, config: ExitConfig, dtype: torch.dtype, fused: bool) -> list[tuple[Tensor, Tensor]]:
    """Rows and scores after every block. Fused, the pass that ends a block writes the first norm of the next one, where
    that joins no skip."""
    c = case(kind, config, dtype)
    rows, cond = c.backbone.embed(*c.given.all)
    scores = LayerScores(c.exits.weight, c.exits.offsets(cond.time, c.given.t), c.exits.num_prefix_tokens)
    lanes, made, normed = LANES.int(), [], None
    blocks = c.backbone.blocks
    for layer, block in enumerate(blocks, start=1):
        skip = None if block.skip_from is None else made[block.skip_from][0]
        if fused:
            own = None if skip is None else Skip(skip, None, None)
            joins = layer == len(blocks) or blocks[layer].skip_from is not None
            after = None if joins else blocks[layer].branches[0].norm(cond)
            rows, normed, u = fused_block(block, rows, cond, own, lanes, scores.of(layer), normed, after)
            assert (normed is None) == (after is None)
        else:
            rows = plain_block(block, rows, cond, skip, None, None)
            u = scores(rows, layer, lanes).clone()  # good until the next call
        made.append((rows, u))
    return made


@torch.no_grad()
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_fused_blocks_are_as_accurate(kind: str, config: ExitConfig) -> None:
    apart, together = (outputs(kind, config, torch.float32, fused) for fused in (False, True))
    exact = outputs(kind, config, torch.float64, fused=False)
    for (same, u), (found, fused_u), (rows, exact_u) in zip(apart, together, exact, strict=True):
        assert_as_accurate(found, same, rows)
        torch.testing.assert_close(fused_u, u, rtol=0, atol=5e-6)
        torch.testing.assert_close(fused_u.double(), exact_u.double(), rtol=0, atol=5e-6)


@torch.no_grad()
def test_a_bias_is_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pass where it is fused, by the product otherwise; and every norm is a pass's, but the first of the network
    and those that come after the join of a skip."""
    calls: list[tuple[bool, bool]] = []
    usual = runner.residual_uem

    def noted(*given: object, bias: Tensor | None = None, norm: object = None, **named: object) -> tuple:
        calls.append((bias is not None, norm is not None))
        return usual(*given, bias=bias, norm=norm, **named)

    monkeypatch.setattr(runner, "residual_uem", noted)
    for kind, biased in (("uvit", True), ("dit", True), ("adaln", False)):
        outputs(kind, PAPER, torch.float32, fused=True)
        blocks = case(kind, PAPER, torch.float32).backbone.blocks
        ahead = [block.skip_from is None for block in blocks[1:]] + [False]
        assert any(ahead)
        assert calls == [(biased, norm) for follows in ahead for norm in (True, follows)]
        calls.clear()
        outputs(kind, PAPER, torch.float32, fused=False)
        assert calls == []


# ---- which of the two is run ----


class Watched:
    """The block calls of forward passes: how each was made, by the order of the blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        for name in ("plain_block", "fused_block"):
            monkeypatch.setattr(runner, name, self._noted(name, getattr(runner, name)))

    def _noted(self, name: str, function: object) -> object:
        def call(*given: object) -> object:
            self.calls.append(name.removesuffix("_block"))
            return function(*given)

        return call

    def of(self, model: object, c: Case, **options: object) -> tuple[list[str], ForwardOutput]:
        """Of one forward pass, everybody staying to the end: a call for each block."""
        self.calls.clear()
        result = forward(model, *c.given.all, **options)
        return list(self.calls), result


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


class Only:
    """A block of which nothing is known but its call, as of those of others."""

    def __init__(self, block: object):
        self._block, self.skip_from, self.macs = block, block.skip_from, block.macs

    def __call__(self, *given: object) -> Tensor:
        return self._block(*given)


def with_blocks(c: Case, blocks: list) -> SimpleNamespace:
    backbone = copy.deepcopy(c.backbone)
    backbone._modules.pop("blocks", None)
    backbone.blocks = blocks
    return SimpleNamespace(backbone=backbone, exits=c.exits)


@pytest.mark.parametrize("count_sync", COUNT_SYNCS)
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_a_device_fuses_what_it_has_a_kernel_for(kind, config, count_sync, watched, monkeypatch) -> None:
    """By a device's placement, and only where `is_fused` says so, which is asked about the rows and the outputs."""
    c, asked = case(kind, config, torch.float32), []
    execution, stays = ExecutionOptions(count_sync=count_sync), torch.full((BATCH,), float(c.num_layers))
    for serves in (False, True):
        monkeypatch.setattr(runner, "is_fused", lambda x, P, serves=serves: asked.append((*x.shape, P)) or serves)
        calls, result = watched.of(c, c, policy=Replay(), threshold=stays, execution=execution)
        expected = "fused" if serves and count_sync is not None else "plain"
        assert calls == [expected] * c.num_layers
        torch.testing.assert_close(result.prediction, c.predictions[-1], rtol=1e-5, atol=2e-5)
    if count_sync is None:
        assert asked == []
    else:
        assert asked == [(BATCH, c.backbone.tokens, c.backbone.dim, c.exits.outputs)] * 2


@pytest.mark.parametrize("count_sync", COUNT_SYNCS)
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_on_the_cpu_blocks_are_called_plainly(kind, config, count_sync, watched) -> None:
    """Whoever decides: there is no kernel there that would be one pass."""
    c = case(kind, config, torch.float32)
    calls, _ = watched.of(c, c, policy="full", execution=ExecutionOptions(count_sync=count_sync))
    assert calls == ["plain"] * c.num_layers


@pytest.mark.parametrize("kind", ["uvit", "dit", "adaln"])
@pytest.mark.parametrize("count_sync", ["sync", "lagged"])
def test_blocks_that_only_have_a_call_are_never_fused(kind, count_sync, watched, monkeypatch) -> None:
    """Any block with the plain call will do: it runs, is scored, joins and exits as one that has `branches`."""
    c = case(kind, PAPER, torch.float32)
    model = with_blocks(c, [Only(block) for block in c.backbone.blocks])
    monkeypatch.setattr(runner, "is_fused", lambda *_: True)
    depth = LANES * 3 % c.num_layers + 1.0
    given = {"policy": Replay(), "threshold": depth, "record_scores": True}
    calls, result = watched.of(model, c, **given, execution=ExecutionOptions(count_sync=count_sync))
    assert calls == ["plain"] * c.num_layers
    host = forward(model, *c.given.all, **given)
    for found in (result, host):
        assert found.exit_layer.tolist() == depth.tolist()
        torch.testing.assert_close(found.prediction, c.exiting(found.exit_layer), rtol=1e-5, atol=2e-5)
        assert_scores(found, c, depth)


def test_fused_and_plain_blocks_take_turns(watched, monkeypatch) -> None:
    """In one network every block is run as it can be."""
    c = case("dit", PAPER, torch.float32)
    monkeypatch.setattr(runner, "is_fused", lambda *_: True)
    model = with_blocks(c, [Only(block) if i % 2 else block for i, block in enumerate(c.backbone.blocks)])
    depth = LANES * 3 % c.num_layers + 1.0
    given = {"policy": Replay(), "threshold": depth, "record_scores": True}
    calls, result = watched.of(model, c, **given, execution=ExecutionOptions(count_sync="lagged"))
    assert calls == ["fused", "plain"] * 2 + ["fused"]
    torch.testing.assert_close(result.prediction, c.exiting(result.exit_layer), rtol=1e-5, atol=2e-5)
    assert_scores(result, c, depth)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["uvit", "dit", "adaln"])
def test_full_gives_the_bits_of_the_plain_network(kind: str) -> None:
    """On the CPU: nothing is scored, nothing moves, and blocks are called as the network itself calls them."""
    c = case(kind, PAPER, torch.float32)
    rows, cond = c.backbone.embed(*c.given.all)
    made: list[Tensor] = []
    for block in c.backbone.blocks:
        rows = block(rows, cond, None if block.skip_from is None else made[block.skip_from])
        made.append(rows)
    wanted = c.backbone.head(rows[:, c.backbone.num_prefix_tokens :], cond, LANES.int())
    if c.backbone.learned_variance:
        wanted, variance = wanted.chunk(2, dim=1)
    if kind != "adaln":  # whose own forward states the formulas, and rounds as they do
        assert torch.equal(c.backbone(*c.given.all)[:, : c.given.x.shape[1]], wanted)
    for options in ({}, {"count_sync": "sync"}, {"count_sync": "lagged"}):
        result = forward(c, *c.given.all, policy="full", execution=ExecutionOptions(**options))
        assert torch.equal(result.prediction, wanted)
        assert not c.backbone.learned_variance or torch.equal(result.variance, variance)
        assert result.exit_layer.tolist() == [c.num_layers] * BATCH
        assert (result.rows_moved, result.macs) == (0, result.macs_full)


def test_what_a_kernel_cannot_take_runs_plainly_and_is_said_once(watched, interpreted, caplog, monkeypatch) -> None:
    """One line of the log for each size, whatever the number of forward passes."""
    c = case("dit", PAPER, torch.float32)
    module = import_module("adadiff_kernels.residual_uem")  # the package has a function of this name
    monkeypatch.setattr(module, "MAX_CHANNELS", 32)  # this network has 36
    module._too_large.cache_clear()
    execution, stays = ExecutionOptions(count_sync="lagged"), torch.full((BATCH,), float(c.num_layers))
    with caplog.at_level(logging.WARNING, "adadiff_kernels"):
        for _ in range(2):
            calls, result = watched.of(c, c, policy=Replay(), threshold=stays, execution=execution)
            assert calls == ["plain"] * c.num_layers
            torch.testing.assert_close(result.prediction, c.predictions[-1], rtol=1e-5, atol=2e-5)
    module._too_large.cache_clear()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "adadiff_kernels"]
    assert line == (
        "residual_uem: 36 channels with 1 outputs are more than the GPU kernel takes (32, 64); PyTorch serves instead"
    )


def assert_scores(result: ForwardOutput, c: Case, depth: Tensor) -> None:
    """All scores of the layers a lane has run, and no others."""
    asked = torch.arange(1, c.num_layers + 1)[:, None] <= depth
    torch.testing.assert_close(
        result.scores[:-1], c.uncertainties[:-1].where(asked[:-1], torch.nan).float(), rtol=0, atol=5e-6, equal_nan=True
    )


# ---- Triton's kernels in its interpreter ----


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("count_sync", ["sync", "lagged"])
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_a_forward_pass_by_interpreted_kernels(kind: str, config: ExitConfig, count_sync: str, watched) -> None:
    """Every kernel of a forward pass in its place: passes, scores, joins, exits and what they move."""
    c = case(kind, config, torch.float32)
    depth = LANES * 3 % c.num_layers + 1.0
    given = {"policy": Replay(), "threshold": depth, "record_scores": True}
    calls, result = watched.of(c, c, **given, execution=ExecutionOptions(count_sync=count_sync))
    assert calls == ["fused"] * c.num_layers
    assert result.exit_layer.tolist() == depth.tolist()
    torch.testing.assert_close(result.prediction, c.exiting(result.exit_layer), rtol=1e-5, atol=2e-5)
    assert_scores(result, c, depth)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_nan_stays_with_its_lane_through_interpreted_kernels() -> None:
    c = case("uvit", PAPER, torch.float32)
    hurt, others = c.given[LANES], LANES != 4
    hurt.x[4, 0, 1, 1] = torch.nan
    u = c.uncertainties[:-1].sort(0).values  # thresholds in the widest gap of each lane's scores
    gap, at = u.diff(dim=0)[:3].max(0)
    threshold, execution = (u[at, LANES] + gap / 2).float(), ExecutionOptions(count_sync="lagged")
    clean, found = (
        forward(c, *g.all, policy="exit:0.5", threshold=threshold, execution=execution) for g in (c.given, hurt)
    )
    assert found.exit_layer[4] == c.num_layers
    assert torch.equal(found.exit_layer[others], clean.exit_layer[others])
    torch.testing.assert_close(found.prediction[others], clean.prediction[others], rtol=1e-5, atol=1e-5)
