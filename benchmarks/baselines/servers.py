"""Ways of serving: policies with predetermined exits, a server of the plain network, and saturated servers."""

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
from adadiff.forward.output import Costs
from adadiff.policies.exits import BatchMean
from adadiff.policies.interface import ExitContext, LimitPolicy, limits_from_depth
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

Forward = Callable[..., ForwardOutput]  # called as `run_forward` is


@dataclass(frozen=True)
class DepthTable(LimitPolicy):
    """A lane exits after the number of blocks in the table for its timestep, plus its threshold.

    depths: over equal intervals of the network's time, from 0 (image) up. needs_scores: compute uncertainties after
    every block, as an adaptive policy would; False: decide only at the blocks in the table, without uncertainties.
    together: one decision for the batch: "mean", by the mean depth of its lanes, or "all", by the deepest lane.
    """

    depths: tuple[int, ...]
    needs_scores: bool = True
    together: str | None = None
    threshold = 0.0

    @property
    def whole_batch(self) -> bool:
        return self.together is not None

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"a table holds depths of at least 1 block, got {self.depths}")
        if self.together not in (None, "mean", "all"):
            raise ValueError(f"lanes exit together by 'mean' or 'all', got {self.together!r}")

    def exit_layers(self, num_layers: int) -> Sequence[int]:
        if self.needs_scores:
            return range(1, num_layers)
        return sorted({depth for depth in self.depths if depth < num_layers})

    def check_thresholds(self, thresholds: Tensor) -> None:
        if not bool(torch.isfinite(thresholds).all()):
            raise ValueError(f"blocks to add must be finite, got {thresholds.tolist()[:8]}")

    def depth(self, t: Tensor, threshold: Tensor) -> Tensor:
        """Number of blocks to run, float [n], at least 1."""
        part = (t * (len(self.depths) / TIME)).long().clamp(0, len(self.depths) - 1)
        depth = depths_on(self.depths, t.device)[part] + threshold
        if self.together is not None:
            depth = (depth.mean() if self.together == "mean" else depth.max()).expand(len(t))
        return depth.round().clamp(min=1)

    def limits(self, context: ExitContext) -> Tensor:
        return limits_from_depth(context.num_layers, self.depth(context.t, context.threshold))


