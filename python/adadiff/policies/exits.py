"""Exit policies: the full network, thresholds, patience, a batch's mean, fixed depths, recorded runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .interface import ExitContext, ExitPolicy, LimitPolicy, limits_from_depth

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Full(LimitPolicy):
    """The plain network: no lane exits early, and no layer is scored. Spelled "full"."""

    needs_scores = False

    def exit_layers(self, num_layers: int) -> Sequence[int]:
        return ()

    def check_thresholds(self, thresholds: Tensor) -> None:
        if not bool(thresholds.isnan().all()):
            raise ValueError("the policy 'full' takes no thresholds")

    def limits(self, context: ExitContext) -> Tensor:
        shape = context.num_layers - 1, len(context.t)
        return torch.full(shape, -torch.inf, dtype=torch.float32, device=context.t.device)

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class _ByUncertainty(ExitPolicy):
    """min_layer: the first layer after which lanes may exit. Useful because a UEM learns a layer's distance from the
    true noise, not from the full network's prediction, and the shallowest heads are often the worst."""

    threshold: float = field()  # required; ExitPolicy has a default
    min_layer: int = 1
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.check_thresholds(torch.tensor([float(self.threshold)], dtype=torch.float32, device="cpu"))
        if type(self.min_layer) is not int or self.min_layer < 1:
            raise ValueError(f"min_layer must be a whole number of 1 or more, got {self.min_layer!r}")

    def exit_layers(self, num_layers: int) -> Sequence[int]:
        return range(self.min_layer, num_layers)

    def check_thresholds(self, thresholds: Tensor) -> None:
        if not bool(((thresholds > 0) & (thresholds < 1)).all()):
            raise ValueError(f"thresholds must lie strictly between 0 and 1, got {thresholds.flatten().tolist()[:8]}")

    def __str__(self) -> str:
        return f"exit:{self.name}{self.threshold:g}" + (f",min_layer={self.min_layer}" if self.min_layer > 1 else "")


@dataclass(frozen=True)
class Threshold(LimitPolicy, _ByUncertainty):
    """AdaDiff: each lane exits after its first layer with u < threshold. Spelled "exit:0.135,min_layer=3".

    Tang et al., ECCV 2024, section 3.3. Raises ValueError for a threshold outside (0, 1) or a min_layer below 1."""

    same_limits = True

    def limits(self, context: ExitContext) -> Tensor:
        limits = context.threshold.float().expand(context.num_layers - 1, -1)
        if self.min_layer > 1:
            limits = limits.clone()
            limits[: self.min_layer - 1] = -torch.inf
        return limits


@dataclass(frozen=True)
class Patience(_ByUncertainty):
    """The rule of AdaDiff's code (libs/uvit.py, forward): as `Threshold`, but in the in-blocks the first u < threshold
    is ignored. Spelled "exit:patience=0.08"."""

    name = "patience="

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        return second_trigger(u < context.threshold, layer, context)


def second_trigger(triggered: Tensor, layer: int, context: ExitContext) -> Tensor:
    """bool [n]: rows that exit. triggered: bool [n]. In the in-blocks a row's first trigger is ignored, and it exits at
    its second; in the mid block and the out-blocks it exits at once (libs/uvit.py of AdaDiff's code)."""
    if layer > context.num_layers // 2:
        return triggered
    first = triggered & (context.state == 0)
    context.state.add_(triggered)
    return triggered & ~first


@dataclass(frozen=True)
class BatchMean(_ByUncertainty):
    """A baseline for comparisons: one decision for the whole batch by its mean uncertainty, as in AdaDiff's sampler.
    Conditional and unconditional lanes count as two batches, since that sampler runs them in two passes. patience: as
    in `Patience`, libs/uvit.py; False: exit at the first trigger, as in their text-to-image network
    (libs/uvit_t2i.py). Spelled "exit:batch-mean=0.07" and "exit:batch-mean=0.07,patience=0"."""

    patience: bool = True
    whole_batch = True
    needs_ids = True
    name = "batch-mean="

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.patience, bool):
            raise ValueError(f"patience must be True or False, got {self.patience!r}")

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        unconditional = context.ids.half == 1
        means = torch.where(unconditional, _mean(u, unconditional), _mean(u, ~unconditional))
        triggered = means < context.threshold
        return second_trigger(triggered, layer, context) if self.patience else triggered

    def __str__(self) -> str:
        return super().__str__() + ("" if self.patience else ",patience=0")


