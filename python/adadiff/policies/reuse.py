"""Policies that let a lane reuse features of an earlier step. They are pure functions of a few numbers per lane.

The first blocks run in every step. Then a lane either runs the following blocks (a *full* step) or *reuses*: it adds
what they added in its last full step, or (order=1) what they would add now if that grew as between its last two full
steps, as the first order of TaylorSeer (Liu et al., ICCV 2025, arXiv 2503.06923). B lanes; the tensors of one call are
on one device, in pipelines on the CPU.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

GATES = ("residual", "input")  # changes that are measured
ESTIMATE = "estimate"
LEVELS = ("block", "layer", "unit")
UNITS = ("attention", "cross", "mlp")
ORDERS = (0, 1)
MOST_STEPS = 2**31 - 1  # that a setting may count


@dataclass(frozen=True)
class ReuseContext:
    """What a policy knows about B lanes. int64 [B] each: `step`, the lane's step, from 0; `age`, the steps since its
    last full step, at least 1; `steps_left`, the steps after this one, None if unknown. t: float [B], the network's
    time."""

    step: Tensor
    age: Tensor
    steps_left: Tensor | None
    t: Tensor


class ReusePolicy:
    """Base class of reuse policies. The `first` blocks run in every step, and so do the `last` ones.

    gate: the change since the lane's last full step that the policy reads. "residual": the relative change (mean
    absolute values) of what the first blocks add to their input. "input": the relative change of the first block's
    attention input, summed up from step to step. "estimate": the mean of what `estimate` returned in the lane's full
    steps so far, since growth was last unknown; needs order=1. None: no change. needs_steps_left: whether it reads
    `context.steps_left`. order: 0, what is reused stays as it was; 1, it is extrapolated linearly in the step, from the
    lane's last two full steps (after the first one, which knows no growth, as with 0). whole_batch: whether the change
    is measured over all lanes together, so that they decide as one; a baseline for comparisons. together: whether the
    two lanes of a guided sample reuse only in the same steps, as with `SamplingParams.tied`: errors of both, being
    alike, partly cancel in the guided prediction.
    """

    first: int = 1
    last: int = 0
    gate: str | None = None
    order: int = 0
    needs_steps_left: bool = False
    whole_batch: ClassVar[bool] = False
    together: ClassVar[bool] = False

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        """bool [B]: lanes that reuse. change: float32 [B], NaN if unknown; None without a gate.

        Lanes that have nothing to reuse or hold NaN run in full, whatever is returned.
        """
        raise NotImplementedError

    def estimate(self, growth: Tensor, step: Tensor) -> Tensor:
        """float32 [k]: with the gate "estimate", what full steps of k lanes add to the mean that is their `change`.
        growth: [k, N, D], what the rest of the network grew by a step between a lane's last two full steps, over the
        patches; step: int64 [k], the last of these."""
        raise NotImplementedError


def check_reuse_policy(policy: ReusePolicy) -> None:
    """Raises ValueError for a user's policy with an unknown gate or an invalid `order`, `first` or `last`."""
    if type(policy.order) is not int or policy.order not in ORDERS:
        raise ValueError(f"order of '{policy}' must be 0 or 1, got {policy.order!r}")
    if policy.gate not in (None, *GATES, ESTIMATE):
        known = ", ".join((*GATES, ESTIMATE))
        raise ValueError(f"gate of '{policy}' must be None or one of {known}, got {policy.gate!r}")
    if policy.gate == ESTIMATE and not policy.order:
        raise ValueError(f"gate={ESTIMATE} of '{policy}' reads what was extrapolated; it needs order=1")
    for name, value, least in (("first", policy.first, 1), ("last", policy.last, 0)):
        _whole(f"{name} of '{policy}'", value, least)


def growth(now: Tensor, before: Tensor, steps: Tensor, known: Tensor) -> Tensor:
    """What a reused feature grew by a step: (now - before) / steps where `known`, else 0. Shapes broadcast; `steps` has
    the dtype of `now`, `known` is bool."""
    return torch.where(known, (now - before) / steps, 0.0)


def extrapolated(feature: Tensor, growth: Tensor, steps: Tensor) -> Tensor:
    """The feature `steps` steps later. `steps` has its dtype."""
    return torch.addcmul(feature, growth, steps)


