"""Ways to serve: rules whose exits are known beforehand, the plain network's own server, servers that never run dry."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from adadiff import ForwardOutput, Model
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.solvers import DDIM
from adadiff.diffusion.tables import TableSet
from adadiff.policies.exit_policies import BatchMean, Limits, from_depth
from adadiff_kernels import ActiveSet, SolverState, solver_step, upload
from benchmarks.suites.network import in_batches

LOCK_STEP = "lock step, plain"
PLAIN = "continuous, plain"
MEAN = "continuous, batch mean"
AGREE = "continuous, all must agree"
STATIC = "continuous, static table"
OURS = "ours"
INVARIANT = "ours, batch-invariant"
NO_EXITS = "our engine, no exits"

TIME = 1000  # the networks' times are 0..1000

Evaluate = Callable[..., ForwardOutput]


@dataclass(frozen=True)
class DepthTable(Limits):
    """A lane leaves after the number of blocks that the table holds for its timestep, plus its threshold.

    depths: over equal parts of the network's time, the image's end first. scored: scores are computed after every
    block and decisions made as if they were read; else only the blocks of the table are asked, unscored.
    together: one decision for the batch, by the "mean" depth of its lanes, or by "all", when the deepest may leave.
    """

    depths: tuple[int, ...]
    scored: bool = True
    together: str | None = None
    threshold = 0.0

    @property
    def by_lane(self) -> bool:
        return self.together is None

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"a table holds depths of at least 1 block, got {self.depths}")
        if self.together not in (None, "mean", "all"):
            raise ValueError(f"lanes leave together by 'mean' or 'all', got {self.together!r}")

    def asks(self, layers: int) -> Sequence[int]:
        if self.scored:
            return range(1, layers)
        return sorted({depth for depth in self.depths if depth < layers})

    def check(self, thresholds: Tensor) -> None:
        if not bool(torch.isfinite(thresholds).all()):
            raise ValueError(f"blocks to add must be finite, got {thresholds.tolist()[:8]}")

    def depth(self, t: Tensor, threshold: Tensor) -> Tensor:
        """Blocks to run, float [n], at least 1."""
        part = (t * (len(self.depths) / TIME)).long().clamp(0, len(self.depths) - 1)
        depth = depths_on(self.depths, t.device)[part] + threshold
        if self.together is not None:
            depth = (depth.mean() if self.together == "mean" else depth.max()).expand(len(t))
        return depth.round().clamp(min=1)

    def limits(self, layers: int, t: Tensor, threshold: Tensor) -> Tensor:
        return from_depth(layers, self.depth(t, threshold))


@cache
def depths_on(depths: tuple[int, ...], device: torch.device) -> Tensor:
    """float32, made once: making a tensor of values waits for a GPU."""
    return torch.tensor(depths, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class AllAgree(BatchMean):
    """One decision for the batch: it leaves when the most uncertain of its lanes may."""

    def leave(self, u: Tensor, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        return (u < threshold).all()


def two_phase(layers: int) -> tuple[int, ...]:
    """The noisy half of the time leaves after block 2, the other runs all."""
    return layers, 2


def calibrated(model: Model, exit_layer: Tensor, parts: int = 20) -> tuple[int, ...]:
    """Mean depth in each part of the time. exit_layer: [steps, n], of DDIM runs of so many steps."""
    t = DDIM().table(model.schedule, len(exit_layer)).t
    part = (t * (parts / TIME)).long().clamp(0, parts - 1)
    depth = exit_layer.double().mean(1)
    empty = set(range(parts)) - set(part.tolist())
    if empty:
        raise ValueError(f"{len(exit_layer)} steps say nothing about {len(empty)} of {parts} parts of the time")
    return tuple(max(1, round(float(depth[part == i].mean()))) for i in range(parts))


def plain_network(size: int, network: Callable[..., Tensor] | None = None) -> Evaluate:
    """The plain network on `size` lanes at a time, called as `adadiff.evaluate` is. network: in the backbone's place,
    such as a compiled one."""

    def evaluate(backbone, exits, rule, x, t, context=None, **_: object) -> ForwardOutput:
        inputs = (x, t) if context is None else (x, t, context)
        eps = in_batches(network or backbone, inputs, size)()
        return ForwardOutput(eps, torch.full((len(x),), len(backbone.blocks), dtype=torch.int32), 0, 0, 0, None)

    return evaluate


class Recorder:
    """`adadiff.evaluate`, or what stands in for it, with a record of what it did."""

    def __init__(self, evaluate: Evaluate):
        self._evaluate = evaluate
        self.exit_layers: list[Tensor] = []  # of each call, by lane
        self.seconds: list[float] = []

    def __call__(self, *args: object, **settings: object) -> ForwardOutput:
        started = time.perf_counter()
        result = self._evaluate(*args, **settings)
        self.seconds.append(time.perf_counter() - started)
        self.exit_layers.append(result.exit_layer)
        return result

    @property
    def mean_exit_layer(self) -> float:
        return float(torch.cat(self.exit_layers).double().mean())

    def rows_per_layer(self, layers: int) -> list[float]:
        """Mean over calls of the rows that ran block 1, ..., layers."""
        left = torch.bincount(torch.cat(self.exit_layers), minlength=layers + 1)
        return (left.double().flip(0).cumsum(0).flip(0)[1:] / len(self.exit_layers)).tolist()

    def unordered_moves(self) -> float:
        """Mean over calls of the rows that the same exits would have moved had the lanes lain in random order."""
        generator = torch.Generator().manual_seed(0)
        shuffled = (depth[torch.randperm(len(depth), generator=generator)] for depth in self.exit_layers)
        return sum(map(moves, shuffled)) / len(self.exit_layers)


def moves(exit_layer: Tensor) -> int:
    """Rows moved to keep the running ones together. exit_layer: integers [n], in the order of the rows."""
    active = ActiveSet(len(exit_layer))
    for layer in sorted(set(exit_layer.tolist()))[:-1]:
        active.exit_rows_where(exit_layer[active.running.long()] == layer, layer)
    return active.moved


class Plain:
    """Continuous batching of the plain network with nothing around it: the baseline.

    Called as an `adadiff.Engine` without a thread is: `submit` and `step`. DDIM; every place at its own step.
    """

    def __init__(self, model: Model, capacity: int, evaluate: Evaluate):
        self.model = model
        self._evaluate = evaluate
        self._tables = TableSet(model.schedule, model.device)
        self._waiting: deque[tuple[Future, int, int, int, int]] = deque()
        self._free = list(range(capacity))
        self._running: dict[int, Future] = {}
        self._step, self._table, self._label = torch.zeros(3, capacity, dtype=torch.int64)
        x = torch.zeros(capacity, *model.backbone.sample_shape, device=model.device)
        self._state = SolverState.start(x, base=False, history=False)

    def submit(
        self, *, seed: int, steps: int, label: int = 0, start: Tensor | None = None, strength: float = 1.0
    ) -> Future:
        """start is ignored: what an image shows does not change what it costs."""
        future: Future = Future()
        self._waiting.append((future, seed, steps, steps - int(strength * steps + 1e-6), label))
        return future

    def step(self) -> bool:
        with torch.inference_mode():
            return self._step_all()

    def _step_all(self) -> bool:
        while self._waiting and self._free:
            future, seed, steps, first, label = self._waiting.popleft()
            place = self._free.pop()
            self._running[place] = future
            self._step[place], self._label[place] = first, label
            self._table[place] = self._tables.add(DDIM(), torch.tensor([steps]))
            shape, device = self.model.backbone.sample_shape, self.model.device
            self._state.x[place] = initial_noise(torch.tensor([seed]), shape, device)[0]
        if not self._running:
            return False
        places = torch.tensor(list(self._running))
        tables, device = self._tables.packed, self.model.device
        t, rows = tables.rows(self._table[places], self._step[places])
        there, t = upload(places, device), upload(t, device)
        state = self._state.take(there)
        context = upload(self._label[places], device) if self.model.config.network.num_classes else None
        solver_step(state, self._evaluate(self.model.backbone, None, None, state.x, t, context).eps, rows)
        self._state.put(there, state)
        self._step[places] += 1
        for place in places[self._step[places] == tables.steps[self._table[places]]].tolist():
            self._free.append(place)
            self._running.pop(place).set_result(self._state.x[place].clone())
        return True


class Saturated:
    """One tick a call of a server that has a request for every place at any time.

    The first ones begin at evenly spread steps, as in a service that has run for long, or (spread=False) all at
    their first. settings: of every request. The seconds of each tick are kept.
    """

    def __init__(
        self, server: object, shape: Sequence[int], capacity: int, steps: int, spread: bool = True, **settings: object
    ):
        self._server = server
        self._settings = {"steps": steps, **settings}
        self._begun = 0
        self._ended: deque[Future] = deque()
        self.seconds: list[float] = []
        for i in np.random.default_rng(0).permutation(capacity).tolist():
            first = i * steps // capacity if spread else 0
            strength = min(1.0, (steps - first + 0.25) / steps)  # rounded down to whole steps
            self._submit(start=torch.zeros(*shape), strength=strength)

    def __call__(self) -> None:
        started = time.perf_counter()
        self._server.step()
        while self._ended:
            self._ended.popleft().result()  # raises what it failed with
            self._submit()
        self.seconds.append(time.perf_counter() - started)

    def _submit(self, **settings: object) -> None:
        future = self._server.submit(seed=self._begun, **self._settings, **settings)
        self._begun += 1
        future.add_done_callback(self._ended.append)
