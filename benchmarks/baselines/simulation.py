"""Workloads of requests, served on a real clock, or on a virtual one that advances by measured times of blocks.

On the virtual clock, engine, scheduler and policies are real; only the network is replaced by its time,
    T(n_1, ..., n_L) = n_1 t_ends + sum over layers of t_l(n_l)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from adadiff import ExitPolicy, ForwardOutput, Model
from benchmarks.baselines.attainable import PlainPieces
from benchmarks.baselines.servers import DepthTable, uncounted
from benchmarks.harness import Comparison

STEPS = (10, 30)  # smallest and largest number of steps of a request


class Clock(Protocol):
    def __call__(self) -> float:
        """Seconds since the clock was made."""

    def sleep_until(self, when: float) -> None: ...


class RealClock:
    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began

    def sleep_until(self, when: float) -> None:
        time.sleep(max(0.0, when - self()))


class VirtualClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def sleep_until(self, when: float) -> None:
        self.now = max(self.now, when)


@dataclass(frozen=True)
class Request:
    """jitter: number of blocks by which this sample's depth deviates from the table."""

    arrival: float  # seconds
    seed: int
    steps: int
    label: int
    jitter: int


def workload(n: int, rate: float | None, seed: int = 0) -> list[Request]:
    """n requests with Poisson arrivals at `rate` a second, or all at once (None). Order, steps, labels and relative
    gaps depend on the seed only."""
    random = np.random.default_rng(seed)
    gaps, steps = random.exponential(size=n), random.integers(STEPS[0], STEPS[1] + 1, n)
    labels, jitter = random.integers(0, 10, n), random.integers(-1, 2, n)
    arrivals = np.zeros(n) if rate is None else gaps.cumsum() / rate
    return [Request(float(arrivals[i]), i, int(steps[i]), int(labels[i]), int(jitter[i])) for i in range(n)]


@dataclass(frozen=True)
class Served:
    latencies: tuple[float, ...]  # seconds from arrival to image, by request
    seconds: float  # from the first arrival to the last image
    busy: float  # of these, inside ticks
    ticks: int


def serve(
    server: object,
    requests: Sequence[Request],
    clock: Clock,
    settings: Callable[[Request], Mapping[str, object]],
    together: int | None = None,
) -> Served:
    """Submits each request at its arrival and runs ticks until all are answered.

    requests: in order of arrival. server: an `Engine` without a thread, or an object with its interface. settings:
    request -> arguments of `submit`. together: lockstep: up to `together` waiting requests begin at once, and no other
    before all of these are done. Raises the exception of a failed request.
    """
    ended: dict[Future, float] = {}
    futures: list[Future] = []
    busy, ticks = 0.0, 0
    while len(ended) < len(requests):
        now, running = clock(), len(futures) - len(ended)
        room = len(requests) if together is None else 0 if running else together
        for request in requests[len(futures) : len(futures) + room]:
            if request.arrival > now:
                break
            futures.append(server.submit(**settings(request)))
            futures[-1].add_done_callback(lambda future: ended.setdefault(future, clock()))
        if len(futures) == len(ended):
            clock.sleep_until(requests[len(futures)].arrival)
            continue
        started = clock()
        if not server.step() and len(ended) < len(futures):
            raise RuntimeError("the server has nothing to do, but not all requests are answered")
        busy += clock() - started
        ticks += 1
    for future in futures:
        future.result()
    latencies = tuple(ended[future] - asked.arrival for future, asked in zip(futures, requests, strict=True))
    return Served(latencies, max(ended.values()) - requests[0].arrival, busy, ticks)


@dataclass(frozen=True)
class Costs:
    """blocks: float [L, capacity + 1], seconds of each block by number of rows, 0 for no rows; ends: seconds of stem
    and head for each row."""

    blocks: np.ndarray
    ends: float

    @staticmethod
    def of(by_kind: Mapping[str, Mapping[int, float]], kinds: Sequence[str], capacity: int, ends: float) -> "Costs":
        """by_kind: kind -> rows -> seconds of one call. If faster, n rows are split into equal pieces of a measured
        size.

        Times are interpolated linearly between measured numbers of rows, with t(0) = 0. Raises ValueError unless
        measured up to the capacity.
        """
        curves = {}
        for kind, calls in by_kind.items():
            if max(calls) < capacity:
                raise ValueError(f"{kind}-blocks were measured up to {max(calls)} rows, the capacity is {capacity}")
            rows = sorted(calls)
            best = [min(calls[m] * n / m for m in rows if n % m == 0) for n in rows]
            curves[kind] = np.interp(np.arange(capacity + 1), [0, *rows], [0.0, *best])
        return Costs(np.stack([curves[kind] for kind in kinds]), ends)

    @staticmethod
    def measured(pieces: PlainPieces, measured: Comparison, kinds: Sequence[str], capacity: int, lanes: int) -> "Costs":
        """lanes: number of lanes on which stem and head were timed."""
        ends = (measured.median("stem") + measured.median("head")) / lanes
        return Costs.of(pieces.block_seconds(measured), kinds, capacity, ends)

    def seconds(self, counts: np.ndarray) -> float:
        """Seconds of a forward pass. counts: int [L], rows of each block."""
        return float(self.blocks[np.arange(len(counts)), counts].sum() + self.ends * counts[0])

    def least(self, counts: np.ndarray) -> float:
        """Lower bound for any regrouping of the same rows: each block at its most efficient number of rows."""
        rows = np.arange(1, self.blocks.shape[1])
        return float((counts * (self.blocks[:, 1:] / rows).min(axis=1)).sum() + self.ends * counts[0])


class SimulatedNetwork:
    """Replaces `run_forward`: exits follow the policy's table, predictions are zero, and the clock advances."""

    def __init__(self, costs: Costs, clock: VirtualClock):
        self._costs, self._clock = costs, clock
        self._seconds = self._least = 0.0

    @property
    def holding_bound(self) -> float:
        """The largest share of network time that holding samples back, to fill deep layers, could save."""
        return 1 - self._least / self._seconds

    def __call__(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        context: Tensor | None,
        *,
        policies: Sequence[ExitPolicy],
        threshold: Tensor | None = None,
        **_: object,
    ) -> ForwardOutput:
        num_layers = len(self._costs.blocks)
        (policy,) = policies
        depth = torch.full((len(x),), num_layers)
        if isinstance(policy, DepthTable):
            added = torch.full_like(t, policy.threshold) if threshold is None else threshold
            depth = policy.depth(t, added).long().clamp(max=num_layers)
        counts = np.bincount(depth.numpy(), minlength=num_layers + 1)[::-1].cumsum()[::-1][1:]
        seconds = self._costs.seconds(counts)
        self._clock.advance(seconds)
        self._seconds += seconds
        self._least += self._costs.least(counts)
        return uncounted(torch.zeros_like(x), depth.int(), num_layers)
