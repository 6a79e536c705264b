"""Latency of requests of 10 to 30 steps with random arrivals, at shares of the throughput of lockstep batches.

The digits run in real time; U-ViT-S/2, L/2 and H/2 on a virtual clock, with measured times of their blocks. Every way
of serving gets the same requests at the same times. Lockstep: up to `capacity` waiting requests begin together, and the
next ones when all of these are done; each is answered as soon as it is finished.
"""

import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from tqdm import tqdm

import adadiff
from adadiff import Engine, Model
from adadiff.config import PRESETS, ModelConfig
from adadiff.forward.forward import run_forward
from adadiff.models.uvit import UViT, UViTConfig
from adadiff.policies.interface import ExitPolicy
from adadiff.uem import PAPER
from benchmarks.baselines import servers
from benchmarks.baselines.attainable import PlainPieces, kinds
from benchmarks.baselines.servers import DepthTable, Plain, Recorder
from benchmarks.baselines.simulation import (
    Clock,
    Costs,
    RealClock,
    Request,
    Served,
    SimulatedNetwork,
    VirtualClock,
    serve,
    workload,
)
from benchmarks.harness import AA_TOLERANCE, Comparison, Times, best_micro_batch, interleave
from benchmarks.rows import Rows, cores, say
from benchmarks.suites import drawing

SUITE = "serving"
DIGITS = "digits"
DIGITS_THETA = 0.135
DIGITS_POLICY = f"exit:{DIGITS_THETA},min_layer=3"
CALIBRATION = 64  # digits that are drawn in 50 steps for the static table
BURST = "burst"


@dataclass(frozen=True)
class Sizes:
    """loads: arrival rates as shares of lockstep's burst throughput. block_rows: numbers of rows at which blocks are
    timed."""

    requests: int = 512
    loads: tuple[float, ...] = (0.5, 0.8, 0.95)
    digits_capacity: int = 64
    presets: tuple[str, ...] = ("cifar10_uvit_small", "imagenet256_uvit_large", "imagenet256_uvit_huge")
    block_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    block_repeats: int = 3

    @property
    def capacity(self) -> int:
        """Capacity of the simulated servers."""
        return max(self.block_rows)


FULL = Sizes()
QUICK = Sizes(32, (0.8,), 64, ("cifar10_uvit_small",), (1, 2, 4), 2)


@dataclass(frozen=True)
class Way:
    """A way of serving. policy: None: the plain network without our engine. together: size of lockstep batches. jitter:
    depths of samples deviate from the policy's table."""

    name: str
    policy: ExitPolicy | str | None
    together: int | None = None
    jitter: bool = False


@dataclass(frozen=True)
class Run:
    served: Served
    recorder: Recorder
    bound: float | None = None  # see SimulatedNetwork.holding_bound

    def results(self, num_layers: int) -> dict[str, object]:
        latencies = Times(self.served.latencies)
        found = {
            "seconds": latencies.row(),
            "p95": latencies.quantile(0.95),
            "p99": latencies.quantile(0.99),
            "images_per_second": len(self.served.latencies) / self.served.seconds,
            "busy": self.served.busy / self.served.seconds,
            "ticks": self.served.ticks,
            "mean_exit_layer": self.recorder.mean_exit_layer,
            "rows_per_layer": self.recorder.rows_per_layer(num_layers),
        }
        return found if self.bound is None else {**found, "holding_bound": self.bound}


