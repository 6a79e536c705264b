"""The serving benchmark: its clock and its ways of serving by hand-made numbers. No real second is asserted."""

import dataclasses
import json
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adadiff
from adadiff.config import ModelConfig
from adadiff.models.uvit import UViTConfig
from adadiff.policies.exits import Replay
from adadiff.uem import PAPER
from benchmarks import __main__ as run
from benchmarks import rows
from benchmarks.baselines import servers
from benchmarks.baselines.servers import DepthTable, Plain, Recorder, Saturated
from benchmarks.baselines.simulation import Costs, Request, SimulatedNetwork, VirtualClock, serve, workload
from benchmarks.report import plots, tables
from benchmarks.suites import latency, serving


def tiny(classes: int = 11) -> adadiff.Model:
    """13 blocks, as the patterns need; otherwise as small as it gets."""
    torch.manual_seed(0)
    network = UViTConfig(8, 1, 4, 8, 12, 2, num_classes=classes)
    return adadiff.Model(ModelConfig(network, "linear", 10 if classes else None, PAPER)).eval()


def a_second_per_row(layers: int, capacity: int) -> Costs:
    return Costs(np.tile(np.arange(capacity + 1.0), (layers, 1)), ends=0.0)


def virtual(requests: list[Request], policy: object, together: int | None = None, capacity: int = 4) -> latency.Run:
    """Three blocks, a second for each row of each."""
    way = latency.Way("way", policy, together, jitter=isinstance(policy, DepthTable) and policy.needs_scores)
    return latency.run_virtual(latency.small(2), way, requests, capacity, a_second_per_row(3, capacity))


def request(arrival: float, steps: int, jitter: int = 0) -> Request:
    return Request(arrival, 0, steps, 0, jitter)


THREE = [request(0.0, 2), request(1.0, 1), request(20.0, 1)]


def test_latencies_on_the_virtual_clock_are_those_worked_out_by_hand() -> None:
    done = virtual(THREE, "full")
    # 0 to 3 s the first alone, 3 to 9 s both, 20 to 23 s the third
    assert done.served.latencies == (9.0, 8.0, 3.0)
    assert (done.served.seconds, done.served.busy, done.served.ticks) == (23.0, 12.0, 3)
    assert done.recorder.rows_per_layer(3) == [pytest.approx(4 / 3)] * 3


def test_in_lock_step_the_second_waits_for_the_first() -> None:
    done = virtual(THREE, "full", together=4)
    # 0 to 6 s the first, 6 to 9 s the second
    assert done.served.latencies == (6.0, 8.0, 3.0)


def test_on_the_virtual_clock_a_lane_takes_as_many_blocks_as_the_table_says() -> None:
    table = DepthTable((3, 1))  # of the times 999 and 499 of two steps, the first is in the noisy half
    done = virtual([request(0.0, 2), request(0.0, 1)], table)
    # one row in each of the two lanes' first block; then three blocks for the first
    assert done.served.latencies == (5.0, 2.0)
    assert done.recorder.mean_exit_layer == pytest.approx(5 / 3)
    together = virtual([request(0.0, 2), request(0.5, 2)], dataclasses.replace(table, together="all"))
    # 1 s; then both run three blocks, though one asks for one; then the second alone three
    assert together.served.latencies == (7.0, 9.5)


class Counting:
    """Answers a request after its number of steps, all of them a second each, and notes who was there."""

    def __init__(self, clock: VirtualClock):
        self.clock, self.left, self.seen = clock, {}, []

    def submit(self, *, seed: int, steps: int) -> Future:
        future: Future = Future()
        self.left[future] = steps
        return future

    def step(self) -> bool:
        self.clock.advance(1.0)
        self.seen.append(len(self.left))
        for future in list(self.left):
            self.left[future] -= 1
            if not self.left[future]:
                del self.left[future]
                future.set_result(None)
        return True


def plain_settings(asked: Request) -> dict[str, object]:
    return {"seed": asked.seed, "steps": asked.steps}


def test_lock_step_takes_the_next_ones_only_when_the_last_is_done() -> None:
    clock = VirtualClock()
    server = Counting(clock)
    requests = [request(0.0, 3), request(0.0, 1), request(0.0, 2), request(2.5, 1), request(2.75, 1)]
    served = serve(server, requests, clock, plain_settings, together=2)
    # two begin; one of them ends after a second and nobody takes its slot; then two of the three that wait
    assert server.seen == [2, 1, 1, 2, 1, 1]
    assert served.latencies == (3.0, 1.0, 5.0, 1.5, 3.25)


