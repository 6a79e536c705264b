"""The samples in flight: each at its own step, in a place of its own. One tick is one evaluation of the network.

A tick is transactional: what a sample has become is written only when its evaluation and solver step are complete.
So a tick that fails can be run again in halves, which is what happens when memory runs out, and which finds the one
sample that is to blame for any other error.
"""

import dataclasses
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adadiff_kernels import SolverState, guide, solver_step, upload

from ..diffusion.noise import initial_noise, step_noise
from ..diffusion.tables import TableSet
from ..forward import forward as engine
from ..forward.counts import Counts, check_rules, counts_from
from ..forward.forward import ForwardOutput
from ..model import Model
from ..policies.exit_policies import Rule
from .ordering import ExpectedDepth
from .reports import Totals
from .rule_set import RuleSet
from .samples import SampleBatch

SPARE = 64  # tables and rules that nobody uses any more are dropped once there are so many


@dataclass(frozen=True)
class Tick:
    """What one tick did. places: int64 [k], those whose samples made a step; step: int64 [k], which one;
    exit_layer: uint8 [k, 2], by lane (conditional, unconditional), 0 where there is none.
    done: int64, places whose samples are finished. failed: place -> why; its sample has made no step."""

    places: Tensor
    step: Tensor
    exit_layer: Tensor
    done: Tensor
    failed: dict[int, Exception]


