"""Blocks whose biases, norms and scores belong to the pass that adds a branch: the same results, within rounding.

As a GPU runs them. Here the passes are PyTorch's, then Triton's in its interpreter, with the whole engine around them.
"""

import pytest
import torch
from torch import Tensor

from adadiff.forward import blocks
from adadiff.forward.blocks import advance
from adadiff.forward.forward import evaluate
from adadiff.policies.exit_policies import Replay, Threshold
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
from adadiff_kernels import dispatch
from numerics import assert_as_accurate
from sampler.tiny import BATCH, case

LANES = torch.arange(BATCH)
NETWORKS = [
    pytest.param("uvit", PAPER, id="uvit-paper"),
    pytest.param("uvit", OFFICIAL, id="uvit-official"),
    pytest.param("dit", PAPER, id="dit-paper"),
    pytest.param("adaln", PAPER, id="adaln-paper"),  # whose branches keep their biases
]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator that Triton has runs in its interpreter, where tensors of the CPU would get PyTorch."""
    pytest.importorskip("triton", reason="Triton is not installed")
    usual = dispatch.choose

    def choose(backend: str | None, *given: object, **named: object) -> str | None:
        return usual(backend or "triton", *given, **{**named, "needs_grad": False})

    monkeypatch.setattr(dispatch, "choose", choose)


def outputs(kind: str, config: ExitConfig, dtype: torch.dtype, fused: bool) -> list[tuple[Tensor, Tensor]]:
    """Rows and scores after every block."""
    c = case(kind, config, dtype)
    rows, cond = c.backbone.embed(*c.given.all)
    offsets, made = c.exits.offsets(cond.time, c.given.t), []
    for layer, block in enumerate(c.backbone.blocks, start=1):
        skip = None if block.skip_from is None else made[block.skip_from][0]
        score = c.exits.score(layer, offsets)
        rows, u = advance(block, rows, skip, cond, LANES.int(), score, fused=fused)
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
    """By the pass where it is fused, by the product otherwise; and the norm after it is the pass's, but the first."""
    calls: list[tuple[bool, bool]] = []
    usual = blocks.residual_uem

    def noted(*given: object, bias: Tensor | None = None, norm: object = None, **named: object) -> tuple:
        calls.append((bias is not None, norm is not None))
        return usual(*given, bias=bias, norm=norm, **named)

    monkeypatch.setattr(blocks, "residual_uem", noted)
    for kind, biased in (("uvit", True), ("dit", True), ("adaln", False)):
        layers = len(outputs(kind, PAPER, torch.float32, fused=True))
        assert calls == [(biased, True), (biased, False)] * layers
        calls.clear()
        outputs(kind, PAPER, torch.float32, fused=False)
        assert calls == [(False, False)] * 2 * layers
        calls.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("counts", ["sync", "lagged"])
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_an_evaluation_by_interpreted_kernels(kind: str, config: ExitConfig, counts: str) -> None:
    """Every kernel of an evaluation in its place: passes, scores, joins, leaves and what they move."""
    c = case(kind, config, torch.float32)
    depth = LANES * 5 % c.layers + 1.0
    result = evaluate(c.backbone, c.exits, Replay(), *c.given.all, threshold=depth, counts=counts, record=True)
    assert result.exit_layer.tolist() == depth.tolist()
    torch.testing.assert_close(result.eps, c.leaving(result.exit_layer), rtol=1e-5, atol=2e-5)
    asked = torch.arange(1, c.layers + 1)[:, None] <= depth  # all scores of the layers a lane has run
    torch.testing.assert_close(
        result.scores[:-1], c.uncertainties[:-1].where(asked[:-1], torch.nan).float(), rtol=0, atol=5e-6, equal_nan=True
    )


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_nan_stays_with_its_lane_through_interpreted_kernels() -> None:
    c = case("uvit", PAPER, torch.float32)
    hurt, others = c.given[LANES], LANES != 4
    hurt.x[4, 0, 1, 1] = torch.nan
    u = c.uncertainties[:-1].sort(0).values  # thresholds in the widest gap of each lane's scores
    gap, at = u.diff(dim=0)[:3].max(0)
    given = {"threshold": (u[at, LANES] + gap / 2).float(), "counts": "lagged"}
    clean, found = (evaluate(c.backbone, c.exits, Threshold(0.5), *g.all, **given) for g in (c.given, hurt))
    assert found.exit_layer[4] == c.layers
    assert torch.equal(found.exit_layer[others], clean.exit_layer[others])
    torch.testing.assert_close(found.eps[others], clean.eps[others], rtol=1e-5, atol=1e-5)