def digits(rows: Rows, sizes: Sizes) -> None:
    model, capacity = drawing.load(DIGITS), sizes.digits_capacity
    say(f"serving: latency on the digits, capacity {capacity}, {sizes.requests} requests, in real time")
    labels, t = torch.arange(capacity) % 10, torch.linspace(0, 999, capacity)
    x = torch.randn(capacity, *model.backbone.sample_shape)
    best = best_micro_batch(lambda m: model.backbone(x[:m], t[:m], labels[:m]), capacity)
    seeds, labels = drawing.seeds_and_labels(1, CALIBRATION)
    _, report = adadiff.sample(model, CALIBRATION, steps=50, policy=DIGITS_POLICY, seed=seeds, class_labels=labels)
    table = servers.calibrated(model, report.exit_layer[..., 0])
    chosen = [
        Way(servers.LOCK_STEP, None, together=capacity),
        Way(servers.PLAIN, "full"),
        Way(servers.MEAN, f"exit:batch-mean={DIGITS_THETA},min_layer=3,patience=0"),
        Way(servers.AGREE, servers.AllAgree(DIGITS_THETA, min_layer=3)),
        Way(servers.STATIC, DepthTable(table, needs_scores=False)),
        Way(servers.OURS, DIGITS_POLICY),
    ]

    def run(way: Way, requests: Sequence[Request]) -> Run:
        clock = RealClock()
        if way.policy is None:
            recorder = Recorder(servers.plain_network(best))
            server = Plain(model, capacity, recorder)
        else:
            recorder = Recorder(run_forward)
            server = engine(model, capacity, len(requests), clock, recorder)
        return Run(serve(server, requests, clock, asking(way, labelled=True), way.together), recorder)

    for way in chosen:  # warms up
        run(way, workload(8, None))
    parameters = {"model": DIGITS, "clock": "real", "capacity": capacity, "requests": sizes.requests}
    lock_step = None
    for load in (BURST, *sizes.loads):
        requests = workload(sizes.requests, None if load == BURST else load * lock_step)
        order = np.random.default_rng(0).permutation(len(chosen) + 1).tolist()  # the last is lockstep again, for A/A
        runs = {index: run(chosen[index % len(chosen)], requests) for index in order}
        lock_step = lock_step or sizes.requests / runs[0].served.seconds
        aa_ratio = runs[len(chosen)].served.busy / runs[0].served.busy
        quality_of = {"aa_ratio": aa_ratio, "usable": abs(aa_ratio - 1) <= AA_TOLERANCE}
        for index, way in enumerate(chosen):
            results = runs[index].results(model.num_layers)
            write(rows, {**parameters, "load": load}, way, results, lock_step, quality_of)


def simulated(rows: Rows, sizes: Sizes, processes: int = cores()) -> None:
    costs, quality_of = {}, {}
    for preset in sizes.presets:
        say(f"serving: the blocks of {preset} on {', '.join(map(str, sizes.block_rows))} rows")
        costs[preset], measured = block_costs(rows, preset, sizes)
        quality_of[preset] = {"aa_ratio": measured.aa_ratio, "usable": measured.usable}
    say(f"serving: latency of {', '.join(sizes.presets)} on a virtual clock, {sizes.requests} requests")
    tasks = [
        Simulation(preset, way, sizes.capacity, BURST, sizes.requests, None, costs[preset])
        for preset in sizes.presets
        for way in simulated_ways(PRESETS[preset].network.depth + 1, sizes.capacity)
    ]
    rate: dict[str, float] = {}
    with workers(processes) as pool:
        for these in (tasks, [task.at(load) for task in tasks for load in sizes.loads]):
            these = [dataclasses.replace(task, lock_step=rate.get(task.preset)) for task in these]
            bar = tqdm(pool(Simulation.run, these), desc="virtual clock", total=len(these), leave=False, disable=None)
            for task, results in zip(these, bar, strict=True):
                rate.setdefault(task.preset, results["images_per_second"])  # of lock step, the first way
                parameters = {"model": task.preset, "clock": "virtual", "capacity": task.capacity}
                parameters |= {"requests": task.requests, "load": task.load}
                write(rows, parameters, task.way, results, rate[task.preset], quality_of[task.preset])


@contextmanager
def workers(processes: int) -> Iterator[Callable]:
    """A `map` over single-threaded processes; the built-in one for a single process."""
    if processes == 1:
        yield map
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_worker)
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C