@dataclass(frozen=True)
class Cache(ReusePolicy):
    """First-block cache per lane: a lane reuses where its change is at most `threshold`.

    gate="residual" is the first-block cache of ParaAttention and diffusers; gate="input" follows TeaCache (Liu et al.,
    CVPR 2025) without its polynomial. Spelled "cache:threshold=0.08,first=1,last=0,gate=residual,order=0". Raises
    ValueError for a threshold below 0 and other invalid values.
    """

    threshold: float
    first: int = 1
    last: int = 0
    gate: str = "residual"
    order: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, float | int):
            raise ValueError(f"threshold must be a number, got {self.threshold!r}")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold must be finite and at least 0, got {self.threshold!r}")
        _whole("first", self.first, 1)
        _whole("last", self.last, 0)
        _one_of("gate", self.gate, GATES)
        _one_of("order", self.order, ORDERS)

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        assert change is not None
        return change <= self.threshold  # false for NaN

    def __str__(self) -> str:
        first = f",first={self.first}" if self.first != 1 else ""
        last = f",last={self.last}" if self.last else ""
        gate = f",gate={self.gate}" if self.gate != "residual" else ""
        order = f",order={self.order}" if self.order else ""
        return f"cache:threshold={self.threshold!r}{first}{last}{gate}{order}"


@dataclass(frozen=True)
class BatchCache(ReusePolicy):
    """A baseline for comparisons: a first-block cache that decides for all lanes at once, as that of diffusers, by the
    sum of all changes over the sum of all references. So a sample's result depends on its batch-mates. Lanes with
    nothing to reuse are excluded from the sums. Spelled "cache:batch=0.08,first=1"."""

    threshold: float
    first: int = 1
    gate = "residual"
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Cache(self.threshold, self.first)  # for its checks

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        assert change is not None
        return change <= self.threshold

    def __str__(self) -> str:
        return f"cache:batch={self.threshold!r}{f',first={self.first}' if self.first != 1 else ''}"


@dataclass(frozen=True)
class Reuse(ReusePolicy):
    """A static schedule, as in FORA and A-SDM: one full step, then every - 1 steps that reuse.

    The first `dense_early` and the final `dense_late` steps are full. level: what is reused: "block" (the rest of the
    network after the first blocks), "layer" (all branches of a block), or "unit" (the branches named by `unit`).
    layers: (first, last), the blocks whose branches are reused; None: all. A branch older than every - 1 steps, such as
    one beyond an early exit, is computed in any step. order: as in `ReusePolicy`, at level "block". Raises ValueError
    for invalid values. Spelled "reuse:every=2,level=unit,dense_early=1,dense_late=0,unit=mlp,layers=2-12".
    """

    every: int
    level: str = "block"
    dense_early: int = 1
    dense_late: int = 0
    unit: str | None = None
    layers: tuple[int, int] | None = None
    order: int = 0

    def __post_init__(self) -> None:
        _whole("every", self.every, 1)
        _whole("dense_early", self.dense_early, 1)
        _whole("dense_late", self.dense_late, 0)
        _one_of("level", self.level, LEVELS)
        if self.level == "unit" or self.unit is not None:
            _one_of("unit", self.unit, UNITS)
        if self.unit is not None and self.level != "unit":
            raise ValueError(f"unit={self.unit} is for level=unit, got level={self.level}")
        if self.layers is not None:
            _layers(self.layers)
            if self.level == "block":
                raise ValueError("layers are chosen at level=layer and level=unit, got level=block")
        _one_of("order", self.order, ORDERS)
        if self.order and self.level != "block":
            raise ValueError(f"order={self.order} is for level=block, got level={self.level}")

    @property
    def needs_steps_left(self) -> bool:
        return self.dense_late > 0

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        mask = (context.step >= self.dense_early) & (context.age < self.every)
        if self.dense_late:
            assert context.steps_left is not None
            mask &= context.steps_left >= self.dense_late
        return mask

    def __str__(self) -> str:
        level = f",level={self.level}" if self.level != "block" else ""
        early = f",dense_early={self.dense_early}" if self.dense_early != 1 else ""
        late = f",dense_late={self.dense_late}" if self.dense_late else ""
        unit = f",unit={self.unit}" if self.unit else ""
        layers = f",layers={self.layers[0]}-{self.layers[1]}" if self.layers else ""
        order = f",order={self.order}" if self.order else ""
        return f"reuse:every={self.every}{level}{early}{late}{unit}{layers}{order}"


@dataclass(frozen=True)
class CachedRest(ReusePolicy):
    """Every lane reuses after `first` blocks whenever it has something to reuse: the meaning of "exit:depth=N" for a
    network without trained exits."""

    first: int = field()  # required; ReusePolicy has a default

    def __post_init__(self) -> None:
        _whole("depth", self.first, 1)

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return torch.ones_like(context.step, dtype=torch.bool)

    def __str__(self) -> str:
        return f"exit:depth={self.first}"


def _whole(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")
    if value > MOST_STEPS:
        raise ValueError(f"{name} must be at most {MOST_STEPS}, got a number of {len(str(value))} digits")


def _layers(layers: object) -> None:
    whole = isinstance(layers, tuple) and len(layers) == 2 and all(type(layer) is int for layer in layers)
    if not whole or not 1 <= layers[0] <= layers[1]:
        raise ValueError(f"layers must be (first, last), counted from 1, got {layers!r}")


def _one_of(name: str, value: object, known: tuple[str, ...] | tuple[int, ...]) -> None:
    if type(value) is not type(known[0]) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
