"""Admission by arrival and by expected work on a virtual clock: engine and queue are real, but the time of a block
comes from a machine model. No time is measured, so the numbers are the same on every computer.

Nine of ten requests are shallow (3 of 13 blocks, 10 to 30 steps), one is deep (every block, 50 to 100 steps). They
arrive one by one (Poisson) at a share of the engine's burst throughput, in groups, or all at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adadiff import Engine
from adadiff.engine.admission import ADMISSIONS
from benchmarks.baselines.servers import DepthTable, Recorder
from benchmarks.baselines.simulation import Costs, Request, SimulatedNetwork, VirtualClock, serve
from benchmarks.rows import Rows, say
from benchmarks.suites import latency

SUITE = "admission"
LAYERS, SHALLOW = 13, 3  # blocks
SHALLOW_STEPS, DEEP_STEPS = (10, 30), (50, 100)
DEEP_SHARE = 0.1
BURST, GROUPS = "burst", "groups of 32"
GROUP = 32
GROUPS_LOAD = 0.8
BLOCK = 1e-3  # seconds of a block on one row
MACHINES = ("linear", "flat")  # a block's time is proportional to its rows, or constant: a device that is hardly busy


@dataclass(frozen=True)
class Sizes:
    """runs: independent runs of `requests` each. loads: arrival rates as shares of the burst throughput."""

    requests: int = 600
    runs: int = 5
    capacity: int = 16
    loads: tuple[float, ...] = (0.5, 0.8, 0.95)


FULL = Sizes()
QUICK = Sizes(60, 1, 8, (0.8,))


@dataclass(frozen=True)
class Outcome:
    """Result of one run. latencies: float [n], seconds; alone: float [n], seconds of each request on an idle engine;
    deep: bool [n]; seconds: of the whole run."""

    latencies: np.ndarray
    alone: np.ndarray
    deep: np.ndarray
    seconds: float

    @property
    def slowdown(self) -> np.ndarray:
        return self.latencies / self.alone

    @property
    def numbers(self) -> dict[str, float]:
        """p50, p95, p99, mean and maximum of the latencies, of all requests and of each kind. For slowdowns: mean, p95,
        and Jain's fairness index (sum x)^2 / (n sum x^2), which is 1 if all are slowed down alike (R. Jain et al.,
        1984)."""
        found = {}
        for name, kind in (("all", np.ones_like(self.deep)), ("shallow", ~self.deep), ("deep", self.deep)):
            values = self.latencies[kind]
            found |= {f"{name}_p{level}": float(np.percentile(values, level)) for level in (50, 95, 99)}
            found |= {f"{name}_mean": float(values.mean()), f"{name}_longest": float(values.max())}
        slow = self.slowdown
        found["slowdown_mean"], found["slowdown_p95"] = float(slow.mean()), float(np.percentile(slow, 95))
        found["fairness"] = float(slow.sum() ** 2 / (len(slow) * (slow**2).sum()))
        return found


def run(rows: Rows, sizes: Sizes) -> None:
    for machine in MACHINES:
        say(f"admission: {machine} machine, {sizes.runs} times {sizes.requests} requests, capacity {sizes.capacity}")
        rate = None
        for load in (BURST, GROUPS, *sizes.loads):
            for admission in ADMISSIONS:
                outcomes = [
                    simulate(admission, machine, mixed(sizes.requests, load, rate, seed), sizes.capacity)
                    for seed in range(sizes.runs)
                ]
                if rate is None:  # from the first outcomes: a burst, by arrival
                    rate = sizes.requests / float(np.mean([outcome.seconds for outcome in outcomes]))
                write(rows, admission, {"machine": machine, "load": load, **_parameters(sizes)}, outcomes)


def _parameters(sizes: Sizes) -> dict[str, object]:
    return {"requests": sizes.requests, "runs": sizes.runs, "capacity": sizes.capacity}


def mixed(n: int, load: str | float, rate: float | None, seed: int) -> list[Request]:
    """Random requests. rate: requests a second in a burst. A request's jitter is its number of blocks minus 1."""
    random = np.random.default_rng(seed)
    deep = random.permutation(np.arange(n) < round(DEEP_SHARE * n))
    steps = np.where(
        deep, random.integers(*DEEP_STEPS, n, endpoint=True), random.integers(*SHALLOW_STEPS, n, endpoint=True)
    )
    gaps = random.exponential(size=n)
    if load == BURST:
        arrivals = np.zeros(n)
    elif load == GROUPS:
        arrivals = (np.arange(n) // GROUP) * (GROUP / (GROUPS_LOAD * rate))
    else:
        arrivals = gaps.cumsum() / (load * rate)
    depth = np.where(deep, LAYERS, SHALLOW)
    return [Request(float(arrivals[i]), i, int(steps[i]), 0, int(depth[i]) - 1) for i in range(n)]


def costs(machine: str, capacity: int) -> Costs:
    n = np.arange(capacity + 1.0)
    return Costs(np.tile(BLOCK * (n if machine == "linear" else n.clip(max=1)), (LAYERS, 1)), ends=0.0)


def simulate(admission: str, machine: str, requests: Sequence[Request], capacity: int, **options: object) -> Outcome:
    """options: of the engine."""
    clock = VirtualClock()
    network = Recorder(SimulatedNetwork(costs(machine, capacity), clock))
    engine = Engine(
        latency.small(LAYERS - 1),
        capacity,
        queue=len(requests),
        threaded=False,
        admission=admission,
        clock=clock,
        forward=network,
        **options,
    )
    served = serve(engine, requests, clock, _settings)
    blocks = np.array([request.jitter + 1 for request in requests])
    steps = np.array([request.steps for request in requests])
    return Outcome(np.array(served.latencies), BLOCK * blocks * steps, blocks == LAYERS, served.seconds)


POLICY = DepthTable((1,))


def _settings(request: Request) -> Mapping[str, object]:
    return {"seed": request.seed, "steps": request.steps, "policy": POLICY, "thresholds": [request.jitter]}


def write(rows: Rows, admission: str, parameters: Mapping[str, object], outcomes: Sequence[Outcome]) -> None:
    """Writes means over runs; spread: smallest and largest value of each."""
    each = [outcome.numbers for outcome in outcomes]
    spread = {name: [min(run[name] for run in each), max(run[name] for run in each)] for name in each[0]}
    mean = {name: float(np.mean([run[name] for run in each])) for name in each[0]}
    rows.write(SUITE, "virtual", admission, parameters, dtype="float32", **mean, spread=spread)
