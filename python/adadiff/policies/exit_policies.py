"""Who leaves: pure functions of (u, layer, t, threshold, state), asked after a block for the rows that still run.

u is the layer's uncertainty, float32 [n] (None for rules that read no score); layer counts from 1 to L and nobody is
asked at L; t and threshold are float [n]; state is one number per lane that a rule may keep from layer to layer, and
`leave` may write to it. A NaN uncertainty never leaves: NaN < threshold is false.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

GOLDEN = (math.sqrt(5) - 1) / 2


class Rule(Protocol):
    scored: bool  # reads u, so the engine must compute it where it asks
    stateful: bool  # writes to state
    by_lane: bool  # looks at no other row's u (taken for true where a rule does not say)
    threshold: float | None  # for every lane that is given none of its own

    def asks(self, layers: int) -> Sequence[int]:
        """The layers after which somebody may leave. Known beforehand, so a layer nobody asks at costs nothing."""

    def check(self, thresholds: Tensor) -> None:
        """Raises ValueError where `thresholds` (one per lane) cannot be used."""

    def leave(self, u: Tensor | None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        """bool [n]."""


class Limits:
    """To inherit from: a rule by which a lane leaves when its u lies below a limit of its own, known beforehand.

    So all limits are made once for an evaluation, and a kernel on a GPU decides by them.
    """

    stateful = False
    by_lane = True

    def limits(self, layers: int, t: Tensor, threshold: Tensor) -> Tensor:
        """t, threshold: float [n]. Returns float32 [layers - 1, n]: below which u a lane leaves after each layer;
        infinity: it leaves whatever u is, unscored or NaN; minus infinity: it stays."""
        raise NotImplementedError

    def leave(self, u: Tensor | None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        return below(u, self.limits(layers, t, threshold)[layer - 1])


def below(u: Tensor | None, limit: Tensor) -> Tensor:
    """bool [n]: who leaves. u: float32 [n] or None; limit: float32 [n], see `Limits.limits`."""
    always = limit.isposinf()
    return always if u is None else (u < limit) | always


def from_depth(layers: int, depth: Tensor) -> Tensor:
    """Limits by which lanes leave after depth: float [n] blocks, whatever their u."""
    layer = torch.arange(1, layers, device=depth.device)[:, None]
    return torch.where(layer >= depth, torch.inf, -torch.inf).float()


def layers_asked(rule: Rule, layers: int) -> frozenset[int]:
    """The layers after which `rule` asks in a network of so many. ValueError where a scored rule asks at none."""
    asked = frozenset(rule.asks(layers))
    if rule.scored and not asked:
        raise ValueError(f"{rule} asks after no block of a network that has {layers}")
    return asked


def _check_uncertainties(thresholds: Tensor) -> None:
    if not bool(((thresholds > 0) & (thresholds < 1)).all()):
        raise ValueError(f"thresholds must lie strictly between 0 and 1, got {thresholds.flatten().tolist()[:8]}")


@dataclass(frozen=True)
class _ByUncertainty:
    """`first` is the first layer asked. The UEM learns how far a layer is from the true noise; how far it is from the
    full network it cannot tell, and the shallowest heads are often the ones to avoid."""

    threshold: float
    first: int = 1
    scored = True
    stateful = False
    by_lane = True

    def __post_init__(self) -> None:
        self.check(torch.tensor([float(self.threshold)]))
        if type(self.first) is not int or self.first < 1:
            raise ValueError(f"the first layer asked is a whole number of 1 or more, got {self.first!r}")

    def asks(self, layers: int) -> Sequence[int]:
        return range(self.first, layers)

    def check(self, thresholds: Tensor) -> None:
        _check_uncertainties(thresholds)


@dataclass(frozen=True)
class Threshold(Limits, _ByUncertainty):
    """AdaDiff's rule: leave at the first layer with u < threshold, every lane on its own."""

    def limits(self, layers: int, t: Tensor, threshold: Tensor) -> Tensor:
        limits = threshold.float().expand(layers - 1, -1)
        if self.first > 1:
            limits = limits.clone()
            limits[: self.first - 1] = -torch.inf
        return limits


