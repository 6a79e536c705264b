"""Graphs stay whole where they hold an operator, one serves any number of rows, and CUDA graphs capture them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_leaves, tree_map_only

from adadiff_kernels import ActiveSet, DeviceSet, Score, residual_uem, settle_rows
from operators import CASES, DEVICE, B, Results, fused_pass, normal, serves, settles, skips, steps


def copied(value: object) -> object:
    return tree_map_only(Tensor, Tensor.clone, value)


def operators_of(counter: CompileCounterWithBackend) -> list[str]:
    """Ours, in the order of the last graph."""
    names = (str(node.target) for node in counter.graphs[-1].graph.nodes)
    return [name.split(".")[1] for name in names if name.startswith("adadiff_kernels.")]


@pytest.mark.parametrize(
    ("case", "backend", "expected"),
    [
        (fused_pass, "triton", {"residual_uem", "residual_uem_out"}),
        (fused_pass, "cpu", {"residual_uem", "residual_uem_out"}),
        (skips, "triton", {"join_skip"}),
        (settles, None, {"settle_rows"}),
        (settles, "triton", {"settle_rows"}),
        (settles, "reference", set()),
        (steps, "reference", {"solver_step"}),
    ],
)
def test_one_graph_holds_it_for_any_number_of_rows(case: Callable, backend: str | None, expected: set) -> None:
    """The first call makes a graph, the second one for any number; what is opaque has the same bits."""
    serves(backend)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, _ = case(5, backend)
    compiled = torch.compile(eager, backend=counter, fullgraph=True)
    tolerance = {"rtol": 0, "atol": 0} if expected else {"rtol": 1e-5, "atol": 1e-5}
    for n in (5, 4, 2):
        _, given = case(n, backend)
        other = copied(given)
        torch.testing.assert_close(compiled(*given), eager(*other), **tolerance)
        for own, wanted in zip(tree_leaves(given), tree_leaves(other), strict=True):  # the mutated ones too
            torch.testing.assert_close(own, wanted, **tolerance)
    assert counter.frame_count <= 2
    assert set(operators_of(counter)) == expected


@pytest.mark.slow
def test_the_compiler_copies_nothing() -> None:
    """Inductor writes where eager writes: into the branch, whose rows then move."""
    serves("cpu")

    def call(x: Tensor, w: Tensor, lanes: Tensor, score: Score, moves: Tensor, saved: Tensor) -> Results:
        branch = x @ w
        y, _, u = residual_uem(x, branch, row_to_lane=lanes, score=score, out=branch, backend="cpu")
        settle_rows(moves, y, saved)
        return y, u

    torch.compiler.reset()
    given = (normal(8, 3, 16), normal(16, 16), torch.arange(8).int(), Score(normal(1, 16), normal(8, 1), 1))
    given += (ActiveSet(8).exit_rows_where(torch.arange(8) % 2 == 0, 1), torch.zeros(8, 3, 16))
    found, (code, *_) = run_and_get_code(torch.compile(call, fullgraph=True, dynamic=True), *given)
    torch.testing.assert_close(found, call(*given), rtol=1e-6, atol=1e-6)
    body = code[code.index("def call(") : code.index("return (", code.index("def call("))]
    assert [body.count(f"ops.adadiff_kernels.{name}.default(") for name in ("residual_uem_out", "settle_rows")] == [
        1,
        1,
    ]
    assert body.count("empty_strided") == 1  # of the product
    assert "cpp_fused" not in body
    assert "copy" not in body


def test_rows_exit_inside_a_graph() -> None:
    class Opaque(DeviceSet):
        """Its steps go as the kernel's do."""

        def __init__(self) -> None:
            super().__init__(B, DEVICE, backend="reference")
            self._kernel = True

    def call(active: DeviceSet, u: Tensor, threshold: Tensor, y: Tensor, saved: Tensor) -> Results:
        active.start()
        settle_rows(active.exit_rows(u, threshold, 1, bound=B), y, saved)
        snapshot = torch.empty_like(active.lane_to_row)
        settle_rows(active.exit_rows(None, (u - 0.5).sign() * torch.inf, 2, bound=B, snapshot=snapshot), y, saved)
        return active.row_to_lane + 0, active.exit_layer + 0, active.count + 0, snapshot

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    eager, traced = DeviceSet(B, DEVICE, backend="reference"), Opaque()
    for _ in range(4):
        given = (
            torch.rand(B, device=DEVICE),
            torch.rand(B, device=DEVICE),
            normal(B, 3),
            torch.zeros(B, 3, device=DEVICE),
        )
        other = copied(given)
        for found, wanted in zip(compiled(traced, *given), call(eager, *other), strict=True):
            assert torch.equal(found, wanted)
        torch.testing.assert_close(given, other, rtol=0, atol=0)
    assert counter.frame_count <= 2
    assert operators_of(counter) == ["start_device_set", *["exit_rows", "settle_rows"] * 2]


@pytest.mark.gpu
def test_a_captured_graph_replays_every_operator() -> None:
    """New values in the same memory, and a set whose count only the device knows: the same results as eager calls."""
    active, other = DeviceSet(B, DEVICE), DeviceSet(B, DEVICE)
    everything = [case(5, "triton") for case in (fused_pass, skips, settles, steps)]
    threshold, y, saved = torch.rand(B, device=DEVICE), normal(B, 3), normal(B, 3)
    u = torch.rand(B, device=DEVICE)

    def run(own: DeviceSet, calls: list, y: Tensor) -> list[Results]:
        own.start()
        settle_rows(own.exit_rows(u, threshold, 1, bound=B), y, saved)
        return [call(*given) for call, given in calls]

    def again() -> list:
        return [(call, copied(given)) for call, given in everything]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())  # which has yet to make what is read
    with torch.cuda.stream(warm):  # kernels are compiled at their first call
        run(active, again(), y.clone())
    warm.synchronize()
    graph, captured, rows = torch.cuda.CUDAGraph(), again(), y.clone()
    with torch.cuda.graph(graph):
        results = run(active, captured, rows)
    for _ in range(3):
        for (_, given), (_, held) in zip(everything, captured, strict=True):
            for fresh, own in zip(tree_leaves(given), tree_leaves(held), strict=True):
                if isinstance(fresh, Tensor):
                    own.copy_(fresh.normal_() if fresh.is_floating_point() else fresh)
        u.uniform_()
        rows.copy_(y)
        graph.replay()
        active.replayed()
        expected = y.clone()
        wanted = run(other, again(), expected)
        torch.testing.assert_close((results, rows, active.row_to_lane), (wanted, expected, other.row_to_lane))
        assert active.wait(1) == other.wait(1)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_runs_what_inductor_makes_of_it(case: Callable) -> None:
    torch.compiler.reset()
    compiled = None
    for n in (5, 4, 3):
        call, given = case(n, None)
        compiled = compiled or torch.compile(call, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):  # warm, captured, replayed
            mine, other = copied(given), copied(given)
            torch.testing.assert_close(compiled(*mine), call(*other), rtol=1e-5, atol=1e-5)
