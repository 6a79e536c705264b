"""Under autocast rows stay float32 beside bfloat16 branches, and scores float32: the published U-ViTs ran so."""

import pytest
import torch
from torch import nn

from adadiff.forward import runner
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.forward.runner import plain_block
from adadiff.models import layers
from adadiff.policies.exits import Replay
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
from adadiff_kernels import LayerScores, uem_score_reference
from sampler.tiny import BATCH, case


@pytest.mark.parametrize(
    ("count_sync", "fused"), [(None, False), ("sync", False), ("sync", True), ("lagged", False), ("lagged", True)]
)
@pytest.mark.parametrize(("kind", "config"), [("uvit", PAPER), ("uvit", OFFICIAL), ("dit", PAPER)])
def test_a_forward_pass_under_autocast(
    kind: str, config: ExitConfig, count_sync: str | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PAPER's scores are one number a token, OFFICIAL's a map with heads of their own. fused: as on a GPU."""
    c, dtypes = case(kind, config, torch.float32), set()
    usual, mlp, rows = runner.residual_uem, layers.Mlp.forward, []

    def noted(x: torch.Tensor, branch: torch.Tensor, **given: object) -> tuple:
        dtypes.add(("fused", x.dtype, branch.dtype))
        return usual(x, branch, **given)

    def noted_block(block: nn.Module, hidden: torch.Tensor, *given: object) -> torch.Tensor:
        rows.append(hidden.dtype)
        return plain_block(block, hidden, *given)

    def noted_mlp(self: layers.Mlp, *given: object) -> torch.Tensor:
        branch = mlp(self, *given)
        if rows:
            dtypes.add(("plain", rows[-1], branch.dtype))
        return branch

    def run(how: str | None = None) -> ForwardOutput:
        threshold = torch.arange(BATCH) % c.num_layers + 1.0
        given = {"threshold": threshold, "record_scores": True, "execution": ExecutionOptions(count_sync=how)}
        return forward(c, *c.given.all, policy=Replay(), **given)

    exact = run()
    monkeypatch.setattr(runner, "residual_uem", noted)
    monkeypatch.setattr(runner, "plain_block", noted_block)
    monkeypatch.setattr(layers.Mlp, "forward", noted_mlp)
    if fused:
        monkeypatch.setattr(runner, "is_fused", lambda *_: True)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(count_sync)
    assert dtypes == {("fused" if fused else "plain", torch.float32, torch.bfloat16)}
    assert torch.equal(found.exit_layer, exact.exit_layer)
    assert found.scores.dtype == torch.float32
    size = exact.prediction.norm()
    assert 0 < (found.prediction.float() - exact.prediction).norm() <= 0.05 * size
    asked = exact.scores.isfinite()
    assert torch.equal(asked, found.scores.isfinite())
    assert (found.scores - exact.scores)[asked].abs().max() < 0.02


@pytest.mark.parametrize("config", [PAPER, OFFICIAL])
def test_scores_are_of_float32_products(config: ExitConfig) -> None:
    c = case("uvit", config, torch.float32)
    rows, cond = c.backbone.embed(*c.given.all)
    lanes = torch.arange(BATCH, dtype=torch.int32)
    offsets = c.exits.offsets(cond.time, c.given.t)
    scores = LayerScores(c.exits.weight, offsets, c.exits.num_prefix_tokens)
    u = uem_score_reference(rows, scores.of(3), lanes)
    without = scores(rows, 3, lanes)
    assert torch.allclose(without, u, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(c.exits.offsets(cond.time, c.given.t), offsets)
        assert torch.equal(uem_score_reference(rows, scores.of(3), lanes), u)
        assert torch.equal(scores(rows, 3, lanes), without)
