"""One threshold per step, such that a given share of the work remains. Pure functions of recorded runs.

A lane that reuses at step s with a change d since its last full step makes an error of weight[s] * d in the final
result. For a given number of full steps the sum of squared errors is least if lanes reuse where weight[s] * d <= level,
with the same level at all steps; so thresholds are level / weight[s]. The growth of d with the steps since the last
full one is modelled as the sum of the changes from step to step, times `growth` for that number of steps.

If lanes are alike, the share of the work may jump at a level. Then the first steps use a level on one side of the jump,
and the other steps a level on the other side.

S steps, n lanes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

HALVINGS = 50
FAR = 1e4  # levels are searched within this factor of the weighted changes
EDGE = 1e-12  # added to a threshold so that rounding does not undo an equality


@dataclass(frozen=True)
class Changes:
    """Changes in a full run. steps: float64 [S, n], the change of each step from the previous one; not finite if there
    is nothing to compare, as at step 0. weights: float64 [S], positive. head: the share of the blocks that a reusing
    lane runs. growth: by number of steps since the last full step; 1 if unknown."""

    steps: Tensor
    weights: Tensor
    head: float
    growth: Mapping[int, float] = field(default_factory=dict)

    def run(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Simulates a run with thresholds [S]. Returns which lanes run in full, bool [S, n], and the modelled changes,
        float64 [S, n]."""
        S, n = self.steps.shape
        total = torch.full((n,), torch.inf, dtype=torch.float64, device="cpu")  # nothing to reuse yet
        age = torch.zeros(n, dtype=torch.int64, device="cpu")
        known = max(self.growth, default=1)
        table = [1.0]
        for steps in range(1, S + 1):
            table.append(self.growth.get(min(steps, known), table[-1]))
        by_age = torch.tensor(table, dtype=torch.float64, device="cpu")
        full, changes = [], []
        for s in range(S):
            total, age = total + self.steps[s], age + 1
            change = total * by_age[age]
            ran = ~(change <= thresholds[s])  # also where it is NaN
            changes.append(change)
            full.append(ran)
            total, age = torch.where(ran, 0.0, total), torch.where(ran, 0, age)
        return torch.stack(full), torch.stack(changes)

    def share(self, thresholds: Tensor) -> float:
        """The modelled share of the blocks that run with thresholds [S]."""
        full = float(self.run(thresholds)[0].double().mean())
        return full + (1 - full) * self.head


def thresholds_for(changes: Changes, share: float) -> Tensor:
    """Thresholds, float64 [S], whose modelled share of the blocks is nearest to `share`."""
    finite = (changes.steps * changes.weights[:, None])[changes.steps.isfinite()]
    finite = finite[finite > 0]
    if not len(finite):
        return torch.zeros(len(changes.steps), dtype=torch.float64, device="cpu")
    low, high = float(finite.min()) / FAR, float(finite.max()) * FAR

    def at(level: float) -> Tensor:
        return level / changes.weights + EDGE

    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        if changes.share(at(middle)) > share:
            low = middle
        else:
            high = middle
    below, above = at(low), at(high)
    mixed = [torch.cat([above[:step], below[step:]]) for step in range(len(above) + 1)]
    return min(mixed, key=lambda one: abs(changes.share(one) - share))


def between(found: Mapping[float, Tensor], share: float) -> Tensor | None:
    """Thresholds [S] between those of the nearest measured shares below and above `share`: at the first half of the
    steps where these differ, those of the lower share, else those of the higher. None if all measured shares are on one
    side, or fewer than two steps differ."""
    less, more = [one for one in found if one < share], [one for one in found if one >= share]
    if not less or not more:
        return None
    low, high = found[max(less)], found[min(more)]
    steps = (low != high).nonzero().flatten()
    if len(steps) < 2:
        return None
    mixed = high.clone()
    half = steps[: len(steps) // 2]
    mixed[half] = low[half]
    return mixed


def measured_growth(seen: Sequence[tuple[Tensor, Tensor]], steps: Tensor) -> dict[int, float]:
    """By number of steps since a lane's last full step: the measured change over the sum of changes from step to step,
    median over steps and lanes, relative to that at one step. seen: for each run, which lanes ran in full, bool [S, n],
    and the changes, float64 [S, n]. steps: float64 [S, n], see `Changes`.
    """
    ratios: dict[int, list[float]] = {}
    for full, changes in seen:
        total = torch.zeros(steps.shape[1], dtype=torch.float64, device="cpu")
        age = torch.zeros(steps.shape[1], dtype=torch.int64, device="cpu")
        for s in range(1, len(steps)):
            total, age = total + steps[s], age + 1
            for lane in range(steps.shape[1]):
                ratio = float(changes[s, lane] / total[lane])
                if 0 < ratio < float("inf"):
                    ratios.setdefault(int(age[lane]), []).append(ratio)
            total, age = torch.where(full[s], 0.0, total), torch.where(full[s], 0, age)
    middle = {
        age: float(torch.tensor(found, dtype=torch.float64, device="cpu").median()) for age, found in ratios.items()
    }
    first = middle.get(1, 1.0)
    return {age: ratio / first for age, ratio in sorted(middle.items())}


def interpolated(places: Mapping[int, float], S: int) -> Tensor:
    """Weights, float64 [S], interpolated in their logarithms between measured steps; ones if there are none."""
    known = {step: weight for step, weight in sorted(places.items()) if weight > 0}
    if not known:
        return torch.ones(S, dtype=torch.float64, device="cpu")
    steps = list(known)
    logs = torch.tensor([known[step] for step in steps], dtype=torch.float64, device="cpu").log()
    found = []
    for s in range(S):
        right = next((i for i, step in enumerate(steps) if step >= s), len(steps) - 1)
        left = max(0, right - 1) if steps[right] > s else right
        part = (s - steps[left]) / (steps[right] - steps[left]) if steps[right] > s and left != right else 0.0
        found.append(logs[left] * (1 - part) + logs[right] * part)
    return torch.stack(found).exp()
