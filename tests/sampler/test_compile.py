"""Block calls go through torch.compile whole, and one graph serves any number of rows."""

import dataclasses
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from adadiff.engine.engine import Engine
from adadiff.forward import runner
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.runner import compile_each_kind, fused_block, plain_block
from adadiff.policies.exits import Replay
from adadiff.sampling.sampler import sample
from adadiff.uem import PAPER
from adadiff_kernels import LayerScores
from sampler.tiny import BATCH, SERVED, case, served


def compile_with(monkeypatch: pytest.MonkeyPatch, how: Callable[[Callable], Callable], fused: bool) -> None:
    """Compiled runs go through `how`; fused: blocks on a device are fused, as on a GPU, by PyTorch's passes."""
    monkeypatch.setattr(runner, "compiled_function", cache(how))
    monkeypatch.setattr(runner, "is_fused", lambda *_: fused)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", ["uvit", "dit", "adaln"])
@torch.no_grad()
def test_one_graph_for_any_number_of_rows(kind: str, fused: bool) -> None:
    c = case(kind, PAPER, torch.float32)
    rows, cond = c.backbone.embed(*c.given.all)
    score = LayerScores(c.exits.weight, c.exits.offsets(cond.time, c.given.t), c.exits.num_prefix_tokens).of(1)
    block = c.backbone.blocks[0]
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    function = fused_block if fused else plain_block
    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
    graphs = []
    for n in (BATCH - 1, 7, 4, 2):
        lanes = torch.arange(BATCH, dtype=torch.int32).flip(0)[:n]
        given = (block, rows[:n], cond, None, *((lanes, score) if fused else (None, lanes)))
        found, wanted = compiled(*given), function(*given)
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
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_blocks_of_every_kind_stay_compiled(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose batch shrinks to one row takes more graphs than Dynamo makes of one function."""
    c = case("uvit", PAPER, torch.float32)
    backend = CompileCounterWithBackend("eager")

    def run(*batches: int) -> None:
        for B in batches:
            for count_sync in ("lagged", "sync"):
                threshold = 7.0 - torch.arange(B) % 7
                execution = ExecutionOptions(count_sync=count_sync, runner="compiled")
                result = forward(c, *c.given[:B].all, policy=Replay(), threshold=threshold, execution=execution)
                assert result.exit_layer.tolist() == threshold.tolist()

    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        compile_with(monkeypatch, lambda function: compile_each_kind(function, backend=backend, fullgraph=True), fused)
        run(5, 1, 8)
        made = backend.frame_count
        assert made > 4
        run(6)
        assert backend.frame_count == made
        one = {"dynamic": True, "fullgraph": True, "backend": backend}
        compile_with(monkeypatch, lambda function: torch.compile(function, **one), fused)
        with pytest.raises(Exception, match="recompile_limit"):
            run(5, 1, 8)


@pytest.mark.parametrize(
    ("count_sync", "fused"), [(None, True), ("lagged", False), ("lagged", True)], ids=["host", "plain", "fused"]
)
def test_compiled_samples_are_the_same(count_sync: str | None, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host decides and where a device does, with a shallow model; without a compiler's minutes."""
    calls, compiled = [], []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        def run(*inputs: object) -> object:
            calls.append(len(inputs))
            return graph(*inputs)

        return run

    def how(function: Callable) -> Callable:
        compiled.append(function)
        return compile_each_kind(function, backend=backend)

    torch.compiler.reset()
    compile_with(monkeypatch, how, fused)
    model = served()
    shallow = served(dataclasses.replace(SERVED, network=dataclasses.replace(SERVED.network, depth=2), exits=None))
    given = {"steps": 4, "seed": [3, 1, 4, 1, 5], "class_labels": [0, 1, 2, 0, 1], "policy": "exit:0.5"}
    given |= {"shallow_model": shallow, "t_switch": 600.0}
    plain, before = sample(model, 5, **given, execution=ExecutionOptions(count_sync=count_sync))
    assert not calls
    execution = ExecutionOptions(count_sync=count_sync, runner="compiled")
    images, report = sample(model, 5, **given, execution=execution)
    assert calls
    assert set(compiled) == {plain_block, fused_block}
    assert torch.equal(report.exit_layer, before.exit_layer)
    torch.testing.assert_close(images, plain, rtol=1e-4, atol=1e-4)
    calls.clear()
    with Engine(model, capacity=4, execution=execution) as engine:
        image = engine.submit(seed=3, class_labels=0, steps=4, policy="exit:0.5").result()
    assert calls
    torch.testing.assert_close(
        image,
        sample(model, 1, steps=4, seed=3, class_labels=0, policy="exit:0.5")[0][0],
        rtol=1e-4,
        atol=1e-4,
    )


def test_lane_by_lane_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="is not compiled; leave one"):
        ExecutionOptions(runner="compiled", batch_invariant=True)
