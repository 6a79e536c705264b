"""Decisions, pairs and maps made on the device, against plain lists: by PyTorch anywhere, by the kernel on a GPU."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adadiff_kernels import ActiveSet, CountSnapshot, DeviceSet, extension, settle_rows, take_rows, upload
from adadiff_kernels.compaction import device_set
from adadiff_kernels.compaction.device_set import TICKS, PinnedCount, _packed, _start, kernel_missing, unpacked

Make = Callable[..., DeviceSet]
NAN, INF = math.nan, math.inf
# 31, 32, 33: around one warp of the kernel and one row a thread; 1025: two rows a thread.
BATCHES = [0, 1, 2, 3, 31, 32, 33, 65, 1025]
PATTERNS = {
    "none": lambda n: [False] * n,
    "all": lambda n: [True] * n,
    "first": lambda n: [r == 0 for r in range(n)],
    "last": lambda n: [r == n - 1 for r in range(n)],
    "all_but_first": lambda n: [r > 0 for r in range(n)],
    "lower_half": lambda n: [r < n // 2 for r in range(n)],
    "alternating": lambda n: [r % 2 == 0 for r in range(n)],
}


@pytest.fixture(params=["reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def made(request: pytest.FixtureRequest) -> Make:
    """Makes sets on the CPU, then by the kernel."""
    if request.param == "reference":
        return lambda lanes: DeviceSet(lanes, "cpu")
    if (missing := kernel_missing(torch.device("cuda"))) is not None:
        pytest.skip(missing)
    return lambda lanes: DeviceSet(lanes, "cuda", backend="cuda")


def on(active: DeviceSet, values: list, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=active.device)


class Lists:
    """The same set by lists, one row at a time."""

    def __init__(self, lanes: int) -> None:
        self.lane = list(range(lanes))
        self.exit_layer = [0] * lanes
        self.n = lanes
        self.moved = 0

    def leave(self, goes: list[bool], layer: int) -> list[list[int]]:
        """goes: by row, of those that run. Returns the moves."""
        rows = [r for r, leaves in enumerate(goes) if leaves]
        self.n = goes.count(False)
        up = [r for r, leaves in enumerate(goes) if not leaves and r >= self.n]
        moves = [[r, self.lane[r], up[k] if k < len(up) else -1] for k, r in enumerate(rows)]
        for row, lane, source in moves:
            self.exit_layer[lane] = layer
            if source >= 0:
                self.lane[row], self.lane[source] = self.lane[source], lane
        self.moved += 2 * len(up)
        return moves


def assert_same(active: DeviceSet, lists: Lists, moves: Tensor, expected: list[list[int]]) -> None:
    assert moves.dtype == torch.int32
    assert moves.tolist() == [*expected, *([[-1, -1, -1]] * (len(moves) - len(expected)))]
    assert active.row_to_lane.tolist() == lists.lane
    assert active.lane_to_row.tolist() == [lists.lane.index(lane) for lane in range(len(lists.lane))]
    assert active.exit_layer.tolist() == lists.exit_layer
    assert active.count.tolist() == [lists.n]
    assert active.moved.tolist() == [lists.moved]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n", BATCHES)
def test_chosen_patterns_as_on_the_host(made: Make, pattern: str, n: int) -> None:
    mask = torch.tensor(PATTERNS[pattern](n), dtype=torch.bool)
    host, active = ActiveSet(n), made(n)
    wanted = host.exit_rows_where(mask, 4)
    snapshot = torch.empty_like(active.lane_to_row)
    moves = active.exit_rows_where(mask.to(active.device), 4, bound=n, snapshot=snapshot)
    assert moves.shape == (n, 3)
    assert torch.equal(moves[: len(wanted)].cpu(), wanted)
    assert wanted[:, 0].tolist() == mask.nonzero().flatten().tolist() == wanted[:, 1].tolist()
    assert bool((moves[len(wanted) :] == -1).all())
    assert torch.equal(snapshot.cpu(), host.lane_to_row)
    for name in ("row_to_lane", "lane_to_row", "exit_layer"):
        assert torch.equal(getattr(active, name).cpu(), getattr(host, name)), name
    assert active.count.tolist() == [host.count]
    assert active.moved.tolist() == [host.moved]
    assert active.wait(4) == host.count
    assert active.seen() == CountSnapshot(4, host.count)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, list[dict]]:
    """Lanes and layers: scores and limits by lane, who is tied, how far the bound lies above the count."""
    lanes = draw(st.integers(0, 40))
    scores = st.sampled_from([0.1, 0.5, 0.9, NAN, INF, -INF])
    layer = st.fixed_dictionaries(
        {
            "u": st.none() | st.lists(scores, min_size=lanes, max_size=lanes),
            "threshold": st.lists(st.sampled_from([0.5, 0.6, INF, -INF]), min_size=lanes, max_size=lanes),
            "tied": st.booleans(),
            "slack": st.integers(0, lanes),
        }
    )
    return lanes, draw(st.lists(layer, max_size=5))


@pytest.mark.usefixtures("core")
@given(run=runs())
def test_random_runs(made: Make, run: tuple[int, list[dict]]) -> None:
    """u < threshold of the lane, or of both tied lanes; rows beyond the count hold what would leave at once."""
    lanes, layers = run
    active, host, lists = made(lanes), ActiveSet(lanes), Lists(lanes)
    partner = [lane ^ 1 if lane ^ 1 < lanes and lane % 8 < 4 else lane for lane in range(lanes)]
    x = torch.arange(lanes, device=active.device)[:, None].repeat(1, 3)  # every lane's data is its number
    saved = torch.full_like(x, -1)
    skips: list[tuple[Tensor, Tensor]] = []
    for layer, given_ in enumerate(layers, start=1):
        bound = min(lists.n + given_["slack"], lanes)
        u, threshold = given_["u"], given_["threshold"]
        alone = [threshold[lane] == INF or (u is not None and u[lane] < threshold[lane]) for lane in range(lanes)]
        running = lists.lane[: lists.n]
        tied = partner if given_["tied"] else list(range(lanes))
        goes = [alone[lane] and alone[tied[lane]] and tied[lane] in running for lane in running]
        snapshot = torch.full_like(active.lane_to_row, -7)
        skips.append((x[:bound] + 100 * layer, active.snapshot()))

        moves = active.exit_rows(
            None
            if u is None
            else on(active, [u[lane] for lane in running] + [-1.0] * (bound - lists.n), torch.float32),
            on(active, threshold, torch.float32),
            layer,
            bound=bound,
            partner=on(active, partner, torch.int32) if given_["tied"] else None,
            snapshot=snapshot,
        )
        on_host = host.exit_rows(
            None if u is None else torch.tensor([u[lane] for lane in running], dtype=torch.float32),
            torch.tensor(threshold, dtype=torch.float32),
            layer,
            partner=torch.tensor(partner, dtype=torch.int32) if given_["tied"] else None,
        )
        wanted = lists.leave(goes, layer)
        assert_same(active, lists, moves, wanted)
        assert on_host.tolist() == wanted
        assert (host.row_to_lane.tolist(), host.exit_layer.tolist()) == (lists.lane, lists.exit_layer)
        assert (host.count, host.moved) == (lists.n, lists.moved)
        assert torch.equal(snapshot, active.lane_to_row)
        settle_rows(moves, x, saved)
        assert x[: lists.n, 1].tolist() == lists.lane[: lists.n]
        assert saved[:, 2].tolist() == [lane if lists.exit_layer[lane] else -1 for lane in range(lanes)]
        for written, (skip, then) in enumerate(skips, start=1):
            index = active.locate(then, lists.n)
            found = take_rows(skip, index.long(), lists.n)[:, 0].tolist()
            assert found == [100 * written + lane for lane in lists.lane[: lists.n]]
        assert active.wait(layer) == lists.n
        assert active.seen() == CountSnapshot(layer, lists.n)
    moves = active.finish(9, bound=lists.n)
    assert moves.tolist() == [[r, lists.lane[r], -1] for r in range(lists.n)]
    assert active.exit_layer.tolist() == [layer or 9 for layer in lists.exit_layer]
    assert active.row_to_lane.tolist() == lists.lane
    assert active.wait(9) == 0


def test_rows_beyond_the_count_lie_in_old_skips(made: Make) -> None:
    """A stale bound takes skips for rows that have left, too: from inside of what was written."""
    active, bounds = made(12), [12, 12, 9, 9, 5]
    snapshots: list[tuple[Tensor, int]] = []
    for layer, bound in enumerate(bounds, start=1):
        snapshots.append((active.snapshot(), bound))
        active.exit_rows_where(on(active, [r % 4 == layer % 4 for r in range(bound)], torch.bool), layer, bound=bound)
        for snapshot, then in snapshots:
            index = active.locate(snapshot, bound)
            assert index.shape == (bound,)
            assert bool((index < then).all())
            assert len(index.unique()) == bound


def test_a_lane_does_not_leave_without_its_partner(made: Make) -> None:
    active = made(4)
    partner = on(active, [3, 1, 2, 0], torch.int32)
    active.exit_rows_where(on(active, [False, False, False, True], torch.bool), 1, bound=4)  # not tied yet
    moves = active.exit_rows_where(on(active, [True] * 4, torch.bool), 2, bound=4, partner=partner)
    assert moves.tolist() == [[1, 1, -1], [2, 2, -1], [-1, -1, -1], [-1, -1, -1]]
    assert active.exit_layer.tolist() == [0, 2, 2, 1]
    assert active.wait(2) == 1


def test_a_bound_below_the_count_is_seen(made: Make) -> None:
    active = made(5)
    for layer, bound in ((1, 4), (2, 5)):  # and it stays
        moves = active.exit_rows_where(on(active, [True] * bound, torch.bool), layer, bound=bound)
        assert bool((moves == -1).all())
        with pytest.raises(RuntimeError, match=f"before layer {layer} was given a bound below the running rows"):
            active.wait(layer)
        with pytest.raises(RuntimeError, match="bound below"):
            active.seen()
        assert active.count.tolist() == [-1]
        assert active.row_to_lane.tolist() == list(range(5))
        assert active.exit_layer.tolist() == [0] * 5
    active.start()
    assert active.seen() == CountSnapshot(0, 5)


def test_ticks_start_afresh(made: Make) -> None:
    active = made(6)
    addresses = [
        tensor.data_ptr() for tensor in (active.row_to_lane, active.lane_to_row, active.exit_layer, active.count)
    ]
    for tick in range(3):
        assert active.seen() == CountSnapshot(0, 6)
        active.exit_rows_where(on(active, [r == tick for r in range(6)], torch.bool), 1 + tick, bound=6)
        assert active.wait(1 + tick) == 5
        assert active.exit_layer.tolist() == [(1 + tick) * (r == tick) for r in range(6)]
        active.start()
        assert active.moved.tolist() == [0]
        assert active.count.tolist() == [6]
        assert active.row_to_lane.tolist() == active.lane_to_row.tolist() == list(range(6))
        assert active.exit_layer.tolist() == [0] * 6
    assert [
        tensor.data_ptr() for tensor in (active.row_to_lane, active.lane_to_row, active.exit_layer, active.count)
    ] == addresses


def test_what_a_graph_holds_is_unknown_until_it_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's word is that of the tick before: taken for this one, it would be a bound below the rows that run."""
    active, everybody = DeviceSet(4, "cpu"), torch.ones(4, dtype=torch.bool)
    active.exit_rows_where(everybody, 1, bound=4)
    assert active.seen() == CountSnapshot(1, 0)
    with monkeypatch.context() as patched:
        module = device_set
        patched.setattr(module, "captures", lambda device: True)
        for name in ("_start", "_exit_rows"):  # a graph only notes what it will do
            patched.setattr(module, name, lambda row_to_lane, *_: row_to_lane.new_zeros(4, 3))
        patched.setattr(PinnedCount, "post", lambda *_: None)
        active.start()
        active.exit_rows_where(everybody, 1, bound=4)
        with pytest.raises(RuntimeError, match="cannot be made while a CUDA graph is captured"):
            DeviceSet(4, "cpu")
    assert active.recorded
    assert active.seen() == CountSnapshot(0, 4)
    with pytest.raises(RuntimeError, match="layer 1 is recorded in a CUDA graph, which has not been replayed"):
        active.wait(1)
    _start(active.row_to_lane, active.lane_to_row, active.exit_layer, active._state, 4, None)
    active._word.post(_packed(active._state, 0))
    active.replayed()
    assert active.seen() == CountSnapshot(0, 4)
    active.exit_rows_where(everybody, 2, bound=4)
    assert active.wait(2) == 0
    assert active.seen() == CountSnapshot(2, 0)


