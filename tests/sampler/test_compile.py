"""Block calls go through torch.compile whole, and one graph serves any number of rows."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from adadiff.engine import device as device_engine
from adadiff.engine.blocks import advance, compile_advance
from adadiff.engine.evaluate import evaluate
from adadiff.exits import PAPER
from adadiff.rules import Replay
from sampler.tiny import BATCH, case


@pytest.mark.parametrize("kind", ["uvit", "dit", "adaln"])
@torch.no_grad()
def test_one_graph_for_any_number_of_rows(kind: str) -> None:
    c = case(kind, PAPER, torch.float32)
    rows, cond = c.backbone.begin(*c.given.all)
    score = c.exits.score(1, c.exits.offsets(cond.time))
    block = c.backbone.blocks[0]
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(advance, backend=backend, dynamic=True, fullgraph=True)
    graphs = []
    for n in (BATCH - 1, 7, 4, 2):
        lanes = torch.arange(BATCH, dtype=torch.int32).flip(0)[:n]
        found = compiled(block, rows[:n], None, cond, lanes, score)
        wanted = advance(block, rows[:n], None, cond, lanes, score)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        graphs.append(backend.frame_count)
    assert graphs[1:] == graphs[:1] * 3


@pytest.mark.slow
def test_blocks_of_every_kind_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose batch shrinks to one row takes more graphs than Dynamo makes of one function."""
    c = case("uvit", PAPER, torch.float32)
    backend = CompileCounterWithBackend("eager")

    def run(*batches: int) -> None:
        for B in batches:
            for counts in ("lagged", "sync"):
                threshold = torch.arange(B) % 7 + 1.0
                result = evaluate(c.backbone, c.exits, Replay(), *c.given[:B].all, threshold=threshold, counts=counts)
                assert result.exit_layer.tolist() == threshold.tolist()

    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        monkeypatch.setattr(device_engine, "advance", compile_advance(backend=backend, fullgraph=True))
        run(5, 1, 8)
        made = backend.frame_count
        assert made > 4
        run(6)
        assert backend.frame_count == made
        one = torch.compile(advance, dynamic=True, fullgraph=True, backend=backend)
        monkeypatch.setattr(device_engine, "advance", one)
        with pytest.raises(Exception, match="recompile_limit"):
            run(5, 1, 8)
