"""The result of a calibration, stored with the model, and the policies that use it: "exit:budget=0.55",
"exit:table=0.55"."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .interface import ExitContext, LimitPolicy, limits_from_depth

NEAR = 1e-5  # shares closer than this count as equal
LARGEST = 2**63  # largest whole number in a file


@dataclass(frozen=True)
class Measured:
    """A policy measured on held-out samples: its images against the full network's images from the same noise. Each
    sample is run to the end with the policy, so errors accumulate over steps."""

    share: float  # of the full network's multiply-adds
    depth: float  # mean exit layer
    error: float  # mean squared difference of the images
    low: float  # ends of its 95 % interval
    high: float
    psnr: float | None  # dB, median over samples; None if infinite, or if samples are not images
    frechet: float | None  # Fréchet distance between the features of both sets; None unless that was the aim


@dataclass(frozen=True)
class Budget:
    """Thresholds for one share of the work. S: the times of `Calibration.t`."""

    share: float  # the requested share
    thresholds: tuple[tuple[float, ...], ...]  # [S][L - 1]; 0: no lane exits, 2: every lane
    depths: tuple[int, ...]  # [S], the best exit layers by time alone, from the same recording
    adaptive: Measured
    static: Measured  # at equal work: `depths` and the next cheaper table, mixed among samples
    ratio: tuple[float, float, float] | None  # error of adaptive over static, and the ends of its 95 % interval


@dataclass(frozen=True)
class Calibration:
    """Thresholds of a model by time, for several budgets. t: the network's times at which thresholds were chosen,
    noisiest first; other times use the nearest one. Raises ValueError for fields that do not fit each other."""

    aim: str
    solver: str
    steps: int
    guidance_scale: float  # 1: none
    n: int
    seed: int
    num_layers: int
    t: tuple[float, ...]
    weights: tuple[float, ...]  # the final error that a unit of error at t causes, measured
    budgets: tuple[Budget, ...]
    refit: bool = False  # whether the UEMs were refitted for this calibration

    def __post_init__(self) -> None:
        self._check_types()
        S, K = len(self.t), self.num_layers - 1
        shapes = [(len(b.thresholds), {len(row) for row in b.thresholds}, len(b.depths)) for b in self.budgets]
        if not self.budgets or not S or len(self.weights) != S or any(shape != (S, {K}, S) for shape in shapes):
            raise ValueError(f"a calibration has tables of {S} times and {K} layers, got {shapes}")
        thresholds = [v for b in self.budgets for row in b.thresholds for v in row]
        depths = [d for b in self.budgets for d in b.depths]
        if not all(0 <= v <= 2 for v in thresholds) or not all(1 <= d <= self.num_layers for d in depths):
            raise ValueError("a calibration's thresholds lie in [0, 2] and its depths in 1..L")

    def _check_types(self) -> None:
        """Raises ValueError for a field of the wrong type, as in a damaged file."""
        chosen = [self.guidance_scale, *self.t, *self.weights, *(b.share for b in self.budgets)]
        found = [value for b in self.budgets for part in (b.adaptive, b.static) for value in vars(part).values()]
        found += [value for b in self.budgets for value in b.ratio or ()]
        whole = [self.steps, self.n, self.seed, self.num_layers, *(d for b in self.budgets for d in b.depths)]
        thresholds = [value for b in self.budgets for row in b.thresholds for value in row]
        numbers = [*chosen, *thresholds, *(value for value in found if value is not None)]
        if any(type(v) not in (int, float) or (type(v) is int and abs(v) > LARGEST) for v in numbers):
            raise ValueError("a calibration has a value of another type where it needs a number")
        if any(type(v) is not int or abs(v) > LARGEST for v in whole):
            raise ValueError("a calibration has a value of another type where it needs a whole number")
        if not all(math.isfinite(v) for v in chosen):
            raise ValueError("a calibration's times, weights and shares are finite")
        if not (isinstance(self.aim, str) and isinstance(self.solver, str) and isinstance(self.refit, bool)):
            raise ValueError("a calibration's aim and solver are text, and refit is true or false")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """The calibration of `to_dict`, also after a round trip through JSON. Raises ValueError for anything else."""
        try:
            budgets = [
                Budget(
                    **{
                        **budget,
                        "thresholds": tuple(map(tuple, budget["thresholds"])),
                        "depths": tuple(budget["depths"]),
                        "adaptive": Measured(**budget["adaptive"]),
                        "static": Measured(**budget["static"]),
                        "ratio": budget["ratio"] and tuple(budget["ratio"]),
                    }
                )
                for budget in values["budgets"]
            ]
            tuples = {"t": tuple(values["t"]), "weights": tuple(values["weights"]), "budgets": tuple(budgets)}
            return cls(**{**values, **tuples})
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no calibration: {error}") from None

    @cached_property
    def _tables(self) -> "Tables":
        shares, thresholds, depths = zip(*((b.share, b.thresholds, b.depths) for b in self.budgets), strict=True)
        limits = torch.tensor(thresholds, dtype=torch.float32, device="cpu")
        tables = limits, torch.tensor(depths, dtype=torch.int64, device="cpu")
        return Tables(self.num_layers, self.t, shares, *tables)

    def policy(self, kind: str, share: float) -> "CalibratedThresholds | CalibratedDepths":
        """The policy for a budget. kind: "budget" (by uncertainty) or "table" (by time alone). Raises ValueError for a
        share without calibration."""
        policy = (CalibratedThresholds if kind == "budget" else CalibratedDepths)(share, self._tables)
        policy.check_thresholds(torch.tensor([share], dtype=torch.float32, device="cpu"))
        return policy

    def __str__(self) -> str:
        by_set = self.aim == "distribution"
        head = ("share asked", "measured", "exit layer", "error, 95 % interval", "PSNR in dB")
        sets = ("Fréchet to full, timestep table's",) if by_set else ()
        rows = [(*head, "error over timestep table", *sets)]
        for b in self.budgets:
            a = b.adaptive
            sets = (f"{a.frechet:.3g}, {b.static.frechet:.3g}",) if by_set else ()
            rows.append(
                (
                    f"{b.share:g}",
                    f"{a.share:.3f}",
                    f"{a.depth:.2f} of {self.num_layers}",
                    f"{a.error:.3g} [{a.low:.3g}, {a.high:.3g}]",
                    "" if a.psnr is None else f"{a.psnr:.1f}",
                    "" if b.ratio is None else "{:.2f} [{:.2f}, {:.2f}]".format(*b.ratio),
                    *sets,
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(f"{text:{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)


class Tables:
    """Thresholds [G, S, L - 1] and depths int64 [G, S] for G budgets and S times, looked up by a lane's time and
    budget. Compared by identity, so that policies with the same tables are evaluated together."""

    def __init__(
        self, num_layers: int, t: Sequence[float], shares: Sequence[float], thresholds: Tensor, depths: Tensor
    ):
        times = torch.tensor(t, dtype=torch.float64, device="cpu")
        rising = times.argsort()
        self.num_layers = num_layers
        self.shares = torch.tensor(shares, dtype=torch.float32, device="cpu")
        self.edges = ((times[rising][1:] + times[rising][:-1]) / 2).float()
        self.thresholds, self.depths = thresholds[:, rising], depths[:, rising]
        self.asked = (self.thresholds.amax((0, 1)) > 0).nonzero().squeeze(1).add(1).tolist()
        self.left = sorted(set(self.depths.flatten().tolist()) - {self.num_layers})
        self._places: dict[torch.device, tuple[Tensor, ...]] = {}

    def at(self, t: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """The thresholds [n, L - 1] and depths [n] for t, share: float [n], on t's device."""
        if t.device not in self._places:
            tables = (self.shares, self.edges, self.thresholds, self.depths)
            self._places[t.device] = tuple(value.to(t.device) for value in tables)
        shares, edges, thresholds, depths = self._places[t.device]
        budget = (share[:, None] - shares).abs().argmin(1)
        time = torch.bucketize(t.float(), edges)
        return thresholds[budget, time], depths[budget, time]