def _mean(u: Tensor, rows: Tensor) -> Tensor:
    """The mean of u over rows: bool [n]; NaN if there are none."""
    return torch.where(rows, u, 0).sum() / rows.sum()


@dataclass(frozen=True)
class Depth(LimitPolicy):
    """Every lane exits after `threshold` blocks; no layer is scored. Spelled "exit:depth=8".

    A fraction is spread evenly over timesteps, so that any mean depth can be set: 7.3 means 7 blocks at about 70 % of
    them and 8 at the others (multiples of the golden ratio fill the unit interval evenly). Raises ValueError for a
    depth below 1.
    """

    threshold: float = field()  # required; ExitPolicy has a default
    needs_scores = False

    def __post_init__(self) -> None:
        self.check_thresholds(torch.tensor([float(self.threshold)], dtype=torch.float32, device="cpu"))

    def check_thresholds(self, thresholds: Tensor) -> None:
        if not bool((torch.isfinite(thresholds) & (thresholds >= 1)).all()):
            raise ValueError(f"a depth is at least 1 block, got {thresholds.flatten().tolist()[:8]}")

    def limits(self, context: ExitContext) -> Tensor:
        t, depth = context.t, context.threshold
        deeper = torch.frac(t.double() * GOLDEN) < torch.frac(depth.double())
        return limits_from_depth(context.num_layers, torch.floor(depth) + deeper)

    def __str__(self) -> str:
        return f"exit:depth={self.threshold:g}"


@dataclass(frozen=True, eq=False)
class Replay(LimitPolicy):
    """Lanes exit after given numbers of blocks: their thresholds, or the exits of a recorded run, see `from_report`.

    For measuring the cost of a known exit pattern, including that of deciding, and for repeating a run. exit_layer:
    uint8 [steps, samples, 2] or None (by thresholds). needs_scores: whether to compute scores, which are not used.
    """

    exit_layer: Tensor | None = None
    needs_scores: bool = True

    @staticmethod
    def from_report(report: "RecordedExits", needs_scores: bool = False) -> "Replay":
        """Repeats the exits of a reported run, for a run of as many samples and steps.

        Raises ValueError for a run whose samples reused earlier steps or changed networks: exits alone do not repeat
        it."""
        for name, what in (("reused", "reused earlier steps"), ("went_on", "were drawn by a student first")):
            if getattr(report, name, None) is not None:
                raise ValueError(f"samples of the run reported {what}, which exits alone do not repeat")
        return Replay(report.exit_layer, needs_scores)

    @property
    def needs_ids(self) -> bool:
        return self.exit_layer is not None

    @property
    def needs_threshold(self) -> bool:
        return self.exit_layer is None

    def check_thresholds(self, thresholds: Tensor) -> None:
        if self.exit_layer is not None:
            if not bool(thresholds.isnan().all()):
                raise ValueError("a recorded run knows its exit layers; leave thresholds out")
        elif not bool((thresholds >= 1).all()):
            raise ValueError(
                f"replayed exit layers are given as thresholds of at least 1, got {thresholds.flatten().tolist()[:8]}"
            )

    def limits(self, context: ExitContext) -> Tensor:
        return limits_from_depth(context.num_layers, self._depth(context))

    def _depth(self, context: ExitContext) -> Tensor:
        if self.exit_layer is None:
            return context.threshold
        ids, (steps, samples, _) = context.ids, self.exit_layer.shape
        fits = (ids.step < steps) & (ids.sample < samples)
        if not bool(fits.all()):
            raise ValueError(f"the recorded run has {steps} steps of {samples} samples, this one has more")
        depth = self.exit_layer.to(ids.step.device)[ids.step, ids.sample, ids.half].float()
        return depth.where(depth > 0, torch.inf)  # 0: the lane did not run at this step


class RecordedExits(Protocol):
    """A report with exit_layer: uint8 [steps, samples, 2], 0 where a lane did not run."""

    exit_layer: Tensor
