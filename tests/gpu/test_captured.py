"""Captured pieces on a GPU, at the size of U-ViT-S/2: the predictions and exits of eager passes, no waiting, and not
much more memory. What they do without a GPU is tested in tests/sampler/test_captured.py."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import adadiff
from adadiff import Engine, ExecutionOptions, ForwardOutput
from adadiff.models.layers import Mlp, has_epilogue
from adadiff.policies.exits import Replay, Threshold
from gpu.test_engine import BATCH, DEVICE, PATTERNS, inputs, model

pytestmark = pytest.mark.gpu
BRAIN = torch.bfloat16


def run(exits: Tensor, lanes: int = BATCH, **options: object) -> ForwardOutput:
    x, t = inputs(torch.float32)
    given = {"policy": Replay(), "threshold": exits[:lanes].float(), "execution": ExecutionOptions(**options)}
    return adadiff.forward(model(torch.float32), x[:lanes], t[:lanes], **given)


@pytest.mark.parametrize("count_sync", [None, "sync", "lagged"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_equal_eager(pattern: str, count_sync: str | None) -> None:
    """Any number of lanes through one space; run, captured and replayed."""
    exits = torch.tensor(PATTERNS[pattern], device=DEVICE)
    for lanes in (BATCH, 5, 1):
        eager = run(exits, lanes)
        for _ in range(4):
            found = run(exits, lanes, runner="captured", max_lanes=20, count_sync=count_sync)
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
            run(exits, **options)
        return torch.cuda.max_memory_allocated()

    eager = peak()
    assert peak(runner="captured") <= 1.15 * eager + 2**24


@pytest.mark.parametrize("dtype", [torch.float32, BRAIN])
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
