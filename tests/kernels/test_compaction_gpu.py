"""What only a GPU shows of a `DeviceSet`: large sizes, graphs, and that nothing waits. See
test_compaction_device.py."""

import math

import pytest
import torch
from torch import Tensor

from adadiff_kernels import ActiveSet, CountSnapshot, DeviceSet, settle_rows
from adadiff_kernels.compaction.device_set import kernel_missing

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernel() -> None:
    if (missing := kernel_missing(torch.device("cuda"))) is not None:
        pytest.skip(missing)


def scores(layers: int, lanes: int, seed: int) -> Tensor:
    return torch.rand(layers, lanes, generator=torch.Generator().manual_seed(seed)).masked_fill(
        torch.arange(lanes) % 11 == 5, math.nan
    )


@pytest.mark.parametrize("lanes", [64, 4096, 32768])
def test_many_lanes_as_on_the_host(lanes: int) -> None:
    host, active = ActiveSet(lanes), DeviceSet(lanes, "cuda", backend="cuda")
    threshold = torch.full((lanes,), 0.3)
    for layer, u in enumerate(scores(5, lanes, lanes), start=1):
        bound = min(lanes, host.count + 7)
        wanted = host.exit_rows_where(u[: host.count] < threshold[: host.count], layer)
        snapshot = torch.empty_like(active.lane_to_row)
        moves = active.exit_rows(u[:bound].cuda(), threshold.cuda(), layer, bound=bound, snapshot=snapshot).cpu()
        assert torch.equal(moves[: len(wanted)], wanted)
        assert bool((moves[len(wanted) :] == -1).all())
        assert torch.equal(snapshot.cpu(), host.lane_to_row)
        for name in ("row_to_lane", "lane_to_row", "exit_layer"):
            assert torch.equal(getattr(active, name).cpu(), getattr(host, name)), name
        assert active.seen() == CountSnapshot(layer, host.count)


def test_more_lanes_than_a_block_handles_are_refused() -> None:
    with pytest.raises(ValueError, match="num_lanes must be an int from 0 to 32768, got 32769"):
        DeviceSet(32769, "cuda", backend="cuda")


def test_a_captured_tick_replays() -> None:
    lanes, layers = 64, 4
    active = DeviceSet(lanes, "cuda", backend="cuda")
    u, threshold = torch.empty(layers, lanes, device="cuda"), torch.full((lanes,), 0.3, device="cuda")
    x, saved = torch.empty(2, lanes, 33, device="cuda")

    def tick() -> None:
        active.start()
        x.copy_(torch.arange(lanes, device="cuda")[:, None].expand(lanes, 33))
        for layer in range(1, layers + 1):
            settle_rows(active.exit_rows(u[layer - 1], threshold, layer, bound=lanes), x, saved)

    tick()  # what compiles on first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tick()
    for seed in range(3):
        u.copy_(scores(layers, lanes, seed))
        host = ActiveSet(lanes)
        for layer in range(1, layers + 1):
            host.exit_rows_where(u[layer - 1, : host.count].cpu() < 0.3, layer)
        graph.replay()
        active.replayed()
        assert active.wait(layers) == host.count
        torch.cuda.synchronize()
        assert torch.equal(active.row_to_lane.cpu(), host.row_to_lane)
        assert torch.equal(active.exit_layer.cpu(), host.exit_layer)
        assert x[: host.count, 7].tolist() == host.running.tolist()
        left = host.exit_layer > 0
        assert saved[left.cuda(), 7].tolist() == left.nonzero().flatten().tolist()


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_nothing_waits_for_the_device(backend: str) -> None:
    active = DeviceSet(64, "cuda", backend=backend)
    u, threshold = torch.zeros(64, device="cuda"), torch.full((64,), 0.5, device="cuda")
    partner, snapshot = active.row_to_lane.clone(), active.row_to_lane.clone()
    x, saved = torch.zeros(2, 64, 8, device="cuda")

    def tick() -> None:
        active.start()
        moves = active.exit_rows(u, threshold, 1, bound=64, partner=partner, snapshot=snapshot)
        settle_rows(moves, x, saved, backend="triton")
        settle_rows(moves, x, saved, backend="reference")
        active.locate(active.snapshot(), 64)
        active.finish(2, bound=64)

    tick()  # kernels are compiled or loaded at their first call, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)  # cycles
        tick()
        assert active.seen() == CountSnapshot(0, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert active.wait(2) == 0
    torch.cuda.synchronize()
    assert active.seen() == CountSnapshot(2, 0)
    assert active.exit_layer.tolist() == [1] * 64


def test_waiting_for_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no exit at layer 3 has been queued"):
        DeviceSet(4, "cuda", backend="cuda").wait(3)
