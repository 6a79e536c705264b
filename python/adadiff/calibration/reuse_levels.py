"""Levels of reuse by estimated errors (policies/estimated.py): what they spend, and which spends a given share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..model import Model
from ..policies.estimated import FIRST_REUSE, ErrorEstimates, Spent

HALVINGS = 40


@dataclass(frozen=True)
class Work:
    """Shares of the multiply-adds of a full step. reused: of a step that reuses."""

    reused: float

    @staticmethod
    def of(model: Model, first: int = 1) -> "Work":
        network = model.backbone
        blocks = [block.macs(network.tokens) for block in network.blocks]
        always = sum(network.stem_and_head_macs())
        return Work((always + sum(blocks[:first])) / (always + sum(blocks)))

    def share(self, full: Tensor) -> float:
        """full: bool, one for each step and lane."""
        part = float(full.double().mean())
        return part + (1 - part) * self.reused


@dataclass(frozen=True)
class Rule:
    """profile: float64 [S]. See policies/estimated.py."""

    profile: Tensor
    age_power: float

    @staticmethod
    def of(estimates: ErrorEstimates) -> "Rule":
        return Rule(torch.tensor(estimates.profile, dtype=torch.float64, device="cpu"), estimates.age_power)

    def full_steps(self, level: float, deviations: Tensor) -> Tensor:
        """bool [S, n]: the full steps at a level, if growth is that of full runs. deviations: float64 [S, H, n], of
        halves that decide together."""
        kept, age, count, full = deviations[0], *torch.zeros_like(deviations[:2, 0]), []
        for s, error in enumerate(self.profile):
            age = age + 1
            reuses = (error + kept + self.age_power * age.log() <= level).all(0) & (s >= FIRST_REUSE)
            if s:  # the first step knows no growth
                count = torch.where(reuses, count, count + 1)
                kept = torch.where(reuses, kept, kept + (deviations[s] - kept) / count)
            age = torch.where(reuses, age, 0.0)
            full.append(~reuses)
        return torch.stack(full)


def level_for(share: float, rule: Rule, deviations: Tensor, work: Work) -> float:
    """The level at which the rule spends a share of the multiply-adds."""
    low, high = float(rule.profile.min() + deviations.min()) - 1, float(rule.profile.max() + deviations.max()) + 1
    high += rule.age_power * math.log(len(rule.profile))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if work.share(rule.full_steps(middle, deviations)) > share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def of_steps(rule: Rule, work: Work) -> dict[float, float]:
    """Share of the multiply-adds -> level, of all schedules for the mean sample that reuse at all."""
    S = len(rule.profile)
    ages = rule.age_power * torch.arange(1, S + 1, dtype=torch.float64, device="cpu").log()
    edges = (rule.profile[FIRST_REUSE:, None] + ages).flatten().unique().tolist()
    nothing = torch.zeros(S, 1, 1, dtype=torch.float64, device="cpu")
    levels = [*((a + b) / 2 for a, b in pairwise(edges)), edges[-1] + 1]
    return {work.share(rule.full_steps(level, nothing)): level for level in levels}


def front(spent: Sequence[Spent]) -> tuple[Spent, ...]:
    """In the order of their shares, without those that have no less error than one of at most their share."""
    found: list[Spent] = []
    for one in sorted(spent, key=lambda one: (one.share, one.error)):
        if not found or one.error < found[-1].error:
            found.append(one)
    return tuple(found)


def at_level(estimates: ErrorEstimates, by: str, level: float) -> ErrorEstimates:
    """Estimates in which the share 1.0 has this level."""
    return replace(estimates, **{f"by_{by}": (Spent(level, 1.0, 0.0, 0.0, 0.0),)})


def scaled(estimates: ErrorEstimates, gain: float) -> ErrorEstimates:
    """Estimates whose deviations are `gain` times as large."""
    weights = tuple(tuple(float(f"{gain * value:.7g}") for value in row) for row in estimates.weights)
    return replace(estimates, weights=weights, offsets=tuple(gain * value for value in estimates.offsets))


def on_line(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at x of the line through two points, or of the first one if both lie at the same place."""
    (a, before), (b, after) = points
    return before if a == b else before + (x - a) / (b - a) * (after - before)
