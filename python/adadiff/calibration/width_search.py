"""Search for a schedule of widths (DDSM: Yang et al., ICLR 2024, arXiv 2310.03337; EnVision-Research/DDSM).

A candidate has one width for each of several intervals of timesteps. As in the authors' code, pymoo's NSGA-II minimizes
the single objective quality + weight * cost. Two things differ: cost is the share of the full network's multiply-adds,
and a gene is an interval of timesteps (theirs: one timestep).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..metrics.frechet import FeatureStatistics, frechet_distance
from ..metrics.references import Reference, extract
from ..metrics.yardsticks import Yardstick
from ..model import Model
from ..policies.width import Width
from ..sampling.sample_batch import SampleBatch, whole
from ..sampling.sampler import sample
from .calibrating import AIMS, CALIBRATION_SEED
from .kept_runs import KeptRuns, number

MOST_BINS = 1000
TIME_SPAN = 1000.0
Genome = tuple[int, ...]  # the index of the width of each interval, from timestep 0 up


class Candidate(NamedTuple):
    """share: of the full network's multiply-adds. quality: lower is better, see `WidthSearch`. value: quality + weight
    * share, which the search minimizes."""

    width: Width
    share: float
    quality: float
    value: float


@dataclass(frozen=True)
class Found:
    """best: as seen by the search. measured, uniform: the best schedule and each constant width, on samples that the
    search did not draw."""

    best: Candidate
    measured: Candidate
    uniform: tuple[Candidate, ...]

    def __str__(self) -> str:
        rows = [(f"width {one.width.widths[0]:g}", one) for one in self.uniform] + [("schedule", self.measured)]
        lines = [f"{name:<12}{one.share:>16.1%}{one.quality:>12.4g}" for name, one in rows]
        return "\n".join([f"{'':<12}{'multiply-adds':>16}{'quality':>12}", *lines])


class WidthSearch:
    """Searches the schedule with the least quality + weight * share of the multiply-adds.

    aim: what quality is. "distribution": the Fréchet distance of n images to real ones, by `yardstick`; "faithful": the
    mean squared error to the full network's images of the same noises, which needs fewer samples. weight: at least 0;
    larger values give narrower schedules.
    bins: number of intervals of equal length of the network's time, 0..1000. population, generations: of NSGA-II. The
    first population holds each constant width; its other schedules are random, a third of them rising and a third
    falling with time.
    n samples, with seeds from `seed` on, are drawn for every candidate; n others measure the result. Deterministic.
    Raises ValueError for invalid arguments, and ImportError without pymoo, before any work.
    """

    def __init__(
        self,
        model: Model,
        weight: float,
        *,
        aim: str = "distribution",
        bins: int = 10,
        population: int = 16,
        generations: int = 10,
        n: int = 512,
        steps: int = 20,
        solver: str = "ddim",
        guidance_scale: float = 1.0,
        seed: int = CALIBRATION_SEED,
        batch: int = 64,
        yardstick: Yardstick | None = None,
    ):
        _check_pymoo()
        if model.config.widths is None:
            raise ValueError("this model has one width; `adadiff train --widths` makes slimmable ones")
        if model.config.network.context_tokens:
            raise ValueError("the search takes class-conditional or unconditional models; this one takes text")
        if aim not in AIMS:
            raise ValueError(f"aim must be one of {', '.join(AIMS)}, got {aim!r}")
        if type(weight) not in (int, float) or not 0 <= weight < math.inf:
            raise ValueError(f"weight must be a finite number >= 0, got {weight!r}")
        whole("bins", bins, 1, MOST_BINS)
        whole("population", population, len(model.config.widths) + 1)
        whole("generations", generations, 1)
        whole("n", n, 2)
        whole("batch", batch, 1)
        if aim == "distribution" and (yardstick is None or yardstick.features is None):
            raise ValueError("no features are known for this model's images; give some, or take the aim 'faithful'")
        self.model, self.weight, self.aim, self.bins = model, float(weight), aim, bins
        self.population, self.generations, self.seed = population, generations, seed
        self._given = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale}
        self._n, self._batch, self._yardstick = n, batch, yardstick
        SampleBatch.of(model, n, **self._samples(seed))  # raises for invalid settings
        self._reference: Reference | None = None
        self._full: dict[int, Tensor] = {}  # images of the full network, by the first seed
        self._known: dict[Genome, Candidate] = {}
        self._kept, self._drawn = KeptRuns(), 0

    def run(
        self,
        progress: bool = False,
        better: Callable[[Candidate], None] | None = None,
        kept: KeptRuns | None = None,
    ) -> Found:
        """better: called with every candidate that is better than all before it. kept: keeps what the candidates
        reached, and has what those of an earlier attempt did."""
        self._kept, self._drawn = kept or KeptRuns(), 0
        uniform = self._uniform()
        total = self.population * self.generations + len(uniform) + 1
        with tqdm(total=total, disable=not progress, unit="schedule", dynamic_ncols=True) as bar:
            best: Candidate | None = None
            for candidate in self._candidates(bar):
                if best is None or candidate.value < best.value:
                    best = candidate
                    bar.set_postfix(share=f"{best.share:.3f}", quality=f"{best.quality:.4g}")
                    if better is not None:
                        better(best)
            other = self.seed + self._n
            measured = []
            for width in (best.width, *uniform):
                measured.append(self._draw(width, other))
                bar.update()
        return Found(best, measured[0], tuple(measured[1:]))

    def _uniform(self) -> list[Width]:
        return [Width((), (width,)) for width in self.model.config.widths]

    def _candidates(self, bar: tqdm) -> Iterator[Candidate]:
        """The candidates of all generations in turn. Known genomes are not drawn again."""
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.evaluator import Evaluator
        from pymoo.core.problem import Problem
        from pymoo.operators.crossover.pntx import SinglePointCrossover
        from pymoo.operators.mutation.pm import PolynomialMutation
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.problems.static import StaticProblem

        problem = Problem(n_var=self.bins, n_obj=1, xl=0, xu=len(self.model.config.widths) - 1, vtype=int)
        algorithm = NSGA2(
            pop_size=self.population,
            sampling=self._first(),
            crossover=SinglePointCrossover(),
            mutation=PolynomialMutation(vtype=int, repair=RoundingRepair()),
            eliminate_duplicates=True,
        )
        algorithm.setup(problem, termination=("n_gen", self.generations), seed=self.seed % 2**32)
        while algorithm.has_next():
            children = algorithm.ask()
            values = []
            for genome in children.get("X").astype(int).tolist():
                candidate = self._candidate(tuple(genome))
                values.append([candidate.value])
                bar.update()
                yield candidate
            Evaluator().eval(StaticProblem(problem, F=np.array(values)), children)
            algorithm.tell(infills=children)

    def _first(self) -> np.ndarray:
        """The first population, int64 [population, bins]."""
        count = len(self.model.config.widths)
        genes = np.random.default_rng(self.seed).integers(count, size=(self.population, self.bins))
        genes[0::3].sort(axis=1)
        genes[1::3] = np.sort(genes[1::3], axis=1)[:, ::-1]
        genes[:count] = np.arange(count)[:, None]
        return genes

    def _candidate(self, genome: Genome) -> Candidate:
        if genome not in self._known:
            self._known[genome] = self._draw(schedule(genome, self.model.config.widths), self.seed)
        return self._known[genome]

    def _draw(self, width: Width, seed: int) -> Candidate:
        def drawn() -> dict[str, Tensor]:
            images, report = sample(self.model, self._n, batch=self._batch, policy=width, **self._samples(seed))
            return {"share": number(report.macs / report.macs_full), "quality": number(self._quality(images, seed))}

        self._drawn += 1
        found = self._kept.run(f"schedule-{self._drawn}", drawn)
        share, quality = float(found["share"]), float(found["quality"])
        return Candidate(width, share, quality, quality + self.weight * share)

    @torch.inference_mode()
    def _quality(self, images: Tensor, seed: int) -> float:
        if self.aim == "faithful":
            if seed not in self._full:
                self._full[seed], _ = sample(self.model, self._n, batch=self._batch, **self._samples(seed))
            return float((images - self._full[seed]).double().square().mean())
        if self._reference is None:
            self._reference = self._yardstick.reference()
        features = extract(self._yardstick.features, [images.clamp(-1, 1)])
        return frechet_distance(FeatureStatistics.of(features), self._reference.statistics)

    def _samples(self, seed: int) -> dict[str, Any]:
        classes = self.model.config.classes
        labels = [i % classes for i in range(self._n)] if classes else None
        return {**self._given, "seed": list(range(seed, seed + self._n)), "class_labels": labels}


def schedule(genome: Sequence[int], widths: Sequence[float]) -> Width:
    """The schedule of a genome: equal intervals of 0..1000, neighbours of the same width merged."""
    length = TIME_SPAN / len(genome)
    starts = [i for i in range(1, len(genome)) if genome[i] != genome[i - 1]]
    return Width(tuple(length * i for i in starts), tuple(widths[genome[i]] for i in (0, *starts)))


def _check_pymoo() -> None:
    try:
        import pymoo  # noqa: F401
    except ImportError as error:
        raise ImportError("the search needs pymoo: pip install 'adadiff_kernels[search]'") from error