def test_a_request_that_fails_fails_the_measurement() -> None:
    clock = VirtualClock()
    server = Counting(clock)
    server.step = lambda: [future.set_exception(KeyError("lost")) for future in server.left] and server.left.clear()
    with pytest.raises(KeyError, match="lost"):
        serve(server, [request(0.0, 1)], clock, plain_settings)
    server.step = lambda: False
    with pytest.raises(RuntimeError, match="not all"):
        serve(server, [request(0.0, 1)], clock, plain_settings)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 4), st.integers(-1, 1)), min_size=1, max_size=9),
    st.integers(1, 3),
    st.sampled_from(
        ["full", DepthTable((3, 1)), DepthTable((3, 1), together="mean"), DepthTable((2, 1), needs_scores=False)]
    ),
    st.booleans(),
)
def test_every_request_is_answered_once_after_all_its_steps(
    asked: list[tuple[int, int, int]], capacity: int, policy: object, lock_step: bool
) -> None:
    requests = [request(*values) for values in sorted(asked)]
    done = virtual(requests, policy, capacity if lock_step else None, capacity)
    assert len(done.served.latencies) == len(requests)
    assert sum(map(len, done.recorder.exit_layers)) == sum(asked.steps for asked in requests)
    assert max(map(len, done.recorder.exit_layers)) <= capacity
    assert all(took >= asked.steps for took, asked in zip(done.served.latencies, requests, strict=True))


def test_arrivals_are_reproducible_and_poisson() -> None:
    first, again = workload(2000, 4.0), workload(2000, 4.0)
    assert first == again
    assert workload(2000, 4.0, seed=1) != first
    gaps = np.diff([asked.arrival for asked in first])
    assert gaps.min() > 0
    # exponential: mean and standard deviation are 1 / rate; 5 standard errors
    assert gaps.mean() == pytest.approx(0.25, rel=5 / 2000**0.5)
    assert gaps.std() == pytest.approx(0.25, rel=10 / 2000**0.5)
    slower = workload(2000, 2.0)
    assert [asked.arrival for asked in slower] == pytest.approx([2 * asked.arrival for asked in first])
    burst = workload(2000, None)
    assert {asked.arrival for asked in burst} == {0.0}
    for other in (slower, burst):
        assert [dataclasses.replace(asked, arrival=0.0) for asked in other] == [
            dataclasses.replace(asked, arrival=0.0) for asked in first
        ]
    assert {asked.steps for asked in first} == set(range(10, 31))


def test_costs_by_hand() -> None:
    # in: two calls of 2 rows (6 s) beat one of 4 (10 s); out: the larger the better
    costs = Costs.of({"in": {1: 4.0, 2: 3.0, 4: 10.0}, "out": {2: 8.0, 4: 8.0}}, ["in", "out"], 4, ends=0.5)
    assert costs.blocks.tolist() == [[0.0, 4.0, 3.0, 4.5, 6.0], [0.0, 4.0, 8.0, 8.0, 8.0]]
    counts = np.array([4, 1])
    assert costs.seconds(counts) == 6.0 + 4.0 + 4 * 0.5
    assert costs.least(counts) == 4 * 1.5 + 1 * 2.0 + 4 * 0.5
    with pytest.raises(ValueError, match="up to 4 rows"):
        Costs.of({"in": {1: 1.0, 4: 2.0}}, ["in"], 5, 0.0)


def test_what_holding_could_save_by_hand() -> None:
    costs = Costs(np.array([[0.0, 2.0, 2.0], [0.0, 2.0, 2.0], [0.0, 2.0, 2.0]]), ends=0.0)
    network = SimulatedNetwork(costs, VirtualClock())
    x, t = torch.zeros(2, 1, 2, 2), torch.tensor([900.0, 100.0])
    result = network(tiny(), x, t, None, policies=[DepthTable((3, 1))], threshold=torch.zeros(2))
    assert result.exit_layer.tolist() == [1, 3]
    # 6 s for rows (2, 1, 1); full calls take a second a row, 4 s
    assert network.holding_bound == pytest.approx(1 - 4 / 6)