def block_costs(rows: Rows, preset: str, sizes: Sizes) -> tuple[Costs, Comparison]:
    """Times the blocks of a preset, in a network of only four blocks and the middle one."""
    config = PRESETS[preset].network
    short = UViT(dataclasses.replace(config, depth=4)).eval()
    capacity = sizes.capacity
    x, t = torch.randn(capacity, *short.sample_shape), torch.linspace(0, 999, capacity)
    labels = torch.zeros(capacity, dtype=torch.int64) if config.num_classes else None
    pieces = PlainPieces(short, (x, t, labels), {"in": sizes.block_rows, "out": sizes.block_rows})
    measured = interleave(pieces.variants(), sizes.block_repeats, turn=0.02, label=f"blocks of {preset}")
    for kind, calls in pieces.block_seconds(measured).items():
        for n in calls:
            name = f"{kind} {n} whole"
            rows.write(SUITE, "block", kind, {"preset": preset, "rows": n}, dtype="float32", **measured.row(name))
    for kind in ("stem", "head"):
        rows.write(SUITE, "block", kind, {"preset": preset, "rows": capacity}, dtype="float32", **measured.row(kind))
    return Costs.measured(pieces, measured, kinds_of(config.depth), capacity, capacity), measured


def kinds_of(depth: int) -> list[str]:
    """`attainable.kinds` of a U-ViT of this depth, without building it at full size."""
    return kinds(small(depth).backbone)


def small(depth: int) -> Model:
    """A minimal U-ViT of depth + 1 blocks; on the virtual clock it is never run."""
    return Model(ModelConfig(UViTConfig(2, 1, 2, 2, depth, 1), "linear", None, PAPER)).eval()


def simulated_ways(num_layers: int, capacity: int) -> list[Way]:
    depths = servers.two_phase(num_layers - 1)  # one block below the maximum, so that jitter does not change the mean
    return [
        Way(servers.LOCK_STEP, "full", together=capacity),
        Way(servers.PLAIN, "full"),
        Way(servers.MEAN, DepthTable(depths, together="mean"), jitter=True),
        Way(servers.AGREE, DepthTable(depths, together="all"), jitter=True),
        Way(servers.STATIC, DepthTable(depths, needs_scores=False)),
        Way(servers.OURS, DepthTable(depths), jitter=True),
    ]


@dataclass(frozen=True)
class Simulation:
    """One run on the virtual clock. lock_step: images a second of lockstep; the arrival rate is `load` times that."""

    preset: str
    way: Way
    capacity: int
    load: str | float
    requests: int
    lock_step: float | None
    costs: Costs

    def at(self, load: float) -> "Simulation":
        return dataclasses.replace(self, load=load)

    def run(self) -> dict[str, object]:
        model = small(PRESETS[self.preset].network.depth)
        requests = workload(self.requests, None if self.load == BURST else self.load * self.lock_step)
        return run_virtual(model, self.way, requests, self.capacity, self.costs).results(model.num_layers)


def run_virtual(model: Model, way: Way, requests: Sequence[Request], capacity: int, costs: Costs) -> Run:
    clock = VirtualClock()
    network = SimulatedNetwork(costs, clock)
    recorder = Recorder(network)
    server = engine(model, capacity, len(requests), clock, recorder)
    served = serve(server, requests, clock, asking(way, labelled=False), way.together)
    return Run(served, recorder, network.holding_bound)


def engine(model: Model, capacity: int, queue: int, clock: Clock, forward: Recorder) -> Engine:
    return Engine(model, capacity, queue=queue, threaded=False, clock=clock, forward=forward)


def asking(way: Way, labelled: bool) -> Callable[[Request], dict[str, object]]:
    """Settings of a request for a server of this kind."""

    def settings(request: Request) -> dict[str, object]:
        asked: dict[str, object] = {"seed": request.seed, "steps": request.steps}
        if labelled:
            asked["class_labels"] = request.label
        if way.policy is not None:
            asked["policy"] = way.policy
        if way.jitter:
            asked["thresholds"] = [request.jitter]
        return asked

    return settings


def write(
    rows: Rows,
    parameters: Mapping[str, object],
    way: Way,
    results: Mapping[str, object],
    lock_step: float,
    quality_of: Mapping[str, object],
) -> None:
    rows.write(
        SUITE,
        "latency",
        way.name,
        parameters,
        dtype="float32",
        **results,
        **quality_of,
        lock_step_images_per_second=lock_step,
    )
