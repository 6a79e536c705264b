"""Fits estimates of the error of reuse (policies/estimated.py), and measures what their levels give."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..diffusion.solvers import solver_from
from ..forward.forward import run_forward
from ..forward.narrow import network_of
from ..metrics.intervals import centred_interval, resampled
from ..model import Model
from ..policies.estimated import BY, FIRST_REUSE, ErrorEstimates, EstimatedReuse, Spent, errors_of_age, features
from ..policies.reuse import ESTIMATE, Reuse, ReuseContext, ReusePolicy
from ..sampling.sample_batch import SampleBatch, whole
from ..sampling.sampler import sample
from .calibrating import CALIBRATION_SEED
from .recording import run

LEAST_STEPS = FIRST_REUSE + 2
PLACES = 10  # steps in which reuse alone is measured
LEVELS = 8  # measured, between the least share and nearly all of the work
MOST = 0.95  # of the multiply-adds, at the lowest level
DENSE = 0.2  # share of the steps that the runs whose errors are learned begin with in full
RIDGE = 0.2  # penalty for each sample, on standardised features
LEAST_ERROR = 1e-12  # of an image, so that its logarithm is finite
HALVINGS = 40
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


class ReuseErrors:
    """Fits `ErrorEstimates` for a model, a solver and a number of steps, of 4 or more.

    n samples, with seeds from `seed` on, are drawn in full and with reuse in every other step; which of them have
    larger errors is learned by ridge regression. A quarter of them is drawn again with reuse in one step alone. n // 4
    others measure LEVELS levels, by sample and by step. Deterministic. text_embeds: [P, N, E], null_text_embeds:
    [N, E], for models that take text; samples use the prompts in turn. Raises ValueError for invalid arguments, before
    any work.
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
        if model.config.network.context_tokens and (text_embeds is None or not len(text_embeds)):
            raise ValueError("this model takes text; give text_embeds, [P, N, E], of the prompts to calibrate for")
        if len(model.backbone.blocks) < 2:
            raise ValueError("a network of one block leaves nothing to reuse")
        self.model, self.n, self.steps, self.solver = model, n, steps, solver
        self.guidance_scale, self.seed, self.batch = guidance_scale, seed, batch
        self._texts, self._work = (text_embeds, null_text_embeds), Work.of(model)
        self.samples = SampleBatch.of(
            model, n, policy=Watching(), **self._settings(0, n)
        )  # raises for invalid settings

    @property
    def _measured(self) -> int:
        """The number of other samples, and of those that are drawn with reuse in one step."""
        return self.n // 4

    def run(self, progress: bool = False) -> ErrorEstimates:
        places = sorted(set(np.linspace(FIRST_REUSE, self.steps - 1, PLACES).round().astype(int).tolist()))
        total = 2 * self.n + (len(places) + 1 + 2 * LEVELS) * self._measured
        with tqdm(total=total, disable=not progress, unit="image", dynamic_ncols=True) as bar:
            return self._run(places, bar)

    def _run(self, places: Sequence[int], bar: tqdm) -> ErrorEstimates:
        grown, full = self._watched(bar)
        dense = max(FIRST_REUSE, round(DENSE * self.steps))
        errors = self._errors(Reuse(2, dense_early=dense, order=1), full, bar)[0]
        weights, offsets, deviations = fitted(grown, errors)
        alone = {at: float(self._errors(Once(at), full[: self._measured], bar)[0].mean()) for at in places}
        logs = [math.log(max(alone[at], LEAST_ERROR)) for at in places]
        profile = np.interp(np.arange(self.steps), places, logs).tolist()
        table = solver_from(self.solver).table(self.model.schedule, self.steps)
        nothing = (Spent(0.0, 1.0, 0.0, 0.0, 0.0),)
        estimates = ErrorEstimates(
            network=network_of(self.model.config),
            solver=self.solver,
            guidance_scale=float(self.guidance_scale),
            samples=self.n,
            seed=self.seed,
            t=tuple(table.t.double().tolist()),
            profile=tuple(profile),
            weights=tuple(map(tuple, weights.tolist())),
            offsets=tuple(offsets.tolist()),
            by_sample=nothing,
            by_step=nothing,
        )
        return self._with_levels(estimates, deviations, bar)

    def _with_levels(self, estimates: ErrorEstimates, deviations: Tensor, bar: tqdm) -> ErrorEstimates:
        profile, others = torch.tensor(estimates.profile, dtype=torch.float64), (self.n, self._measured)
        full, _ = sample(self.model, others[1], **self._settings(*others), batch=self.batch)
        bar.update(others[1])
        schedules = of_steps(profile, self._work)
        least = 1.02 * min(schedules)
        found: dict[str, list[Spent]] = {by: [] for by in BY}
        for share in np.linspace(least, MOST, LEVELS).tolist():
            level = level_for(share, profile, deviations, self._work)
            of_step = schedules[min(schedules, key=lambda one: abs(one - share))]
            for by, chosen in zip(BY, (level, of_step), strict=True):
                if chosen in [one.level for one in found[by]]:
                    bar.update(others[1])
                    continue
                found[by].append(self._spent(estimates, by, chosen, full, bar))
        kept = {by: rising(spent) for by, spent in found.items()}
        return replace(estimates, **{f"by_{by}": spent for by, spent in kept.items()})

    def _spent(self, estimates: ErrorEstimates, by: str, level: float, full: Tensor, bar: tqdm) -> Spent:
        at = replace(estimates, **{f"by_{by}": (Spent(level, 1.0, 0.0, 0.0, 0.0),)})
        errors, share = self._errors(EstimatedReuse(at, 1.0, by), full, bar, begin=self.n)
        draws = torch.stack([errors[rows].mean() for rows in resampled(len(errors), RESAMPLES, seed=0)])
        interval = centred_interval(float(errors.mean()), draws)
        return Spent(level, share, float(errors.mean()), interval.low, interval.high)

    def _watched(self, bar: tqdm) -> tuple[Tensor, Tensor]:
        """Features float64 [S, H, n, D] of full runs, for H halves of guidance, and the images."""
        policy = self.samples.parts.reuse
        assert isinstance(policy, Watching)
        images = run(self.model, self.samples, self.batch, lambda: run_forward)
        bar.update(self.n)
        parts = [policy.seen[i : i + self.steps] for i in range(0, len(policy.seen), self.steps)]
        halves = 2 if self.guidance_scale != 1 else 1
        grown = torch.cat([torch.stack(part).unflatten(1, (halves, -1)) for part in parts], 2)
        return grown.double(), images

    def _errors(self, policy: ReusePolicy, full: Tensor, bar: tqdm, begin: int = 0) -> tuple[Tensor, float]:
        """Mean squared differences float64 [n] of the samples from number `begin` on to their images in `full`, and the
        share of the multiply-adds."""
        settings = self._settings(begin, len(full))
        images, report = sample(self.model, len(full), **settings, batch=self.batch, policy=policy)
        bar.update(len(full))
        return (images.cpu() - full.cpu()).double().square().flatten(1).mean(1), report.macs / report.macs_full

    def _settings(self, begin: int, n: int) -> dict[str, object]:
        text, null = self._texts
        settings = {"steps": self.steps, "solver": self.solver, "guidance_scale": self.guidance_scale}
        settings |= {"seed": self.seed + begin}
        if text is not None:
            turn = torch.arange(begin, begin + n, device="cpu") % len(text)
            return {**settings, "text_embeds": text[turn], "null_text_embeds": null}
        classes = self.model.config.classes
        return {**settings, **({"class_labels": [i % classes for i in range(n)]} if classes else {})}