def test_a_depth_table_reads_the_time() -> None:
    t = torch.tensor([0.0, 499.0, 500.0, 999.0, 1000.0])
    table = DepthTable((13, 2))
    assert table.depth(t, torch.tensor([0.0, -1.0, 0.0, 1.0, -4.0])).tolist() == [13, 12, 2, 3, 1]
    assert list(table.exit_layers(13)) == list(range(1, 13))
    assert list(dataclasses.replace(table, needs_scores=False).exit_layers(13)) == [2]
    none = torch.zeros(5)
    assert dataclasses.replace(table, together="mean").depth(t[1:3], none[:2]).tolist() == [8, 8]  # 7.5
    assert dataclasses.replace(table, together="all").depth(t, none).tolist() == [13] * 5
    for bad in ({"depths": ()}, {"depths": (0, 3)}, {"depths": (1,), "together": "most"}):
        with pytest.raises(ValueError, match="got"):
            DepthTable(**bad)


def test_a_table_is_the_mean_depth_of_each_part_of_the_time() -> None:
    # "linear" at 4 steps: times 999, 749, 499, 249
    depth = torch.tensor([[2, 2], [3, 4], [5, 5], [13, 12]])
    assert servers.calibrated(tiny(), depth, parts=2) == (9, 3)  # (12.5 + 5) / 2, (3.5 + 2) / 2
    with pytest.raises(ValueError, match="4 of 8"):
        servers.calibrated(tiny(), depth, parts=8)


@torch.inference_mode()
def test_moves_are_those_of_the_engine() -> None:
    model = tiny(classes=0)
    depth = torch.randint(1, 14, (11,))
    x, t = torch.randn(11, 1, 8, 8), torch.rand(11) * 999
    result = adadiff.forward(model, x, t, policy=Replay(), threshold=depth.float())
    assert servers.moves(depth) == result.rows_moved > 0
    assert servers.moves(depth.sort(descending=True).values) == 0


def test_the_plain_server_draws_what_the_sampler_draws() -> None:
    model = tiny()
    server = Plain(model, 2, Recorder(servers.plain_network(1)))
    futures = [server.submit(seed=i, steps=2 + i, class_labels=i) for i in range(3)]  # the third waits for a slot
    ticks = 0
    while server.step():
        ticks += 1
    assert ticks == 6  # slots are free after ticks 2 and 3; the third needs four from there
    images, _ = adadiff.sample(model, 3, steps=[2, 3, 4], seed=[0, 1, 2], class_labels=[0, 1, 2])
    for image, future in zip(images, futures, strict=True):
        torch.testing.assert_close(future.result().clone(), image, rtol=1e-4, atol=1e-4)
    half = server.submit(seed=0, steps=4, class_labels=0, strength=0.5)
    assert [server.step(), server.step(), half.done(), server.step()] == [True, True, True, False]


@pytest.mark.parametrize("ours", [True, False], ids=["engine", "plain"])
def test_a_saturated_server_always_holds_mixed_timesteps(ours: bool) -> None:
    model = tiny(classes=0)
    server = serving.Server.of(model, 4, DepthTable((13, 2))) if ours else serving.Server.plain(model, 4, best=2)
    for _ in range(60):  # longer than any sample
        server.call()
    depths = [sorted(depth.tolist()) for depth in server.recorder.exit_layers]
    assert depths == [[2, 2, 13, 13] if ours else [13] * 4] * 60
    results = server.results()
    assert results["rows_per_layer"] == ([4.0] * 2 + [2.0] * 11 if ours else [4.0] * 13)
    assert 0 < results["outside_network"] < 1
    if ours:  # two of four shallow rows: unordered, a row moves in 2 of 3 orders, or two pairs
        assert results["rows_moved_per_tick"] < results["rows_moved_unordered"] < 4


def test_a_saturated_server_raises_what_a_request_failed_with() -> None:
    def broken(*_: object, **__: object) -> adadiff.ForwardOutput:
        raise ArithmeticError("no forward pass")

    server = adadiff.Engine(tiny(classes=0), 2, threaded=False, forward=broken)
    with pytest.raises(ArithmeticError, match="no forward pass"):
        Saturated(server, (1, 8, 8), 2, 4)()