@dataclass(frozen=True)
class Patience(_ByUncertainty):
    """The official code's rule (libs/uvit.py, forward): among the in-blocks the first u < threshold is ignored."""

    stateful = True

    def leave(self, u: Tensor, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        triggered = u < threshold
        if layer > layers // 2:  # the mid block and the out-blocks exit at once
            return triggered
        first = triggered & (state == 0)
        state += triggered
        return triggered & ~first


@dataclass(frozen=True)
class BatchMean(_ByUncertainty):
    """A baseline, not for use: one decision for the batch, by its mean uncertainty, as in the official sampler."""

    by_lane = False

    def leave(self, u: Tensor, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        return u.mean() < threshold


@dataclass(frozen=True)
class Full(Limits):
    """Nobody leaves, and nothing is scored: the plain network."""

    scored = False
    threshold = None

    def asks(self, layers: int) -> Sequence[int]:
        return ()

    def check(self, thresholds: Tensor) -> None:
        raise ValueError("the rule 'full' takes no thresholds")

    def limits(self, layers: int, t: Tensor, threshold: Tensor) -> Tensor:
        return torch.full((layers - 1, len(t)), -torch.inf, device=t.device)


@dataclass(frozen=True)
class Depth(Limits):
    """Everybody leaves after `threshold` blocks, unscored.

    A fraction is spread over timesteps: 7.3 means 7 blocks at about 70 % of them and 8 at the others, evenly (the
    multiples of the golden ratio fill the unit interval evenly), so that fixed depth can meet any mean depth.
    """

    threshold: float
    scored = False

    def __post_init__(self) -> None:
        self.check(torch.tensor([float(self.threshold)]))

    def asks(self, layers: int) -> Sequence[int]:
        return range(1, layers)

    def check(self, thresholds: Tensor) -> None:
        if not bool((torch.isfinite(thresholds) & (thresholds >= 1)).all()):
            raise ValueError(f"a depth is at least 1 block, got {thresholds.flatten().tolist()[:8]}")

    def limits(self, layers: int, t: Tensor, threshold: Tensor) -> Tensor:
        deeper = torch.frac(t.double() * GOLDEN) < torch.frac(threshold.double())
        return from_depth(layers, torch.floor(threshold) + deeper)


@dataclass(frozen=True)
class Replay(Limits):
    """Lanes leave after the number of blocks given as their threshold; scores are computed as if they were read.

    For measuring: the cost of a known exit pattern, decisions included.
    """

    scored: bool = True
    threshold = None

    def asks(self, layers: int) -> Sequence[int]:
        return range(1, layers)

    def check(self, thresholds: Tensor) -> None:
        if not bool((thresholds >= 1).all()):
            raise ValueError(f"a replayed exit layer is at least 1, got {thresholds.flatten().tolist()[:8]}")

    def limits(self, layers: int, t: Tensor, threshold: Tensor) -> Tensor:
        return from_depth(layers, threshold)


RULES = {"threshold": Threshold, "patience": Patience, "batch-mean": BatchMean, "depth": Depth}


def rule_from(rule: Rule | str) -> Rule:
    """A rule, or its spelling: "full", "threshold:0.07", "patience:0.08", "batch-mean:0.07", "depth:7.5".

    Rules that read the uncertainty take the first layer asked, too: "threshold:0.13,first=3".
    """
    if not isinstance(rule, str):
        if not hasattr(rule, "asks"):
            raise ValueError(f"a rule is a Rule or a spelling such as 'threshold:0.07', got {rule!r}")
        return rule
    name, _, value = rule.partition(":")
    if name == "full" and not value:
        return Full()
    if name not in RULES:
        raise ValueError(f"unknown rule {rule!r}, known: full, " + ", ".join(f"{known}:NUMBER" for known in RULES))
    number, comma, first = value.partition(",first=")
    try:
        if comma:
            return RULES[name](float(number), first=int(first))
        return RULES[name](float(number))
    except (ValueError, TypeError) as error:
        example = "depth:8" if name == "depth" else f"{name}:0.07 or {name}:0.07,first=3"
        raise ValueError(f"cannot use rule {rule!r} ({error}); write it as {example}") from None