def fitted(grown: Tensor, errors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [S, D], offsets [S] and fitted deviations [S, H, n] of log errors from their mean, by ridge regression in
    each step. grown: float64 [S, H, n, D]; errors: float64 [n]."""
    S, H, _, D = grown.shape
    log = errors.clamp_min(LEAST_ERROR).log()
    aim = (log - log.mean()).repeat(H)
    weights, offsets = torch.zeros(S, D, dtype=torch.float64), torch.zeros(S, dtype=torch.float64)
    for s in range(1, S):
        rows = grown[s].flatten(0, 1)
        mean, spread = rows.mean(0), rows.std(0).clamp_min(1e-12)
        rows = (rows - mean) / spread
        penalty = RIDGE * len(rows) * torch.eye(D, dtype=torch.float64)
        weights[s] = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ aim) / spread
        offsets[s] = -(weights[s] * mean).sum()
    return weights, offsets, torch.einsum("shnd,sd->shn", grown, weights) + offsets[:, None, None]


def full_steps(level: float, profile: Tensor, deviations: Tensor) -> Tensor:
    """bool [S, n]: the full steps at a level, if growth is that of full runs. profile: [S]; deviations: [S, H, n], of
    halves that decide together."""
    S, _, n = deviations.shape
    kept, age, full = deviations[0], torch.zeros(n), []
    for s in range(S):
        age = age + 1
        error = profile[s] + kept + errors_of_age(age)
        runs = ~((error <= level).all(0) & (s >= FIRST_REUSE))
        kept, age = torch.where(runs, deviations[s], kept), torch.where(runs, 0, age)
        full.append(runs)
    return torch.stack(full)


def level_for(share: float, profile: Tensor, deviations: Tensor, work: Work) -> float:
    """The level at which `full_steps` spends a share of the multiply-adds."""
    low, high = float(profile.min() + deviations.min()) - 1, float(profile.max() + deviations.max()) + 1
    high += float(errors_of_age(torch.tensor(len(profile))))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if work.share(full_steps(middle, profile, deviations)) > share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def of_steps(profile: Tensor, work: Work) -> dict[float, float]:
    """Share of the multiply-adds -> level, of all schedules for the mean sample."""
    S = len(profile)
    ages = errors_of_age(torch.arange(1, S + 1)).double()
    edges = (profile[FIRST_REUSE:, None] + ages).flatten().unique().tolist()
    nothing = torch.zeros(S, 1, 1, dtype=torch.float64)
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    return {work.share(full_steps(level, profile, nothing)): level for level in (edges[0] - 1, *middles, edges[-1] + 1)}


def rising(spent: Sequence[Spent]) -> tuple[Spent, ...]:
    """In the order of their shares; of equal shares, the one with the least error."""
    best: dict[float, Spent] = {}
    for one in sorted(spent, key=lambda one: -one.error):
        best[one.share] = one
    return tuple(best[share] for share in sorted(best))