def test_throughput_and_overhead_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suites.serving.adadiff.build", lambda name, exits: tiny(classes=0))
    monkeypatch.setattr("benchmarks.suites.serving.drawing.load", lambda name: tiny())
    sizes = serving.Sizes(capacity=4, ticks=3, digits_ticks=1, arrivals=latency.QUICK)
    file = rows.Rows(tmp_path)
    serving.throughput(file, sizes)
    serving.overhead(file, sizes)
    written = {row["variant"]: row for row in file.rows if row["kind"] == "throughput"}
    names = [servers.LOCK_STEP, servers.PLAIN, servers.MEAN, servers.AGREE, servers.STATIC, servers.OURS]
    assert set(written) == {*names, servers.INVARIANT, servers.NO_EXITS}
    for row in written.values():
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"]["median"] / 50)
        assert row["speedup"] * row["seconds_over_plain"] == pytest.approx(1)  # medians of an odd number of ratios
        assert {"aa_ratio", "usable", "commit", "outside_network", "micro_batch", "machine"} <= set(row)
    depth = {name: row["mean_exit_layer"] for name, row in written.items()}
    assert depth == dict.fromkeys((servers.STATIC, servers.OURS, servers.INVARIANT), 7.5) | {
        servers.MEAN: 8.0,
        **dict.fromkeys((servers.LOCK_STEP, servers.PLAIN, servers.AGREE, servers.NO_EXITS), 13.0),
    }
    shares = {name: row["share_of_attainable"] for name, row in written.items() if "share_of_attainable" in row}
    assert set(shares) == {servers.OURS, servers.STATIC, servers.INVARIANT}  # who runs the rows of the pieces
    assert min(shares.values()) > 0
    assert [row["variant"] for row in file.rows if row["kind"] == "overhead"] == [
        servers.PLAIN,
        servers.NO_EXITS,
        servers.OURS,
    ]


def test_latency_rows_tables_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suites.latency.drawing.load", lambda name: tiny())
    monkeypatch.setattr("benchmarks.suites.latency.CALIBRATION", 2)
    monkeypatch.setattr("benchmarks.baselines.simulation.STEPS", (1, 3))
    monkeypatch.setitem(latency.PRESETS, "imagenet256_uvit_large", tiny().config)
    sizes = latency.Sizes(6, (0.8,), 3, ("imagenet256_uvit_large",), (1, 2), 1)
    file = rows.Rows(tmp_path)
    latency.digits(file, sizes)
    latency.simulated(file, sizes, processes=1)
    measured = [row for row in file.rows if row["kind"] == "latency"]
    names = {servers.LOCK_STEP, servers.PLAIN, servers.MEAN, servers.AGREE, servers.STATIC, servers.OURS}
    for clock in ("real", "virtual"):
        for load in ("burst", 0.8):
            own = [row for row in measured if (row["parameters"]["clock"], row["parameters"]["load"]) == (clock, load)]
            assert {row["variant"] for row in own} == names
    for row in measured:
        assert row["seconds"]["n"] == 6
        assert row["seconds"]["median"] <= row["p95"] <= row["p99"]
        assert len(row["rows_per_layer"]) == 13
        assert ("holding_bound" in row) == (row["parameters"]["clock"] == "virtual")
        if "holding_bound" in row:
            assert 0 <= row["holding_bound"] < 1
    blocks = [(row["variant"], row["parameters"]["rows"]) for row in file.rows if row["kind"] == "block"]
    assert blocks == [("in", 1), ("in", 2), ("out", 1), ("out", 2), ("stem", 2), ("head", 2)]
    shown = tables.all_tables(file.rows)
    assert [table.header[0].split(" ")[0] for table in shown] == ["requests", "requests", "ms"]
    assert all(len(line) == len(table.header) for table in shown for line in table.body)
    assert [path.name for path in plots.draw(file.rows, tmp_path)] == ["serving.png"]


def test_a_real_clock_row_is_unusable_where_the_machine_was_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = rows.Rows(tmp_path)
    done = virtual(THREE, "full")
    way = latency.Way("way", "full")
    latency.write(file, {"load": 0.5}, way, done.results(3), 2.0, {"aa_ratio": 1.2, "usable": False})
    (row,) = map(json.loads, file.path.read_text().splitlines())
    assert (row["seconds"]["median"], row["usable"], row["lock_step_images_per_second"]) == (8.0, False, 2.0)
    assert row["images_per_second"] == pytest.approx(3 / 23)
    assert row["p95"] == pytest.approx(8.9)  # between 8 and 9, 0.9 of the way


def test_the_serving_suite_is_chosen_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(run.serving, "run", lambda file, sizes: chosen.append(sizes))
    for name in ("measure_digits", "network_settings"):
        monkeypatch.setattr(run, name, lambda *_: pytest.fail("measured another suite"))
    for flags in ([], ["--quick"]):
        monkeypatch.setattr(sys, "argv", ["run.py", "--suite", "serving", "--out", str(tmp_path), *flags])
        run.main()
    assert chosen == [serving.FULL, serving.QUICK]
    with pytest.raises(SystemExit):
        run.arguments(["--suite", "serving", "--quality-only"])