def test_a_graph_holds_no_value_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["adadiff_kernels.upload"], "captures", lambda device: True)
    with pytest.raises(RuntimeError, match=r"cannot hold a value of the CPU, \[3\]; move it to cuda:0"):
        upload(torch.zeros(3), torch.device("cuda", 0))


class LateWord(PinnedCount):
    """A host that sees what was posted `late` posts ago."""

    def __init__(self, late: int) -> None:
        super().__init__(torch.device("cpu"))
        self.late, self.posted = late, []

    def post(self, word: Tensor) -> None:
        self.posted.append(word.clone())
        if len(self.posted) > self.late:
            super().post(self.posted.pop(0))


def test_counts_seen_late_are_bounds_of_their_own_tick() -> None:
    active = DeviceSet(6, "cpu", word=LateWord(2))
    seen = []
    for _ in range(2):
        bound = 6
        for layer in range(1, 5):
            active.exit_rows_where(torch.arange(bound) == 0, layer, bound=bound)
            seen.append(active.seen())
            bound = seen[-1].count
            assert int(active.count) == 6 - layer <= bound
        active.start()
    none = CountSnapshot(0, 6)
    assert seen == [
        none,
        none,
        CountSnapshot(1, 5),
        CountSnapshot(2, 4),
        none,
        none,
        CountSnapshot(1, 5),
        CountSnapshot(2, 4),
    ]


