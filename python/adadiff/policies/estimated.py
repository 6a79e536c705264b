"""Reuse where its estimated error is small: the estimates, which `adadiff calibrate-reuse` fits, and the policy.

Reusing in one step changes a sample's final image. The mean squared change, e, is estimated in its logarithm:

    log e = profile[s] + deviation + age_power log(a)

at step s, a steps after the last full one. profile: measured by reuse in one step alone. deviation: how far this sample
is above the others, a mean over its full steps so far; in each, it is linear in how much each channel of what the
skipped blocks added grew since the full step before, times the best of a few gains of at most 1, as it is a guess.
age_power: the best of a few; above what the error of extrapolation suggests, since errors of steps in a row add up. A
sample reuses where log e is at most a level, the same one at all steps, since that spends a given error on the most
steps.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from adadiff_kernels import upload

from .joining import quoted
from .reuse import ESTIMATE, ReuseContext, ReusePolicy

BY = ("sample", "step")
FIRST_REUSE = 2  # the first step that may reuse: growth is known after two full steps
LARGEST = 1e30  # float32 holds it
LEAST_ERROR = 1e-12  # of an image, so that its logarithm is finite
ROUNDING = 5e-4  # of shares, as tables and messages print them
SAME_NORM = 1e-3  # relative; above the rounding of bfloat16


@dataclass(frozen=True)
class Spent:
    """A level and what it gave on held-out samples. share: of the multiply-adds. error: mean squared difference to the
    images of full runs from the same noise; low, high: its 95 % interval."""

    level: float
    share: float
    error: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class ErrorEstimates:
    """Estimates for one network, solver and number of steps S. D: the network's dim. Equal if all fields are.

    norms: [L], of the weights of each block, see `norms_of`. t: the network's times, [S]. profile: [S], log errors;
    those of the first two steps, which are always full, are not read. weights: [S, D] and offsets: [S], of what a full
    step at s adds to the mean that is the deviation. by_sample, by_step: levels and their results, with rising shares
    and falling levels; by_step is for deviations of 0: all samples reuse in the same steps.
    network: as `network_of` spells it. Raises ValueError for fields that do not fit each other.
    """

    network: str
    solver: str
    guidance_scale: float  # 1: none
    samples: int
    seed: int
    norms: tuple[float, ...]
    t: tuple[float, ...]
    age_power: float
    profile: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    offsets: tuple[float, ...]
    by_sample: tuple[Spent, ...]
    by_step: tuple[Spent, ...]

    def __post_init__(self) -> None:
        S = self.steps
        if S <= FIRST_REUSE or any(len(one) != S for one in (self.profile, self.weights, self.offsets)):
            raise ValueError(f"estimates are by step, for more than {FIRST_REUSE} of them, got {S} times")
        if len({len(row) for row in self.weights}) != 1 or not self.by_sample or not self.by_step:
            raise ValueError("every step has as many weights, and there is a level at least")
        numbers = [*self.norms, *self.t, *self.profile, *self.offsets, *(v for row in self.weights for v in row)]
        numbers += [self.age_power, self.guidance_scale]
        numbers += [v for one in (*self.by_sample, *self.by_step) for v in asdict(one).values()]
        if any(type(v) not in (int, float) or not abs(v) <= LARGEST for v in numbers):
            raise ValueError(f"estimates are numbers of at most {LARGEST:g}")
        for spent in (self.by_sample, self.by_step):
            shares, levels = [one.share for one in spent], [one.level for one in spent]
            if (
                shares != sorted(set(shares))
                or levels != sorted(set(levels))[::-1]
                or not 0 < shares[0] <= shares[-1] <= 1
            ):
                raise ValueError(f"shares must rise within (0, 1] as levels fall, got shares {shares}, levels {levels}")

    def spent(self, by: str) -> tuple[Spent, ...]:
        return self.by_sample if by == BY[0] else self.by_step

    @property
    def steps(self) -> int:
        return len(self.t)

    def __str__(self) -> str:
        """A table of the measured levels."""
        head = ("", "share", "error, 95 % interval")
        rows = [head]
        for by in BY:
            rows += [
                (f"by {by}", f"{s.share:.3f}", f"{s.error:.3g} [{s.low:.3g}, {s.high:.3g}]") for s in self.spent(by)
            ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(f"{text:{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)

    @cached_property
    def text(self) -> str:
        """All fields as JSON."""
        return json.dumps(asdict(self))

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ErrorEstimates) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def level(self, by: str, share: float) -> float:
        """The level for a share of the multiply-adds: by sample, interpolated between measured ones; by step, that of
        the largest measured share within it, because schedules have certain shares only. Raises ValueError for a share
        beyond them."""
        spent = self.spent(by)
        low, high = spent[0].share, spent[-1].share
        if low - ROUNDING <= share <= high + ROUNDING:  # as printed
            share = min(max(share, low), high)
        else:
            raise ValueError(
                f"share must lie from {low:.3f} to {high:.3f}, for which levels were measured, got {share:g}"
            )
        if by == BY[1]:
            return self._within(share).level
        right = next(i for i, one in enumerate(spent) if one.share >= share)
        less, more = spent[max(0, right - 1)], spent[right]
        part = 0.0 if less == more else (share - less.share) / (more.share - less.share)
        return less.level + part * (more.level - less.level)

    def error(self, by: str, share: float) -> float:
        """The measured error at this share; by sample, interpolated in its logarithm. Raises ValueError as `level`."""
        self.level(by, share)
        if by == BY[1]:
            return self._within(share).error
        spent = self.spent(by)
        errors = [math.log(max(one.error, LEAST_ERROR)) for one in spent]
        return math.exp(float(np.interp(share, [one.share for one in spent], errors)))

    def best(self, share: float) -> str:
        """The one of BY with the smaller measured error. Raises ValueError if neither was measured at this share."""
        found = {}
        for by in BY:
            with suppress(ValueError):
                found[by] = self.error(by, share)
        if not found:
            self.level(BY[0], share)
        return min(found, key=found.__getitem__)

    def _within(self, share: float) -> Spent:
        return next((one for one in reversed(self.by_step) if one.share <= share + ROUNDING), self.by_step[0])

    @cached_property
    def _places(self) -> dict[torch.device, tuple[Tensor, Tensor, Tensor]]:
        return {}

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """profile [S], weights [S, D], offsets [S], float32."""
        if device not in self._places:
            profile, weights, offsets = (
                upload(torch.tensor(value, dtype=torch.float32, device="cpu"), device)
                for value in (self.profile, self.weights, self.offsets)
            )
            self._places[device] = profile, weights, offsets
        return self._places[device]


def norms_of(blocks: Iterable[nn.Module]) -> tuple[float, ...]:
    """The root mean square of the weights of each block; nearly the same in all dtypes."""
    each = ([value.detach().float().square().mean() for value in block.parameters()] for block in blocks)
    return tuple(float(torch.stack(values).mean().sqrt()) for values in each)


def same_norms(given: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(given) == len(wanted) and all(
        math.isclose(a, b, rel_tol=SAME_NORM) for a, b in zip(given, wanted, strict=True)
    )


def features(growth: Tensor) -> Tensor:
    """float32 [k, D]: the mean absolute growth of each channel. growth: [k, N, D], by a step."""
    return growth.abs().mean(1, dtype=torch.float32)


@dataclass(frozen=True)
class EstimatedReuse(ReusePolicy):
    """A sample reuses where the estimated error of that is at most a level, which spends about `share` of the full
    network's multiply-adds. What it reuses is extrapolated, as with order=1. by="sample": each sample by its own
    estimate; "step": all samples in the same steps, those that are best for the mean sample, as in SmoothCache (Liu et
    al., arXiv 2411.10510); None: the one whose measured error is smaller at this share. The two lanes of a guided
    sample reuse together, by the larger error, and exit together. source: the file, for messages.
    Spelled "estimate:FILE,share=0.55,by=step". Raises ValueError for other values."""

    estimates: ErrorEstimates
    share: float
    by: str | None = None
    source: str | None = None
    gate = ESTIMATE
    order = 1
    together = True

    def __post_init__(self) -> None:
        if self.by not in (None, *BY):
            raise ValueError(f"by must be {' or '.join(BY)}, got {self.by!r}")
        if not isinstance(self.share, float | int) or isinstance(self.share, bool):
            raise ValueError(f"share must be a number, got {self.share!r}")
        self.estimates.level(self.decides, self.share)

    @cached_property
    def decides(self) -> str:
        """One of BY."""
        return self.estimates.best(self.share) if self.by is None else self.by

    @cached_property
    def level(self) -> float:
        return self.estimates.level(self.decides, self.share)

    def estimate(self, growth: Tensor, step: Tensor) -> Tensor:
        if self.decides == BY[1]:
            return torch.zeros(len(growth), dtype=torch.float32, device=growth.device)
        _, weights, offsets = self.estimates.tensors(growth.device)
        return (features(growth) * weights[step]).sum(1) + offsets[step]

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        assert change is not None
        profile = self.estimates.tensors(change.device)[0]
        error = change + profile[context.step] + self.estimates.age_power * context.age.float().log()
        return error <= self.level  # false for NaN

    def __str__(self) -> str:
        by = f",by={self.by}" if self.by is not None else ""
        return f"estimate:{quoted(self.source or 'FILE')},share={float(self.share)!r}{by}"
