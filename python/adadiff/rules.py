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
    threshold: float | None  # for every lane that is given none of its own

    def asks(self, layers: int) -> Sequence[int]:
        """The layers after which somebody may leave. Known beforehand, so a layer nobody asks at costs nothing."""

    def check(self, thresholds: Tensor) -> None:
        """Raises ValueError where `thresholds` (one per lane) cannot be used."""

    def leave(
        self, u: Tensor | None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor
    ) -> Tensor:
        """bool [n]."""


def _check_uncertainties(thresholds: Tensor) -> None:
    if not bool(((thresholds > 0) & (thresholds < 1)).all()):
        raise ValueError(f"thresholds must lie strictly between 0 and 1, got {thresholds.flatten().tolist()[:8]}")


@dataclass(frozen=True)
class Threshold:
    """AdaDiff's rule: leave at the first layer with u < threshold, every lane on its own."""

    threshold: float
    scored = True

    def __post_init__(self) -> None:
        self.check(torch.tensor([float(self.threshold)]))

    def asks(self, layers: int) -> Sequence[int]:
        return range(1, layers)

    def check(self, thresholds: Tensor) -> None:
        _check_uncertainties(thresholds)

    def leave(
        self, u: Tensor, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor
    ) -> Tensor:
        return u < threshold


@dataclass(frozen=True)
class Patience(Threshold):
    """The official code's rule (libs/uvit.py, forward): among the in-blocks the first u < threshold is ignored."""

    def leave(
        self, u: Tensor, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor
    ) -> Tensor:
        triggered = u < threshold
        if layer > layers // 2:  # the mid block and the out-blocks exit at once
            return triggered
        first = triggered & (state == 0)
        state += triggered
        return triggered & ~first


@dataclass(frozen=True)
class BatchMean(Threshold):
    """A baseline, not for use: one decision for the batch, by its mean uncertainty, as the official sampler takes it."""

    def leave(
        self, u: Tensor, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor
    ) -> Tensor:
        return u.mean() < threshold


@dataclass(frozen=True)
class Full:
    """Nobody leaves, and nothing is scored: the plain network."""

    scored = False
    threshold = None

    def asks(self, layers: int) -> Sequence[int]:
        return ()

    def check(self, thresholds: Tensor) -> None:
        raise ValueError("the rule 'full' takes no thresholds")

    def leave(
        self, u: None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor
    ) -> Tensor:
        return torch.zeros(len(t), dtype=torch.bool, device=t.device)


@dataclass(frozen=True)
class Depth:
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

    def leave(
        self, u: None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor
    ) -> Tensor:
        deeper = torch.frac(t.double() * GOLDEN) < torch.frac(threshold.double())
        return layer >= torch.floor(threshold) + deeper


@dataclass(frozen=True)
class Replay:
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

    def leave(
        self, u: Tensor | None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor
    ) -> Tensor:
        return layer >= threshold


RULES = {"threshold": Threshold, "patience": Patience, "batch-mean": BatchMean, "depth": Depth}


def rule_from(rule: Rule | str) -> Rule:
    """A rule, or its spelling: "full", "threshold:0.07", "patience:0.08", "batch-mean:0.07", "depth:7.5"."""
    if not isinstance(rule, str):
        return rule
    name, _, value = rule.partition(":")
    if name == "full" and not value:
        return Full()
    if name not in RULES:
        raise ValueError(f"unknown rule {rule!r}, known: full, " + ", ".join(f"{known}:NUMBER" for known in RULES))
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"rule {rule!r} needs a number, as in '{name}:{0.07 if name != 'depth' else 8}'") from None
    return RULES[name](number)
