"""Block calls go through torch.compile whole, and one graph serves any number of rows."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import adadiff
from adadiff.forward import device as device_engine
from adadiff.forward import forward as host_engine
from adadiff.forward.blocks import advance, compile_advance
from adadiff.forward.forward import evaluate
from adadiff.policies.exit_policies import Replay
from adadiff.uem import PAPER
from sampler.tiny import BATCH, SERVED, case, served


@pytest.mark.parametrize("kind", ["uvit", "dit", "adaln"])
@torch.no_grad()
def test_one_graph_for_any_number_of_rows(kind: str) -> None:
    c = case(kind, PAPER, torch.float32)
    rows, cond = c.backbone.embed(*c.given.all)
    score = c.exits.score(1, c.exits.offsets(cond.time, c.given.t))
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


@pytest.mark.parametrize("kind", ["uvit", "dit"])
@torch.no_grad()
def test_a_plain_network_is_one_graph(kind: str) -> None:
    """Labels on the CPU, whose values are looked at before, must not split it."""
    c = case(kind, PAPER, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(c.backbone, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*c.given.all), c.backbone(*c.given.all), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("counts", [None, "lagged"])
def test_compiled_samples_are_the_same(counts: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the host's plan and by the device's, with a shallow model; without a compiler's minutes."""
    calls = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        def run(*inputs: object) -> object:
            calls.append(len(inputs))
            return graph(*inputs)

        return run

    torch.compiler.reset()
    made = compile_advance(backend=backend)
    for module in (host_engine, device_engine):
        monkeypatch.setattr(module, "compiled_advance", lambda: made)
    model = served()
    shallow = served(dataclasses.replace(SERVED, network=dataclasses.replace(SERVED.network, depth=2), exits=None))
    given = {"steps": 4, "seeds": [3, 1, 4, 1, 5], "labels": [0, 1, 2, 0, 1], "rule": "threshold:0.5", "counts": counts}
    given |= {"shallow_model": shallow, "t_switch": 600.0}
    plain, before = adadiff.sample(model, 5, **given)
    assert not calls
    images, report = adadiff.sample(model, 5, **given, compiled=True)
    assert calls
    assert torch.equal(report.exit_layer, before.exit_layer)
    torch.testing.assert_close(images, plain, rtol=1e-4, atol=1e-4)
    calls.clear()
    with adadiff.Engine(model, capacity=4, compiled=True, counts=counts) as engine:
        image = engine.submit(seed=3, label=0, steps=4, rule="threshold:0.5").result()
    assert calls
    torch.testing.assert_close(
        image,
        adadiff.sample(model, 1, steps=4, seeds=[3], labels=[0], rule="threshold:0.5")[0][0],
        rtol=1e-4,
        atol=1e-4,
    )


def test_lane_by_lane_is_not_compiled() -> None:
    model = served()
    for make in (
        lambda **given: adadiff.sample(model, 2, steps=2, labels=0, **given),
        lambda **given: adadiff.Engine(model, capacity=2, start=False, **given),
    ):
        with pytest.raises(ValueError, match="is not compiled; leave one"):
            make(compiled=True, batch_invariant=True)