class Batch:
    """Up to `capacity` samples of one model. Places of finished and failed samples are free again once `take`n or
    `release`d; results of a sample do not depend on its place.

    What the host decides by lies on the CPU; what the network and the solver see, on `device` (default: the model's),
    which is waited for once a tick, when everything is queued: for the exit layers.
    batch_invariant: images and exits are the same bits in any company, see `evaluate`. counts, compiled: see there.
    evaluate: in place of `adadiff.evaluate`, for experiments and tests.
    """

    @torch.inference_mode(False)  # whatever mode the caller is in, another thread may continue
    def __init__(
        self,
        model: Model,
        capacity: int,
        *,
        batch_invariant: bool = False,
        counts: Counts | str | None = None,
        compiled: bool = False,
        evaluate: Callable[..., ForwardOutput] | None = None,
        device: torch.device | None = None,
    ):
        self.model, self.capacity, self.batch_invariant = model, capacity, batch_invariant
        self.counts, self.device = counts_from(counts, batch_invariant), device or model.device
        engine.check_compiled(compiled, batch_invariant)
        self.compiled, self.totals = compiled, Totals()
        self._evaluate = evaluate or engine.evaluate
        self._free = list(range(capacity))[::-1]
        self._running = torch.zeros(capacity, dtype=torch.bool)
        self._tables, self._rules = TableSet(model.schedule, self.device), RuleSet()
        integers = torch.zeros(7, capacity, dtype=torch.int64)
        self._seed, self._step, self._steps, self._table, self._rule, self._tied, self._channels = integers
        self._threshold, self._guidance = torch.zeros(2, capacity)
        self._interval = torch.zeros(capacity, 2)
        self._context: Tensor | None = None
        self._null: Tensor | None = None
        x = torch.zeros(capacity, *model.backbone.sample_shape, device=self.device)
        self._state = SolverState.start(x, base=False, history=False)
        self._expected = ExpectedDepth(model.layers, capacity)
        self._most = max(1, capacity)  # samples in one evaluation; halved when memory runs out

    @property
    def count(self) -> int:
        """Samples in flight."""
        return self.capacity - len(self._free)

    @property
    def free(self) -> int:
        return len(self._free)

    @torch.inference_mode(False)
    def admit(self, samples: SampleBatch, index: Tensor) -> Tensor:
        """Samples index: int64 [k] of `samples` begin, k at most `free`. Returns their places, int64 [k]."""
        k = len(index)
        if k > self.free:
            raise ValueError(f"{k} samples for {self.free} free places")
        check_rules(self.counts, getattr(samples.rule, "by_lane", True))
        self._drop_spare()
        seeds, steps, first = samples.seeds[index], samples.steps[index], samples.first[index]
        table, rule = self._tables.add(samples.solver, steps, first), self._rules.add(samples.rule)
        x = self._begin_at(samples, index, seeds, table, first)
        state = self._tables.packed.widen(self._state)
        if self._context is None and samples.context is not None:
            shape, dtype = samples.context.shape[1:], samples.context.dtype
            self._context = torch.zeros(self.capacity, *shape, dtype=dtype, device=self.device)
            self._null = torch.zeros_like(self._context)
        places = torch.tensor([self._free.pop() for _ in range(k)], dtype=torch.int64)  # nothing fails from here on
        self._seed[places], self._step[places], self._steps[places] = seeds, first, steps
        self._table[places], self._rule[places] = table, rule
        self._threshold[places], self._guidance[places] = samples.threshold[index], samples.guidance[index]
        self._interval[places], self._channels[places] = samples.interval[index], samples.channels[index]
        self._tied[places] = int(samples.tied)
        there = self._there(places)
        if samples.context is not None:
            self._context[there] = self._there(samples.context[index])
            if samples.null is not None:
                self._null[there] = self._there(samples.null[index])
        self._state = state
        self._state.restart(there, x)
        self._expected.forget(places)
        self._running[places] = True
        return places

    @torch.inference_mode(False)
    def tick(self) -> Tick:
        """One step for every running sample."""
        waiting = [places for places in self._running.nonzero().squeeze(1).split(self._most) if len(places)]
        steps, failed = [], {}
        while waiting:
            places = waiting.pop(0)
            try:
                steps.append(self._advance(places))
            except Exception as error:
                if len(places) == 1:
                    failed[int(places)] = error
                    traceback.clear_frames(error.__traceback__)  # who keeps the error keeps no tensors
                    self._running[places] = False
                    continue
                half = (len(places) + 1) // 2
                if _no_memory(error):
                    self._most = half
                    self._count(halvings=1)
                    waiting = list(torch.cat([places, *waiting]).split(half))
                else:
                    waiting[:0] = places.split(half)
        self._count(ticks=1)
        if not steps:
            none = torch.zeros(0, dtype=torch.int64)
            return Tick(none, none, torch.zeros(0, 2, dtype=torch.uint8), none, failed)
        for places, step, _, state in steps:
            self._state.put(self._there(places), state)
            self._step[places] = step + 1
        places, step, exit_layer = (torch.cat(column) for column in list(zip(*steps, strict=True))[:3])
        done = places[self._step[places] == self._steps[places]]
        self._running[done] = False
        return Tick(places, step, exit_layer, done, failed)

    def take(self, places: Tensor) -> Tensor:
        """The images at places: int64 [k], float32 [k, C, H, W] on `device`; the places are free again."""
        images = self._state.x[self._there(places)]
        self.release(places)
        return images

    def peek(self, places: Tensor) -> Tensor:
        """What the samples at places are now, float32 [k, C, H, W], a copy."""
        return self._state.x[self._there(places)]

    def replace(self, places: Tensor, x: Tensor) -> None:
        """They go on from x: [k, C, H, W] instead. Only between whole steps of their solvers."""
        if x.shape != (len(places), *self._state.x.shape[1:]):
            raise ValueError(f"x must be {[len(places), *self._state.x.shape[1:]]}, got {list(x.shape)}")
        there, x = self._there(places), self._there(x)
        for value in (self._state.x, self._state.base):
            if value is not None:
                value[there] = x.to(value.dtype)

    def release(self, places: Tensor) -> None:
        """Their samples are given up, wherever they stand."""
        self._running[places] = False
        self._free.extend(places.tolist())

    def _begin_at(self, samples: SampleBatch, index: Tensor, seeds: Tensor, table: Tensor, first: Tensor) -> Tensor:
        """What the samples see first: noise, or their start image with noise on it."""
        x = self._each(lambda own: initial_noise(own, self.model.backbone.sample_shape, self.device), seeds)
        if samples.start is None:
            return x
        a = self._there(self._tables.alpha_bar(table, first).view(-1, 1, 1, 1))
        return (a.sqrt() * self._there(samples.start[index]) + (1 - a).sqrt() * x).float()

    def _advance(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor, SolverState]:
        """One evaluation and one solver step. Returns places, steps made, exit layers, uint8 [k, 2], and the new state,
        which is not yet that of the samples."""
        k, step, shape = len(places), self._step[places], self.model.backbone.sample_shape
        t, rows = self._tables.packed.rows(self._table[places], step)
        state = self._state.take(self._there(places))
        lanes = self._lanes(places, t)
        result = self._evaluate_lanes(lanes, places, state.x, t)
        eps, variance = self._guided(lanes, places, result)
        z = None
        if rows.noise:
            z = self._each(lambda s, i: step_noise(s, i, shape, self.device), self._seed[places], step)
        if self.batch_invariant:
            for i in range(k):
                one = self._there(torch.tensor([i]))
                own = (None if value is None else value[one] for value in (z, variance))
                solver_step(state, eps[one], rows.take(one), one, *own)
        else:
            solver_step(state, eps, rows, z=z, variance=variance)
        depth = result.exit_layer.to("cpu")  # waits; everything above is queued
        if lanes.asked:
            self._expected.learn(t[lanes.sample], places[lanes.sample], lanes.half, depth)
        exit_layer = torch.zeros(k, 2, dtype=torch.uint8)
        exit_layer[lanes.sample, lanes.half] = depth.to(torch.uint8)
        self._count(
            evaluations=len(depth),
            blocks=int(depth.sum()),
            macs=result.macs,
            macs_full=result.macs_full,
            rows_moved=result.moved,
        )
        return places, step, exit_layer, state

    def _lanes(self, places: Tensor, t: Tensor) -> "_Lanes":
        """The lanes that the samples at places take, those expected to leave last first."""
        k = len(places)
        low, high = self._interval[places].unbind(1)
        guided = ((self._guidance[places] != 0) & (low <= t) & (t <= high)).nonzero().squeeze(1)
        sample = torch.cat([torch.arange(k), guided])  # the unconditional ones last
        half = torch.zeros(len(sample), dtype=torch.int64)
        half[k:] = 1
        kinds, which = self._rules.kinds, None
        if len(kinds) > 1:
            used, which = self._rule[places].unique(return_inverse=True)
            kinds = [kinds[i] for i in used.tolist()]
        asked = any(rule.asks(self.model.layers) for rule in kinds)
        order = torch.arange(len(sample))
        if asked:
            order = self._expected.order(t[sample], places[sample], half)
        lane = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))  # inverse of order
        pairs = None
        if len(guided) and bool(self._tied[places[guided]].any()):
            partner = torch.arange(len(order))
            both = self._tied[places[guided]].nonzero().squeeze(1)
            partner[guided[both]], partner[k + both] = k + both, guided[both]
            pairs = lane[partner[order]]
        which = None if which is None else which[sample[order]]
        return _Lanes(sample[order], half[order], lane, guided, kinds, which, pairs, asked)

    def _evaluate_lanes(self, lanes: "_Lanes", places: Tensor, x: Tensor, t: Tensor) -> ForwardOutput:
        sample, t = lanes.sample, t[lanes.sample]
        place = places[sample]
        context = None
        if self._context is not None:
            context = self._context[self._there(place)]
            if len(lanes.guided):
                uncond = lanes.half.nonzero().squeeze(1)
                context[self._there(uncond)] = self._null[self._there(place[uncond])]
        options = {"compiled": True} if self.compiled else {}
        if self.counts is not None:
            options["counts"] = self.counts
        return self._evaluate(
            self.model.backbone,
            self.model.exits,
            lanes.kinds,
            x[self._there(sample)],
            t,
            context,
            which=lanes.which,
            threshold=self._threshold[place] if lanes.asked else None,
            pairs=lanes.pairs,
            batch_invariant=self.batch_invariant,
            **options,
        )

    def _guided(self, lanes: "_Lanes", places: Tensor, result: ForwardOutput) -> tuple[Tensor, Tensor | None]:
        """For places: the guided prediction, float32 [k, C, H, W], and the variance that the conditional lanes predict,
        float [k, C, H, W] or None."""
        k, guided = len(places), lanes.guided
        conditional = self._there(lanes.lane[:k])
        eps = result.eps[conditional].float()
        if len(guided):
            there, scale = self._there(guided), self._there(self._guidance[places[guided]])
            uncond = result.eps[self._there(lanes.lane[k:])]
            eps[there] = self._each(guide, eps[there], uncond, scale, self._there(self._channels[places[guided]]))
        return eps, None if result.variance is None else result.variance[conditional]

    def _there(self, value: Tensor) -> Tensor:
        return upload(value, self.device)

    def _each(self, function: Callable[..., Tensor], *by_sample: Tensor) -> Tensor:
        """function of all samples, or, where it must not matter who the others are, sample by sample."""
        if not self.batch_invariant or not len(by_sample[0]):
            return function(*by_sample)
        return torch.cat([function(*(v[i : i + 1] for v in by_sample)) for i in range(len(by_sample[0]))])

    def _count(self, **more: int) -> None:
        values = {name: getattr(self.totals, name) + value for name, value in more.items()}
        self.totals = dataclasses.replace(self.totals, **values)

    def _drop_spare(self) -> None:
        """A server meets ever new settings; those that nobody uses are forgotten."""
        occupied = torch.ones(self.capacity, dtype=torch.bool)
        occupied[self._free] = False
        for kinds, index in ((self._tables, self._table), (self._rules, self._rule)):
            if len(kinds) > SPARE + self.count:
                index[occupied] = kinds.keep(index[occupied])


@dataclass(frozen=True)
class _Lanes:
    """The lanes of one evaluation. sample: int64 [B], position in the places evaluated; half: int64 [B], 0 or 1, the
    unconditional one; lane: int64 [B], where the conditional lanes, then those of `guided` lie; kinds, which, pairs: as
    for `evaluate`; asked: somebody may leave."""

    sample: Tensor
    half: Tensor
    lane: Tensor
    guided: Tensor
    kinds: list[Rule]
    which: Tensor | None
    pairs: Tensor | None
    asked: bool


def _no_memory(error: Exception) -> bool:
    """Whether memory ran out; on a CPU PyTorch says so in words only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