@cache
def depths_on(depths: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 tensor, cached, because creating it on a GPU synchronises."""
    return torch.tensor(depths, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class AllAgree(BatchMean):
    """One decision for the batch, which exits when its most uncertain lane may exit."""

    name = "all-agree="

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        return (u < context.threshold).all()


def two_phase(num_layers: int) -> tuple[int, ...]:
    """A table that exits after block 2 in the noisy half of the time, and runs all blocks in the other."""
    return num_layers, 2


def calibrated(model: Model, exit_layer: Tensor, parts: int = 20) -> tuple[int, ...]:
    """Mean depth in each interval of the time. exit_layer: [steps, n], of DDIM runs. Raises ValueError for intervals
    without a step."""
    t = DDIM().table(model.schedule, len(exit_layer)).t
    part = (t * (parts / TIME)).long().clamp(0, parts - 1)
    depth = exit_layer.double().mean(1)
    empty = set(range(parts)) - set(part.tolist())
    if empty:
        raise ValueError(f"{len(exit_layer)} steps say nothing about {len(empty)} of {parts} parts of the time")
    return tuple(max(1, round(float(depth[part == i].mean()))) for i in range(parts))


def plain_network(size: int, network: Callable[..., Tensor] | None = None) -> Forward:
    """The plain network with the interface of `run_forward`, on `size` lanes at a time. network: used instead of the
    backbone, such as a compiled one."""

    def forward(model: Model, x: Tensor, t: Tensor, context: Tensor | None, **_: object) -> ForwardOutput:
        inputs = (x, t) if context is None else (x, t, context)
        prediction = in_batches(network or model.backbone, inputs, size)()
        return uncounted(prediction, torch.full((len(x),), model.num_layers, dtype=torch.int32), model.num_layers)

    return forward


def uncounted(prediction: Tensor, exit_layer: Tensor, num_layers: int) -> ForwardOutput:
    """A forward output without counted multiply-adds. exit_layer: int32 [B]."""
    return ForwardOutput(prediction, exit_layer, Costs(0, ((0,) * (num_layers + 1),)), (), 0)


class Recorder:
    """Wraps `run_forward`, or a replacement, and records exit layers and seconds of each call."""

    def __init__(self, forward: Forward):
        self._forward = forward
        self.exit_layers: list[Tensor] = []  # of each call, by lane
        self.seconds: list[float] = []

    def __call__(self, *args: object, **settings: object) -> ForwardOutput:
        started = time.perf_counter()
        result = self._forward(*args, **settings)
        self.seconds.append(time.perf_counter() - started)
        self.exit_layers.append(result.exit_layer)
        return result

    @property
    def mean_exit_layer(self) -> float:
        return float(torch.cat(self.exit_layers).double().mean())

    def rows_per_layer(self, num_layers: int) -> list[float]:
        """Mean over calls of the number of rows that ran block 1, ..., num_layers."""
        exited = torch.bincount(torch.cat(self.exit_layers), minlength=num_layers + 1)
        return (exited.double().flip(0).cumsum(0).flip(0)[1:] / len(self.exit_layers)).tolist()

    def unordered_moves(self) -> float:
        """Mean over calls of the rows that the same exits would have moved with lanes in random order."""
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
    """The baseline: continuous batching of the plain network without our engine.

    `submit` and `step` as in an `adadiff.Engine` without a thread. DDIM; every slot is at its own step.
    """

    def __init__(self, model: Model, capacity: int, forward: Forward):
        self.model = model
        self._forward = forward
        self._tables = TableSet(model.schedule, model.device)
        self._waiting: deque[tuple[Future, int, int, int, int]] = deque()
        self._free = list(range(capacity))
        self._running: dict[int, Future] = {}
        self._step, self._table, self._label = np.zeros((3, capacity), dtype=np.int64)
        x = torch.zeros(capacity, *model.backbone.sample_shape, device=model.device)
        self._state = SolverState.start(x, base=False, history=False)

    def submit(
        self, *, seed: int, steps: int, class_labels: int = 0, init_image: Tensor | None = None, strength: float = 1.0
    ) -> Future:
        """init_image is ignored, because costs do not depend on the content of images."""
        future: Future = Future()
        self._waiting.append((future, seed, steps, steps - int(strength * steps + 1e-6), class_labels))
        return future

    def step(self) -> bool:
        with torch.inference_mode():
            return self._step_all()

    def _step_all(self) -> bool:
        while self._waiting and self._free:
            future, seed, steps, first, label = self._waiting.popleft()
            slot = self._free.pop()
            self._running[slot] = future
            self._step[slot], self._label[slot] = first, label
            self._table[slot] = self._tables.add(DDIM(), np.array([steps]))[0]
            shape, device = self.model.backbone.sample_shape, self.model.device
            self._state.x[slot] = initial_noise(torch.tensor([seed]), shape, device)[0]
        if not self._running:
            return False
        slots = np.array(list(self._running))
        tables, device = self._tables.packed, self.model.device
        t, rows = tables.rows(self._table[slots], self._step[slots])
        on_device, t = upload(torch.from_numpy(slots), device), upload(torch.from_numpy(t), device)
        state = self._state.take(on_device)
        has_labels = bool(self.model.config.network.num_classes)
        context = upload(torch.from_numpy(self._label[slots]), device) if has_labels else None
        solver_step(state, self._forward(self.model, state.x, t, context).prediction, rows)
        self._state.put(on_device, state)
        self._step[slots] += 1
        for slot in slots[self._step[slots] == tables.steps[self._table[slots]]].tolist():
            self._free.append(slot)
            self._running.pop(slot).set_result(self._state.x[slot].clone())
        return True


class Saturated:
    """A server that always has a request for every slot; each call runs one tick.

    The first requests begin at evenly spread steps, as in a service that has run for long, or, with spread=False, all
    at their first step. settings: of every request. seconds: of each tick.
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
            self._submit(init_image=torch.zeros(*shape), strength=strength)

    def __call__(self) -> None:
        started = time.perf_counter()
        self._server.step()
        while self._ended:
            self._ended.popleft().result()  # raises if the request failed
            self._submit()
        self.seconds.append(time.perf_counter() - started)

    def _submit(self, **settings: object) -> None:
        future = self._server.submit(seed=self._begun, **self._settings, **settings)
        self._begun += 1
        future.add_done_callback(self._ended.append)
