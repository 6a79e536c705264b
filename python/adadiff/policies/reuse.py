"""Policies that let a lane take the rest of the network from one of its earlier steps: pure, they see numbers alone.

The first blocks run in every step. Then a lane either runs the blocks that follow, its *full* step, or adds what they
added at its last full step, and *reuses*. B lanes; the tensors of one call lie on one device, the CPU in pipelines.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

GATES = ("residual", "input")
LEVELS = ("block", "layer", "unit")
UNITS = ("attention", "cross", "mlp")


@dataclass(frozen=True)
class ReuseContext:
    """What a policy is told about B lanes. int64 [B] each: `step`, the lane's step, from 0; `age`, how many steps ago
    its last full one was, at least 1; `steps_left`, how many follow this one, None where nobody knows. t: float [B],
    the network's time."""

    step: Tensor
    age: Tensor
    steps_left: Tensor | None
    t: Tensor


class ReusePolicy:
    """To inherit from. `first` blocks run in every step, and so do the `last` ones.

    gate: which change since the lane's last full step the policy reads. "residual": of what the first blocks add to
    their input, relative to it, in mean absolute values. "input": of what the first block's attention reads, summed
    up from step to step. None: it reads none. needs_steps_left: it reads `context.steps_left`. whole_batch: the change
    it reads is one of all lanes together, so that they decide as one; a baseline, not for use.
    """

    first: int = 1
    last: int = 0
    gate: str | None = None
    needs_steps_left: bool = False
    whole_batch: ClassVar[bool] = False

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        """Who reuses: bool [B]. change: float32 [B], NaN where it cannot be told, None without a gate.

        The caller runs lanes in full that have nothing to reuse or whose values are NaN, whatever is returned.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Cache(ReusePolicy):
    """First-block cache, every lane on its own: it reuses where the change is at most `threshold`.

    gate="residual" is the first-block cache of ParaAttention and diffusers; gate="input" follows TeaCache (Liu et al.,
    CVPR 2025) without its polynomial. Spelled "cache:threshold=0.08,first=1,last=0,gate=residual".
    """

    threshold: float
    first: int = 1
    last: int = 0
    gate: str = "residual"

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, float | int):
            raise ValueError(f"threshold must be a number, got {self.threshold!r}")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold must be finite and at least 0, got {self.threshold!r}")
        _whole("first", self.first, 1)
        _whole("last", self.last, 0)
        _one_of("gate", self.gate, GATES)

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        assert change is not None
        return change <= self.threshold  # false for NaN

    def __str__(self) -> str:
        first = f",first={self.first}" if self.first != 1 else ""
        last = f",last={self.last}" if self.last else ""
        gate = f",gate={self.gate}" if self.gate != "residual" else ""
        return f"cache:threshold={self.threshold!r}{first}{last}{gate}"


@dataclass(frozen=True)
class BatchCache(ReusePolicy):
    """A baseline, not for use: a first-block cache that decides for all lanes at once, as that of diffusers does, by
    the sum of all changes over the sum of all references. So what a sample gets depends on its batch-mates. Lanes that
    have nothing to reuse yet have no say. Spelled "cache:batch=0.08,first=1"."""

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
    """A static plan, as FORA's and A-SDM's: a full step, then every - 1 steps that reuse.

    The first `dense_early` and the final `dense_late` steps are full. level: what is reused: whole blocks, layers
    (attention and MLP of a block), or units (`unit`, one of them). layers: (first, last), the blocks whose layers or
    units are reused; None: all. What is older than every - 1 steps, as behind an early exit, is computed in any step.
    Spelled "reuse:every=2,level=unit,dense_early=1,dense_late=0,unit=mlp,layers=2-12".
    """

    every: int
    level: str = "block"
    dense_early: int = 1
    dense_late: int = 0
    unit: str | None = None
    layers: tuple[int, int] | None = None

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
        return f"reuse:every={self.every}{level}{early}{late}{unit}{layers}"


@dataclass(frozen=True)
class CachedRest(ReusePolicy):
    """Every lane reuses after `first` blocks as soon as it has something to reuse: what "exit:depth=N" means for a
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


def _layers(layers: object) -> None:
    whole = isinstance(layers, tuple) and len(layers) == 2 and all(type(layer) is int for layer in layers)
    if not whole or not 1 <= layers[0] <= layers[1]:
        raise ValueError(f"layers must be the first and the last of some, counted from 1, got {layers!r}")


def _one_of(name: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")
