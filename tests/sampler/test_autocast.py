"""Under autocast rows stay float32 beside bfloat16 branches, and scores float32: the published U-ViTs ran so."""

import pytest
import torch

from adadiff.forward import blocks
from adadiff.forward.forward import ForwardOutput, evaluate
from adadiff.policies.exit_policies import Replay
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
from adadiff_kernels import uem_score_reference
from sampler.tiny import BATCH, case


@pytest.mark.parametrize("counts", [None, "sync", "lagged"])
@pytest.mark.parametrize(("kind", "config"), [("uvit", PAPER), ("uvit", OFFICIAL), ("dit", PAPER)])
def test_an_evaluation_under_autocast(kind: str, config: ExitConfig, counts: str | None, monkeypatch) -> None:
    """PAPER's scores are one number a token, OFFICIAL's a map with heads of their own."""
    c, dtypes = case(kind, config, torch.float32), set()
    usual = blocks.residual_uem

    def noted(x: torch.Tensor, branch: torch.Tensor, **given: object) -> tuple:
        dtypes.add((x.dtype, branch.dtype))
        return usual(x, branch, **given)

    def run(how: object = None) -> ForwardOutput:
        layers = len(c.backbone.blocks)
        threshold = torch.arange(BATCH) % layers + 1.0
        given = {"threshold": threshold, "record": True, "counts": how}
        return evaluate(c.backbone, c.exits, Replay(), *c.given.all, **given)

    exact = run()
    monkeypatch.setattr(blocks, "residual_uem", noted)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(counts)
    assert dtypes == {(torch.float32, torch.bfloat16)}
    assert torch.equal(found.exit_layer, exact.exit_layer)
    assert found.scores.dtype == torch.float32
    size = exact.eps.norm()
    assert 0 < (found.eps.float() - exact.eps).norm() <= 0.05 * size
    asked = exact.scores.isfinite()
    assert torch.equal(asked, found.scores.isfinite())
    assert (found.scores - exact.scores)[asked].abs().max() < 0.02


@pytest.mark.parametrize("config", [PAPER, OFFICIAL])
def test_scores_are_of_float32_products(config: ExitConfig) -> None:
    c = case("uvit", config, torch.float32)
    rows, cond = c.backbone.embed(*c.given.all)
    lanes = torch.arange(BATCH, dtype=torch.int32)
    offsets = c.exits.offsets(cond.time, c.given.t)
    u = uem_score_reference(rows, c.exits.score(3, offsets), lanes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(c.exits.offsets(cond.time, c.given.t), offsets)
        assert torch.equal(uem_score_reference(rows, c.exits.score(3, offsets), lanes), u)
