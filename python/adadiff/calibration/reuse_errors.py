"""Fits estimates of the error of reuse (policies/estimated.py), and measures what their levels give."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..diffusion.solvers import solver_from
from ..forward.forward import run_forward
from ..forward.narrow import network_of
from ..metrics.intervals import resampled
from ..model import Model
from ..policies.estimated import BY, FIRST_REUSE, LEAST_ERROR, ErrorEstimates, EstimatedReuse, Spent, features, norms_of
from ..policies.reuse import ESTIMATE, Reuse, ReuseContext, ReusePolicy
from ..reading import MOST_TEXT
from ..sampling.sample_batch import SampleBatch, whole
from ..sampling.sampler import sample
from .calibrating import CALIBRATION_SEED, ends, seeds_and_conditions
from .kept_runs import KeptRuns, number
from .recording import run
from .reuse_levels import Rule, Work, at_level, front, level_for, of_steps, on_line, scaled

LEAST_STEPS = FIRST_REUSE + 2
PLACES = 10  # steps in which reuse alone is measured
POWERS = (3.0, 4.5, 6.0)  # of age, of which the best by step is taken
GAINS = (0.3, 0.6, 1.0)  # of deviations, of which the best by sample is taken
TRIED = (0.45, 0.6)  # shares of the multiply-adds at which they are compared
LEVELS = 8  # measured by sample, from LOWEST times the least share of a schedule to MOST of the multiply-adds
LOWEST, MOST = 1.02, 0.95
SCHEDULES = 24  # the most that are measured by step, where work is spent in whole steps
DENSE = 0.2  # share of the steps that the runs whose errors are learned begin with in full
RIDGE = 0.2  # penalty for each sample, on standardised features
MOST_BYTES = 2**33  # of recorded features
NUMBER = 16  # bytes of a weight in a file
RESAMPLES = 1000


@dataclass(frozen=True)
class Once(ReusePolicy):
    """Reuses in step `at` alone."""

    at: int
    order = 1

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return context.step == self.at


@dataclass(eq=False)
class Watching(ReusePolicy):
    """Never reuses. seen: the features [lanes, D] of each step, in the order of the calls."""

    seen: list[Tensor] = field(default_factory=list)
    gate = ESTIMATE
    order = 1

    def estimate(self, growth: Tensor, step: Tensor) -> Tensor:
        self.seen.append(features(growth).cpu())
        return torch.full((len(growth),), torch.nan, dtype=torch.float32, device=growth.device)

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return torch.zeros_like(context.step, dtype=torch.bool)


class ReuseErrors:
    """Fits `ErrorEstimates` for a model, a solver and a number of steps, of 4 or more.

    n samples, with seeds from `seed` on, are drawn in full and with reuse in every other step; which of them have
    larger errors is learned by ridge regression. A quarter of them is drawn again with reuse in one step alone, and to
    compare POWERS and GAINS. n // 4 others measure LEVELS levels by sample, and every schedule by step, or SCHEDULES of
    them. Deterministic.
    text_embeds: [P, N, E], null_text_embeds: [N, E], for models that take text; samples use the prompts in turn. Raises
    ValueError for invalid arguments, before any work.
    """

    def __init__(
        self,
        model: Model,
        *,
        n: int = 1024,
        steps: int = 50,
        solver: str = "ddim",
        guidance_scale: float = 1.0,
        seed: int = CALIBRATION_SEED,
        batch: int = 64,
        text_embeds: Tensor | None = None,
        null_text_embeds: Tensor | None = None,
    ):
        whole("n", n, 32)
        whole("batch", batch, 1)
        whole("steps", steps, LEAST_STEPS)
        whole("seed", seed, 0)
        if type(guidance_scale) not in (int, float):
            raise ValueError(f"guidance_scale must be a number, got {guidance_scale!r}")
        if not isinstance(solver, str):
            raise ValueError(f"solver must be text, as it is kept in a file, got {solver!r}")
        solver_from(solver, own=False)  # whoever reads the file imports no classes
        if model.config.network.context_tokens and (text_embeds is None or not len(text_embeds)):
            raise ValueError("this model takes text; give text_embeds, [P, N, E], of the prompts to calibrate for")
        if len(model.backbone.blocks) < 2:
            raise ValueError("a network of one block leaves nothing to reuse")
        self.model, self.n, self.steps, self.solver = model, n, steps, solver
        self.guidance_scale, self.seed, self.batch = guidance_scale, seed, batch
        self._halves = 2 if guidance_scale != 1 else 1
        self._texts, self._work = (text_embeds, null_text_embeds), Work.of(model)
        dim = model.config.network.dim
        if (needed := 8 * steps * self._halves * n * dim) > MOST_BYTES:
            raise ValueError(f"{n} samples of {steps} steps need {needed >> 30} GiB; take fewer, or fewer steps")
        if NUMBER * steps * dim > MOST_TEXT:
            raise ValueError(
                f"estimates of {steps} steps with {dim} channels are too large for a file; take fewer steps"
            )
        self._kept, self._compared = KeptRuns(), 0
        for begin, count in ((0, n), (n, self._others)):
            SampleBatch.of(model, count, **self._settings(begin, count))  # raises for invalid settings

    @property
    def _others(self) -> int:
        """The number of other samples, and of those that are drawn with reuse in few steps."""
        return self.n // 4

    def run(self, progress: bool = False, kept: KeptRuns | None = None) -> ErrorEstimates:
        """kept: keeps the results of the runs, and has those of an earlier attempt."""
        self._kept, self._compared = kept or KeptRuns(), 0
        places = _places(FIRST_REUSE, self.steps - 1, PLACES)
        measured = LEVELS + min(SCHEDULES, self.steps - FIRST_REUSE)
        drawn = len(places) + (len(POWERS) + len(GAINS)) * len(TRIED) + measured + 1
        total = 2 * self.n + drawn * self._others
        with _quiet(), tqdm(total=total, disable=not progress, unit="image", dynamic_ncols=True) as bar:
            return self._run(places, bar)

    def _run(self, places: Sequence[int], bar: tqdm) -> ErrorEstimates:
        grown, full = self._watched(bar)
        dense = max(FIRST_REUSE, round(DENSE * self.steps))
        errors = self._errors(Reuse(2, dense_early=dense, order=1), full, bar)[0]
        weights, offsets, deviations = fitted(grown, errors)
        few = full[: self._others]
        alone = [float(self._errors(Once(at), few, bar)[0].mean()) for at in places]
        logs = [math.log(max(error, LEAST_ERROR)) for error in alone]
        profile = np.interp(np.arange(self.steps), places, logs)
        table = solver_from(self.solver).table(self.model.schedule, self.steps)
        nothing = (Spent(0.0, 1.0, 0.0, 0.0, 0.0),)
        estimates = ErrorEstimates(
            network=network_of(self.model.config),
            solver=self.solver,
            guidance_scale=float(self.guidance_scale),
            samples=self.n,
            seed=self.seed,
            norms=norms_of(self.model.backbone.blocks),
            t=tuple(table.t.double().tolist()),
            profile=tuple(profile.tolist()),
            age_power=POWERS[0],
            weights=tuple(map(tuple, weights.tolist())),
            offsets=tuple(offsets.tolist()),
            by_sample=nothing,
            by_step=nothing,
        )
        powers = [(replace(estimates, age_power=power), deviations) for power in POWERS]
        estimates, _ = self._best(powers, BY[1], few, bar)
        gains = [(scaled(estimates, gain), gain * deviations) for gain in GAINS]
        return self._with_levels(*self._best(gains, BY[0], few, bar), bar)

    def _best(
        self, candidates: Sequence[tuple[ErrorEstimates, Tensor]], by: str, full: Tensor, bar: tqdm
    ) -> tuple[ErrorEstimates, Tensor]:
        """The estimates, with their deviations, of the least error, interpolated between TRIED shares of the work.
        Measured, because errors of steps in a row add up to more than each alone."""

        def error(candidate: tuple[ErrorEstimates, Tensor]) -> float:
            tried, deviations = candidate
            points = []
            for share in TRIED:
                level = self._level(tried, by, share, deviations)
                errors, spent = self._errors(EstimatedReuse(at_level(tried, by, level), 1.0, by), full, bar)
                points.append((spent, math.log(max(float(errors.mean()), LEAST_ERROR))))
            return on_line(points, sum(TRIED) / len(TRIED))

        return min(candidates, key=error)

    def _level(self, estimates: ErrorEstimates, by: str, share: float, deviations: Tensor) -> float:
        rule = Rule.of(estimates)
        if by == BY[0]:
            return level_for(share, rule, deviations, self._work)
        schedules = of_steps(rule, self._work)
        return schedules[min(schedules, key=lambda one: abs(one - share))]

    def _with_levels(self, estimates: ErrorEstimates, deviations: Tensor, bar: tqdm) -> ErrorEstimates:
        others = (self.n, self._others)
        full = self._kept.run("full", lambda: {"images": self._drawn(*others)})["images"]
        bar.update(others[1])
        found: dict[str, tuple[Spent, ...]] = {}
        for by in BY:
            levels = self._levels(estimates, by, deviations)
            found[f"by_{by}"] = front([self._spent(estimates, by, level, full, bar) for level in levels])
        bar.total = bar.n
        return replace(estimates, **found)

    def _drawn(self, begin: int, n: int) -> Tensor:
        return sample(self.model, n, **self._settings(begin, n), batch=self.batch)[0]

    def _levels(self, estimates: ErrorEstimates, by: str, deviations: Tensor) -> list[float]:
        schedules = of_steps(Rule.of(estimates), self._work)
        if by == BY[0]:
            shares = np.linspace(LOWEST * min(schedules), MOST, LEVELS).tolist()
            return [self._level(estimates, by, share, deviations) for share in shares]
        return [schedules[sorted(schedules)[i]] for i in _places(0, len(schedules) - 1, SCHEDULES)]

    def _spent(self, estimates: ErrorEstimates, by: str, level: float, full: Tensor, bar: tqdm) -> Spent:
        policy = EstimatedReuse(at_level(estimates, by, level), 1.0, by)
        errors, share = self._errors(policy, full, bar, begin=self.n)
        draws = torch.stack([errors[rows].mean() for rows in resampled(len(errors), RESAMPLES, seed=0)])
        return Spent(level, share, float(errors.mean()), *ends(draws))

    def _watched(self, bar: tqdm) -> tuple[Tensor, Tensor]:
        """Features float32 [S, H, n, D] of full runs, for H halves of guidance, and the images."""

        def watched() -> dict[str, Tensor]:
            policy = Watching()
            samples = SampleBatch.of(self.model, self.n, policy=policy, **self._settings(0, self.n))
            images = run(self.model, samples, self.batch, lambda: run_forward)
            parts = [policy.seen[i : i + self.steps] for i in range(0, len(policy.seen), self.steps)]
            grown = [torch.stack(part).unflatten(1, (self._halves, -1)) for part in parts]
            return {"grown": torch.cat(grown, 2), "images": images}

        found = self._kept.run("watched", watched)
        bar.update(self.n)
        return found["grown"], found["images"]

    def _errors(self, policy: ReusePolicy, full: Tensor, bar: tqdm, begin: int = 0) -> tuple[Tensor, float]:
        """Mean squared differences float64 [n] of the samples from number `begin` on to their images in `full`, and the
        share of the multiply-adds."""

        def compared() -> dict[str, Tensor]:
            settings = self._settings(begin, len(full))
            images, report = sample(self.model, len(full), **settings, batch=self.batch, policy=policy)
            errors = (images.cpu() - full).double().square().flatten(1).mean(1)
            return {"errors": errors, "share": number(report.macs / report.macs_full)}

        self._compared += 1
        found = self._kept.run(f"compared-{self._compared}", compared)
        bar.update(len(full))
        return found["errors"], float(found["share"])

    def _settings(self, begin: int, n: int) -> dict[str, object]:
        given = {"steps": self.steps, "solver": self.solver, "guidance_scale": self.guidance_scale}
        return {**given, **seeds_and_conditions(self.model, n, self.seed + begin, self.guidance_scale, *self._texts)}


def _places(first: int, last: int, most: int) -> list[int]:
    return sorted(set(np.linspace(first, max(first, last), most).round().astype(int).tolist()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about the policies of a calibration, some of which reuse little or nothing."""
    log = logging.getLogger("adadiff")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def fitted(grown: Tensor, errors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [S, D], offsets [S] and fitted deviations [S, H, n] of log errors from their mean, float64, by ridge
    regression in each step. grown: [S, H, n, D]; errors: float64 [n]."""
    S, H, n, D = grown.shape
    log = errors.clamp_min(LEAST_ERROR).log()
    aim = (log - log.mean()).repeat(H)
    weights, offsets, deviations = (
        torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in ((S, D), (S,), (S, H, n))
    )
    penalty = RIDGE * H * n * torch.eye(D, dtype=torch.float64, device="cpu")
    for s in range(1, S):
        rows = grown[s].flatten(0, 1).double()
        mean, spread = rows.mean(0), rows.std(0).clamp_min(1e-12)
        scaled = (rows - mean) / spread
        weights[s] = torch.linalg.solve(scaled.T @ scaled + penalty, scaled.T @ aim) / spread
        offsets[s] = -(weights[s] * mean).sum()
        deviations[s] = (rows @ weights[s] + offsets[s]).unflatten(0, (H, n))
    return weights, offsets, deviations
