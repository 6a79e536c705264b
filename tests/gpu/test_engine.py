"""One forward pass with exits on a CUDA device, at the size of U-ViT-S/2, by each way of keeping the count of rows."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import adadiff
from adadiff import Engine, ExecutionOptions, ForwardOutput, Model
from adadiff.forward import runner
from adadiff.models.layers import Mlp, has_epilogue
from adadiff.policies.exits import Replay, Threshold
from adadiff.uem import PAPER
from numerics import assert_as_accurate

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
BATCH, LAYERS = 13, 13
STRATEGIES = ("sync", "sync:4", "lagged", "lagged:2")
PATTERNS = {
    "nobody": [LAYERS] * BATCH,
    "everybody": [1] * BATCH,
    "first lane": [1] + [LAYERS] * (BATCH - 1),
    "last lane": [LAYERS] * (BATCH - 1) + [1],
    "alternating": [1 + b % 2 * (LAYERS - 1) for b in range(BATCH)],
    "one by one": [1 + 5 * b % BATCH for b in range(BATCH)],
}


@cache
def model(dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    made = adadiff.build("cifar10_uvit_small", exits=PAPER)
    torch.nn.init.normal_(made.exits.weight, std=0.2)
    torch.nn.init.normal_(made.exits.time_weight, std=0.2)
    return made.to(DEVICE, dtype)


@cache
def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, t = torch.randn(BATCH, 3, 32, 32, generator=draw), torch.rand(BATCH, generator=draw) * 999
    return x.to(DEVICE, dtype), t.to(DEVICE, torch.float32)


@cache
@torch.no_grad()
def predictions(dtype: torch.dtype, exact: bool = False) -> Tensor:
    """[L, B, C, H, W]: blocks one after another, and the head of each layer. exact: in float64, of the same values."""
    own, given = model(dtype), inputs(dtype)
    if exact:
        own, given = copy.deepcopy(own).double(), tuple(value.double() for value in given)
    rows, cond = own.backbone.embed(*given)
    outputs: list[Tensor] = []
    for block in own.backbone.blocks:
        rows = block(rows, cond, None if block.skip_from is None else outputs[block.skip_from])
        outputs.append(rows)
    heads = [own.exits.head(own.backbone, layer) for layer in range(1, LAYERS + 1)]
    return torch.stack([head(h[:, 1:], cond, None) for head, h in zip(heads, outputs, strict=True)])


def exiting(predicted: Tensor, exit_layer: list[int]) -> Tensor:
    return predicted[[layer - 1 for layer in exit_layer], range(BATCH)]


def replay(
    dtype: torch.dtype, exit_layer: list[int], lanes: list[int] | None = None, **options: object
) -> ForwardOutput:
    """options: `ExecutionOptions`."""
    own, threshold = model(dtype), torch.tensor(exit_layer, dtype=torch.float32, device=DEVICE)
    x, t = (value if lanes is None else value[lanes] for value in inputs(dtype))
    return adadiff.forward(own, x, t, policy=Replay(), threshold=threshold, execution=ExecutionOptions(**options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exit_at_k_is_k_blocks_and_that_head(strategy: str, pattern: str, dtype: torch.dtype) -> None:
    exit_layer = PATTERNS[pattern]
    result = replay(dtype, exit_layer, count_sync=strategy)
    assert result.exit_layer.tolist() == exit_layer
    same, exact = (exiting(predictions(dtype, exact), exit_layer) for exact in (False, True))
    assert_as_accurate(result.prediction, same, exact)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_let_the_same_lanes_exit(strategy: str) -> None:
    """At thresholds that lie in the widest gap of each lane's scores, so that no exit hangs on rounding."""
    own, given = model(torch.float32), inputs(torch.float32)
    kept = adadiff.forward(own, *given, policy=Threshold(1e-6), record_scores=True)
    u = kept.scores[:-1].sort(dim=0).values  # [L - 1, B]
    gap = u.diff(dim=0).argmax(0)
    threshold = u.gather(0, gap[None]).add(u.gather(0, gap[None] + 1))[0] / 2
    wanted = [int((kept.scores[:-1, b] < threshold[b]).nonzero()[0]) + 1 for b in range(BATCH)]
    assert len(set(wanted)) > 1
    execution = ExecutionOptions(count_sync=strategy)
    result = adadiff.forward(own, *given, policy=Threshold(0.5), threshold=threshold, execution=execution)
    assert result.exit_layer.tolist() == wanted


def test_batch_invariant_means_bit_for_bit() -> None:
    exit_layer, lanes = PATTERNS["one by one"], [7, 0, 12]
    together = replay(torch.bfloat16, exit_layer, batch_invariant=True)
    part = replay(torch.bfloat16, [exit_layer[lane] for lane in lanes], lanes, batch_invariant=True)
    assert torch.equal(part.prediction, together.prediction[lanes])


