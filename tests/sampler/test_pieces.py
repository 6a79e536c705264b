"""Pieces alone, how the host learns how long their blocks take, and what stands in for their graphs in tests."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from adadiff.forward.count_sync import Lagged, Measured
from adadiff.forward.pieces import Pieces
from pretend import DEVICE, PretendDevice
from recorder import RecordedGraphs


class Counted:
    """Graphs that count."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def aside(self, work: Callable[[], None]) -> None:
        self.did.append("aside")
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.did.append("capture")
        return lambda: self.did.append("replay")


def test_a_piece_is_run_then_captured_then_replayed() -> None:
    graphs = Counted()
    pieces = Pieces(graphs)
    for _ in range(4):
        pieces.run("a", lambda: None)
    assert graphs.did == ["aside", "capture", "replay", "replay", "replay"]
    assert len(pieces) == 1


def test_the_piece_used_least_recently_is_dropped() -> None:
    graphs = Counted()
    pieces = Pieces(graphs, limit=2)
    for key in "aabbaacc":  # c takes the place of b
        pieces.run(key, lambda: None)
    assert len(pieces) == 2
    graphs.did.clear()
    pieces.run("a", lambda: None)
    assert graphs.did == ["replay"]
    pieces.run("b", lambda: None)
    assert graphs.did == ["replay", "aside"]


# ---- the recorder is able to fail ----


@pytest.fixture
def device() -> Iterator[None]:
    with PretendDevice(strict=True):
        yield


@pytest.mark.usefixtures("device")
def test_the_recorder_shows_what_a_graph_would_do_wrong() -> None:
    graphs, x, out = RecordedGraphs(), torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    scale = [2.0]
    replay = graphs.capture(lambda: out.copy_(x * scale[0]))
    assert out.held.tolist() == [0, 0, 0]  # a capture does nothing
    replay()
    assert out.held.tolist() == [2, 2, 2]
    x.add_(1)
    scale[0] = 5.0
    replay()
    assert out.held.tolist() == [4, 4, 4]  # of the new values, by the number of the capture

    kept: list[Tensor] = []
    graphs.capture(lambda: kept.append(x + 1))()
    assert kept[0].held.isnan().all()  # memory of the pool, which others use
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graphs.capture(lambda: x.copy_(torch.ones(3).pin_memory(), non_blocking=True))


@pytest.mark.usefixtures("device")
def test_a_capture_changes_nothing() -> None:
    x = torch.ones(3, device=DEVICE)

    def work() -> None:
        x.mul_(2)
        x[1:].add_(1)
        torch.mul(x, 2, out=x)

    replay = RecordedGraphs().capture(work)
    assert x.held.tolist() == [1, 1, 1]
    replay()
    assert x.held.tolist() == [4, 6, 6]


# ---- how the host learns of the count ----


class Counts:
    """A set whose count the host may wait for."""

    def __init__(self) -> None:
        self.waited: list[int] = []

    def wait(self, layer: int) -> int:
        self.waited.append(layer)
        return 9

    def seen(self) -> SimpleNamespace:
        return SimpleNamespace(count=9)


@pytest.mark.parametrize(("seconds", "waits"), [(400e-6, [1, 2, 3, 4, 5]), (200e-6, [1, 2, 3, 4])])
def test_long_blocks_are_waited_for_and_short_ones_are_one_late(seconds: float, waits: list[int]) -> None:
    """The first pass is slow, since kernels are compiled in it, and the host is late once."""
    now, active = [0.0], Counts()
    measured = Measured(clock=lambda: now[0])

    def a_pass(*speeds: float) -> list[int]:
        active.waited.clear()
        for layer, speed in enumerate(speeds, start=1):
            now[0] += seconds * speed
            assert measured.bound(active, list(range(1, layer + 1)), 9) == 9
        return active.waited

    assert a_pass(50, 50, 50, 50, 50, 50) == [1, 2, 3, 4, 5, 6]
    assert a_pass(50, 1, 1.9, 0.1, 1) == [1, 2, 3, 4, 5]
    assert measured.seconds(9) == pytest.approx(seconds)
    assert measured.seconds(8) is None
    assert a_pass(50, 1, 1, 1, 1) == waits
    assert Lagged(1).bound(active, [1], 9) == 9  # the first exit of a pass has none before it