@pytest.mark.parametrize("count", [0, 1, 32768, -1])
@pytest.mark.parametrize("layer", [0, 1, TICKS - 1])
@pytest.mark.parametrize("tick", [0, 1, TICKS // 2, TICKS - 1])
def test_words_hold_their_parts(tick: int, layer: int, count: int) -> None:
    word = int(_packed(torch.tensor([count, 77, tick + TICKS], dtype=torch.int32), layer))
    assert unpacked(word) == unpacked(word % 2**64) == (tick, layer, count)  # signed, and as the core reads it


def test_ticks_come_round() -> None:
    active = DeviceSet(2, "cpu")
    active._state[2] = active._tick = TICKS - 1
    active.start()
    active.exit_rows_where(torch.tensor([True, False]), 1, bound=2)
    assert active.seen() == CountSnapshot(1, 1)


U, THRESHOLD = torch.zeros(3), torch.ones(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": U[:2]}, r"u must be \[3\], got \[2\]"),
        ({"u": U.double()}, "u must be float32, got float64"),
        ({"u": torch.zeros(6)[::2]}, r"u must be contiguous, got strides \(2,\)"),
        ({"threshold": U}, r"threshold must be \[4\], got \[3\]"),
        ({"threshold": THRESHOLD.to("meta")}, "threshold must be on cpu, got meta"),
        ({"snapshot": torch.zeros(4)}, "snapshot must be int32, got float32"),
        ({"snapshot": torch.zeros(3, dtype=torch.int32)}, r"snapshot must be \[4\], got \[3\]"),
        ({"partner": torch.arange(4)}, "partner must be int32, got int64"),
        ({"bound": 5, "u": torch.zeros(5)}, "bound must be an int from 0 to 4, the lanes, got 5"),
        ({"bound": torch.tensor(3)}, "bound must be an int"),
        ({"layer": 0}, "layer must be an int after 2"),
        ({"layer": 2}, "layer must be an int after 2, the last, and below 65536, got 2"),
        ({"layer": TICKS}, "below 65536, got 65536"),
        ({"layer": 3.0}, "layer must be an int"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change: dict, message: str) -> None:
    active = DeviceSet(4, "cpu")
    active.exit_rows_where(torch.tensor([True, False, False, False]), 2, bound=4)
    before = [tensor.clone() for tensor in (active.row_to_lane, active.lane_to_row, active.exit_layer, active._state)]
    given_ = {"u": U, "threshold": THRESHOLD, "layer": 3, "bound": 3} | change
    with pytest.raises(ValueError, match=message):
        active.exit_rows(**given_)
    for tensor, old in zip(
        (active.row_to_lane, active.lane_to_row, active.exit_layer, active._state), before, strict=True
    ):
        assert torch.equal(tensor, old)
    active.exit_rows(U, THRESHOLD, 3, bound=3)
    assert active.exit_layer.tolist() == [2, 3, 3, 3]


def test_bad_masks_and_snapshots_are_named() -> None:
    active = DeviceSet(4, "cpu")
    with pytest.raises(ValueError, match="mask must be bool, got uint8"):
        active.exit_rows_where(torch.zeros(4, dtype=torch.uint8), 1, bound=4)
    with pytest.raises(ValueError, match=r"snapshot must be \[4\], got \[3\]"):
        active.locate(active.lane_to_row[:3], 4)
    with pytest.raises(ValueError, match="bound must be an int from 0 to 4"):
        active.locate(active.lane_to_row, 5)


@pytest.mark.parametrize("lanes", [-1, 2.5, None])
def test_lanes_are_a_number(lanes: object) -> None:
    with pytest.raises(ValueError, match="num_lanes must be an int from 0"):
        DeviceSet(lanes, "cpu")


def test_backends_that_cannot_serve_say_why() -> None:
    with pytest.raises(RuntimeError, match="backend='cuda': it needs a CUDA device, got cpu"):
        DeviceSet(3, "cpu", backend="cuda")
    with pytest.raises(ValueError, match="backend must be 'reference', 'cuda' or None, got 'triton'"):
        DeviceSet(3, "cpu", backend="triton")


def test_an_extension_without_cuda_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "core", None)
    assert "built without CUDA; install nvcc" in device_set.kernel_missing(torch.device("cuda", 0))