@dataclass(frozen=True)
class _Calibrated(LimitPolicy):
    """`threshold` is the requested share; samples may replace it by their own."""

    threshold: float = field()  # required; ExitPolicy has a default
    tables: Tables

    def check_thresholds(self, thresholds: Tensor) -> None:
        known = self.tables.shares
        if not bool(((thresholds.float()[:, None].cpu() - known).abs().amin(1) < NEAR).all()):
            budgets, got = (
                ", ".join(f"{share:g}" for share in shares.tolist()) for shares in (known, thresholds.flatten()[:8])
            )
            raise ValueError(
                f"the model is calibrated for budgets {budgets}, got {got}; `adadiff calibrate` makes others"
            )

    def _check_layers(self, num_layers: int) -> None:
        if num_layers != self.tables.num_layers:
            raise ValueError(f"calibrated for a network of {self.tables.num_layers} blocks, this one has {num_layers}")


@dataclass(frozen=True)
class CalibratedThresholds(_Calibrated):
    """Exits after the first layer whose uncertainty is below the threshold for this timestep, layer and budget. Spelled
    "exit:budget=0.55"."""

    @property
    def needs_scores(self) -> bool:
        return bool(self.tables.asked)

    def exit_layers(self, num_layers: int) -> Sequence[int]:
        self._check_layers(num_layers)
        return self.tables.asked

    def limits(self, context: ExitContext) -> Tensor:
        return self.tables.at(context.t, context.threshold)[0].T

    def __str__(self) -> str:
        return f"exit:budget={self.threshold:g}"


@dataclass(frozen=True)
class CalibratedDepths(_Calibrated):
    """Exits after the number of blocks in the table for this timestep and budget; no layer is scored. Spelled
    "exit:table=0.55"."""

    needs_scores = False

    def exit_layers(self, num_layers: int) -> Sequence[int]:
        self._check_layers(num_layers)
        return self.tables.left

    def limits(self, context: ExitContext) -> Tensor:
        return limits_from_depth(context.num_layers, self.tables.at(context.t, context.threshold)[1])

    def __str__(self) -> str:
        return f"exit:table={self.threshold:g}"
