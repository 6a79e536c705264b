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
    threshold: float | None  # for every lane that is given none of its own

    def asks(self, layers: int) -> Sequence[int]:
        """The layers after which somebody may leave. Known beforehand, so a layer nobody asks at costs nothing."""

    def check(self, thresholds: Tensor) -> None:
        """Raises ValueError where `thresholds` (one per lane) cannot be used."""

    def leave(self, u: Tensor | None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        """bool [n]."""


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
class Threshold:
    """AdaDiff's rule: leave at the first layer with u < threshold, every lane on its own.

    `first` is the first layer asked. The UEM learns how far a layer is from the true noise; how far it is from the
    full network it cannot tell, and the shallowest heads are often the ones to avoid.
    """

    threshold: float
    first: int = 1
    scored = True
    stateful = False

    def __post_init__(self) -> None:
        self.check(torch.tensor([float(self.threshold)]))
        if type(self.first) is not int or self.first < 1:
            raise ValueError(f"the first layer asked is a whole number of 1 or more, got {self.first!r}")

    def asks(self, layers: int) -> Sequence[int]:
        return range(self.first, layers)

    def check(self, thresholds: Tensor) -> None:
        _check_uncertainties(thresholds)

    def leave(self, u: Tensor, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        return u < threshold


@dataclass(frozen=True)
class Patience(Threshold):
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
class BatchMean(Threshold):
    """A baseline, not for use: one decision for the batch, by its mean uncertainty, as in the official sampler."""

    def leave(self, u: Tensor, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        return u.mean() < threshold


@dataclass(frozen=True)
class Full:
    """Nobody leaves, and nothing is scored: the plain network."""

    scored = False
    stateful = False
    threshold = None

    def asks(self, layers: int) -> Sequence[int]:
        return ()

    def check(self, thresholds: Tensor) -> None:
        raise ValueError("the rule 'full' takes no thresholds")

    def leave(self, u: None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        return torch.zeros(len(t), dtype=torch.bool, device=t.device)


@dataclass(frozen=True)
class Depth:
    """Everybody leaves after `threshold` blocks, unscored.

    A fraction is spread over timesteps: 7.3 means 7 blocks at about 70 % of them and 8 at the others, evenly (the
    multiples of the golden ratio fill the unit interval evenly), so that fixed depth can meet any mean depth.
    """

    threshold: float
    scored = False
    stateful = False

    def __post_init__(self) -> None:
        self.check(torch.tensor([float(self.threshold)]))

    def asks(self, layers: int) -> Sequence[int]:
        return range(1, layers)

    def check(self, thresholds: Tensor) -> None:
        if not bool((torch.isfinite(thresholds) & (thresholds >= 1)).all()):
            raise ValueError(f"a depth is at least 1 block, got {thresholds.flatten().tolist()[:8]}")

    def leave(self, u: None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        deeper = torch.frac(t.double() * GOLDEN) < torch.frac(threshold.double())
        return layer >= torch.floor(threshold) + deeper


@dataclass(frozen=True)
class Replay:
    """Lanes leave after the number of blocks given as their threshold; scores are computed as if they were read.

    For measuring: the cost of a known exit pattern, decisions included.
    """

    scored: bool = True
    stateful = False
    threshold = None

    def asks(self, layers: int) -> Sequence[int]:
        return range(1, layers)

    def check(self, thresholds: Tensor) -> None:
        if not bool((thresholds >= 1).all()):
            raise ValueError(f"a replayed exit layer is at least 1, got {thresholds.flatten().tolist()[:8]}")

    def leave(self, u: Tensor | None, layer: int, layers: int, t: Tensor, threshold: Tensor, state: Tensor) -> Tensor:
        return layer >= threshold


class Decision:
    """Asks every running lane's own rule after a block, and gathers by row what that rule reads.

    rules: those in use; which: int64 [B], each lane's index into them, or None where there is but one.
    t, threshold: float [B]. Raises ValueError where a rule refuses its lanes' thresholds or asks nobody.
    """

    def __init__(self, rules: Sequence[Rule], which: Tensor | None, layers: int, t: Tensor, threshold: Tensor | None):
        if which is None and len(rules) != 1:
            raise ValueError(f"{len(rules)} rules need `which`, the index of each lane's own")
        if which is not None and (which.dtype != torch.int64 or which.shape != t.shape):
            raise ValueError(
                f"which must be int64 [{len(t)}], one rule per lane, got {which.dtype} {list(which.shape)}"
            )
        if which is not None and not bool(((which >= 0) & (which < len(rules))).all()):
            raise ValueError(f"which must lie in [0, {len(rules)}), the rules given")
        if threshold is not None and threshold.shape != t.shape:
            raise ValueError(f"threshold must be one number per lane, {tuple(t.shape)}, got {tuple(threshold.shape)}")
        self._rules = [(rule, layers_asked(rule, layers)) for rule in rules]
        self._which, self._layers, self._t = which, layers, t
        self.asked = frozenset().union(*(asked for _, asked in self._rules))
        self.scored = frozenset().union(*(asked for rule, asked in self._rules if rule.scored))
        self.threshold = self._thresholds(threshold)  # float [B], NaN where a rule has none
        self._state = torch.zeros(len(t), device=t.device)
        self._by_row: tuple[Tensor, Tensor, Tensor] | None = None  # until somebody leaves

    def leave(self, u: Tensor | None, layer: int, lanes: Tensor) -> Tensor:
        """bool [n]: who of the running rows leaves. u: float32 [n]; lanes: i32 [n], row -> lane."""
        if self._by_row is None:
            self._by_row = self._t[lanes], self.threshold[lanes], self._state[lanes]
        if self._which is None:
            rule, _ = self._rules[0]
            mask = self._ask(rule, u, layer, lanes, *self._by_row)
        else:
            mask = torch.zeros(len(lanes), dtype=torch.bool, device=self._t.device)
            which = self._which[lanes]
            for index, (rule, asked) in enumerate(self._rules):
                rows = (which == index).nonzero().squeeze(1) if layer in asked else ()
                if len(rows):
                    own = (v[rows] for v in self._by_row)
                    mask[rows] = self._ask(rule, u if u is None else u[rows], layer, lanes[rows], *own)
            if any(rule.stateful for rule, _ in self._rules):
                self._by_row = None
        return mask

    def moved(self) -> None:
        """Rows have left or changed places."""
        self._by_row = None

    def _ask(
        self, rule: Rule, u: Tensor | None, layer: int, lanes: Tensor, t: Tensor, threshold: Tensor, state: Tensor
    ) -> Tensor:
        mask = rule.leave(u if rule.scored else None, layer, self._layers, t, threshold, state)
        if rule.stateful:
            self._state[lanes] = state
        return mask.expand(len(lanes))

    def _thresholds(self, threshold: Tensor | None) -> Tensor:
        given = threshold is not None
        if not given:
            threshold = torch.full(self._t.shape, torch.nan, device=self._t.device)
        for index, (rule, asked) in enumerate(self._rules):
            lanes = slice(None) if self._which is None else self._which == index
            if given:
                if asked or self._which is None:
                    rule.check(threshold[lanes])
            elif rule.threshold is not None:
                threshold[lanes] = float(rule.threshold)
            elif asked:
                raise ValueError(f"{rule} has no threshold of its own; give one per lane")
        return threshold


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
