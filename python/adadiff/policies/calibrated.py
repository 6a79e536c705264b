"""What a calibration found, kept with the model, and the policies that read it: "exit:budget=0.55",
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

NEAR = 1e-5  # shares closer than this are the same
LARGEST = 2**63  # of whole numbers


@dataclass(frozen=True)
class Measured:
    """A policy on samples it was not chosen on, every sample run with its own errors, against the full network's images
    of the same noises."""

    share: float  # of the full network's multiply-adds
    depth: float  # mean exit layer
    error: float  # mean squared difference of the images
    low: float  # ends of its 95 % interval
    high: float
    psnr: float | None  # dB, median over samples; None where it is infinite, or where samples are no pictures
    frechet: float | None  # distance between the two sets' features; None unless that was the aim


@dataclass(frozen=True)
class Budget:
    """Thresholds for one share of the work. Rows are those of `Calibration.t`."""

    share: float  # that was asked for
    thresholds: tuple[tuple[float, ...], ...]  # [S][L - 1]; 0: nobody exits, 2: everybody
    depths: tuple[int, ...]  # [S], the best table without looking at samples, out of the same recording
    adaptive: Measured
    static: Measured  # of as much work: the table `depths` and the next one below it in work, mixed among samples
    ratio: tuple[float, float, float] | None  # of the errors, adaptive over static, with the ends of its 95 % interval


@dataclass(frozen=True)
class Calibration:
    """t: the network's times at which thresholds were chosen, noisiest first; between them the nearest counts."""

    aim: str
    solver: str
    steps: int
    guidance_scale: float  # 1: none
    n: int
    seed: int
    num_layers: int
    t: tuple[float, ...]
    weights: tuple[float, ...]  # what a unit of error at t adds to the final error, measured
    budgets: tuple[Budget, ...]
    refit: bool = False  # whether the UEMs were fitted anew for it, or are as they were trained

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
        """ValueError where a field is not of its kind, as a damaged file may have it."""
        chosen = [self.guidance_scale, *self.t, *self.weights, *(b.share for b in self.budgets)]
        found = [value for b in self.budgets for part in (b.adaptive, b.static) for value in vars(part).values()]
        found += [value for b in self.budgets for value in b.ratio or ()]
        whole = [self.steps, self.n, self.seed, self.num_layers, *(d for b in self.budgets for d in b.depths)]
        thresholds = [value for b in self.budgets for row in b.thresholds for value in row]
        numbers = [*chosen, *thresholds, *(value for value in found if value is not None)]
        if any(type(v) not in (int, float) or (type(v) is int and abs(v) > LARGEST) for v in numbers):
            raise ValueError("a calibration has something else where it needs a number")
        if any(type(v) is not int or abs(v) > LARGEST for v in whole):
            raise ValueError("a calibration has something else where it needs a whole number")
        if not all(math.isfinite(v) for v in chosen):
            raise ValueError("a calibration's times, weights and shares are finite")
        if not (isinstance(self.aim, str) and isinstance(self.solver, str) and isinstance(self.refit, bool)):
            raise ValueError("a calibration's aim and solver are text, and refit is true or false")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """Raises ValueError for anything but what `to_dict` makes, JSON in between or not."""
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
        own = limits, torch.tensor(depths, dtype=torch.int64, device="cpu")
        return Tables(self.num_layers, self.t, shares, *own)

    def policy(self, kind: str, share: float) -> "CalibratedThresholds | CalibratedDepths":
        """kind: "budget" (by uncertainty) or "table" (by time alone). Raises ValueError for a share it lacks."""
        policy = (CalibratedThresholds if kind == "budget" else CalibratedDepths)(share, self._tables)
        policy.check_thresholds(torch.tensor([share], dtype=torch.float32, device="cpu"))
        return policy

    def __str__(self) -> str:
        by_set = self.aim == "distribution"
        head = ("share asked", "measured", "exit layer", "error, 95 % interval", "PSNR in dB", "over static table")
        rows = [(*head, "Fréchet to full, static's") if by_set else head]
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
    """Thresholds [G, S, L - 1] and depths int64 [G, S] for G budgets and S times, by the network's time and the budget
    of a lane. Compared by identity, so that policies with the same one are asked together."""

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
        """t, share: float [n]. The thresholds [n, L - 1] and depths [n] that apply, on t's device."""
        if t.device not in self._places:
            own = (self.shares, self.edges, self.thresholds, self.depths)
            self._places[t.device] = tuple(value.to(t.device) for value in own)
        shares, edges, thresholds, depths = self._places[t.device]
        budget = (share[:, None] - shares).abs().argmin(1)
        time = torch.bucketize(t.float(), edges)
        return thresholds[budget, time], depths[budget, time]


@dataclass(frozen=True)
class _Calibrated(LimitPolicy):
    """`threshold` is the share asked for, by lane where samples ask for different ones."""

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
    """Exit after the first layer whose uncertainty is below the threshold of this timestep, layer and budget. Spelled
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
    """Exit after the number of blocks that the table has for this timestep and budget; nothing is scored. Spelled
    "exit:table=0.55"."""

    needs_scores = False

    def exit_layers(self, num_layers: int) -> Sequence[int]:
        self._check_layers(num_layers)
        return self.tables.left

    def limits(self, context: ExitContext) -> Tensor:
        return limits_from_depth(context.num_layers, self.tables.at(context.t, context.threshold)[1])

    def __str__(self) -> str:
        return f"exit:table={self.threshold:g}"