def test_a_forward_pass_is_captured_and_replayed() -> None:
    """Its host knows no counts, so every block runs over all rows; new inputs come in the same memory."""
    own, threshold = model(torch.bfloat16), torch.tensor(PATTERNS["alternating"], device=DEVICE).float()
    x, t = (value.clone() for value in inputs(torch.bfloat16))

    def run() -> ForwardOutput:
        execution = ExecutionOptions(count_sync="lagged")
        return adadiff.forward(own, x, t, policy=Replay(), threshold=threshold, execution=execution)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the set and the kernels are made at the first call
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    assert set(captured.rows) == {BATCH}
    for pattern in ("alternating", "one by one"):
        threshold.copy_(torch.tensor(PATTERNS[pattern]))
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        found = captured.exit_layer.tolist(), captured.prediction.clone()
        expected = run()  # a set of its own: the graph keeps the one it holds
        assert found[0] == expected.exit_layer.tolist() == PATTERNS[pattern]
        torch.testing.assert_close(found[1], expected.prediction, rtol=2e-2, atol=2e-2)


def test_a_policys_own_threshold_is_captured_with_it() -> None:
    """Nothing of the CPU is needed while a graph is captured: not the thresholds that lanes do not bring either."""
    own, (x, t) = model(torch.bfloat16), inputs(torch.bfloat16)

    def run() -> ForwardOutput:
        return adadiff.forward(own, x, t, policy="exit:depth=4.5", execution=ExecutionOptions(count_sync="lagged"))

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert captured.exit_layer.tolist() == run().exit_layer.tolist()
    assert set(captured.exit_layer.tolist()) == {4, 5}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_are_fused(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a network whose size the kernel takes, with its score in the same pass."""
    calls = []
    for name in ("plain_block", "fused_block"):
        usual = getattr(runner, name)
        monkeypatch.setattr(runner, name, lambda *given, n=name, usual=usual: calls.append(n) or usual(*given))
    result = replay(torch.bfloat16, PATTERNS["nobody"], count_sync=strategy)
    assert calls == ["fused_block"] * LAYERS
    assert result.rows == (BATCH,) * LAYERS


# ---- captured pieces; what they do without a GPU is tested in tests/sampler/test_captured.py ----


def replayed(exits: Tensor, lanes: int = BATCH, **options: object) -> ForwardOutput:
    x, t = inputs(torch.float32)
    given = {"policy": Replay(), "threshold": exits[:lanes].float(), "execution": ExecutionOptions(**options)}
    return adadiff.forward(model(torch.float32), x[:lanes], t[:lanes], **given)


@pytest.mark.parametrize("count_sync", [None, "sync", "lagged"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_equal_eager(pattern: str, count_sync: str | None) -> None:
    """Any number of lanes through one space; run, captured and replayed."""
    exits = torch.tensor(PATTERNS[pattern], device=DEVICE)
    for lanes in (BATCH, 5, 1):
        eager = replayed(exits, lanes)
        for _ in range(4):
            found = replayed(exits, lanes, runner="captured", max_lanes=20, count_sync=count_sync)
            assert torch.equal(found.exit_layer, eager.exit_layer)
            torch.testing.assert_close(found.prediction, eager.prediction, rtol=1e-4, atol=1e-4)


def test_a_saturated_engine_never_waits() -> None:
    """Of its own accord, once pieces are captured: `result` is what waits."""
    own = model(torch.float32)
    execution = ExecutionOptions(runner="captured", count_sync="lagged")
    with Engine(own, 8, threaded=False, execution=execution, warm=True) as engine:
        seeds = iter(range(10**6))

        def fill() -> None:
            while engine.report.waiting < 4:
                seed = next(seeds)
                engine.submit(seed=seed, steps=3 + seed % 5, policy=Threshold(0.5))

        for _ in range(30):
            fill()
            engine.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(30):
                fill()
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_captured_passes_take_little_more_memory() -> None:
    exits = torch.tensor(PATTERNS["one by one"], device=DEVICE)

    def peak(**options: object) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            replayed(exits, **options)
        return torch.cuda.max_memory_allocated()

    eager = peak()
    assert peak(runner="captured") <= 1.15 * eager + 2**24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gelu_is_the_epilogue_of_its_product(dtype: torch.dtype) -> None:
    """Of a DiT's MLP, within what rounding the product apart makes."""
    torch.manual_seed(0)
    mlp = Mlp(144, 576, "tanh").to(DEVICE, dtype).requires_grad_(False)
    h = torch.randn(3, 65, 144, device=DEVICE, dtype=dtype)
    assert has_epilogue(mlp.fc1, h)
    exact = F.gelu(F.linear(h.double(), mlp.fc1.weight.double(), mlp.fc1.bias.double()), approximate="tanh")
    apart = F.gelu(mlp.fc1(h), approximate="tanh")
    error, usual = ((value.double() - exact).abs().max() for value in (mlp._gelu(h), apart))
    assert error <= 1.5 * usual + 1e-6
