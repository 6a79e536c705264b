"""The part of a solver's list below some noise level: what refines an image that has been noised up to there."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import NoiseSchedule
from .solvers import TRAILING_OF_DIFFUSERS
from .tables import Solver, SolverTable


@dataclass(frozen=True)
class Refining:
    """A `Solver`: an evaluation at t*, where alpha_bar = 1 - sigma, then those of `solver`'s list that lie below t*.

    sigma: in (0, 1) (Starodubcev et al., CVPR 2024: x = sqrt(1 - sigma) x0 + sqrt(sigma) z). Its tables have as many
    rows as there are such evaluations. `table` raises ValueError where the schedule has no such noise level, and for a
    spacing whose steps land beside the list.
    """

    solver: Solver
    sigma: float

    @property
    def alpha_bar(self) -> float:
        """Where it begins."""
        return 1 - self.sigma

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        if getattr(self.solver, "spacing", None) == TRAILING_OF_DIFFUSERS:
            raise ValueError(f"the steps of spacing {TRAILING_OF_DIFFUSERS!r} land beside its list; take 'trailing'")
        if not schedule.has_alpha_bar:
            raise ValueError(f"refining adds noise by alpha_bar, which schedule {schedule.name!r} has not; draw anew")
        try:
            begin = float(schedule.time(torch.tensor(self.alpha_bar, dtype=torch.float64, device="cpu").log()))
        except ValueError:
            raise ValueError(f"schedule {schedule.name!r} has no noise level of sigma = {self.sigma:g}") from None
        below = int((self.solver.table(schedule, steps).t < begin).sum())
        points = self.solver.points(steps) if hasattr(self.solver, "points") else steps
        return self.solver.table(_Below(schedule.name, points, begin, self.alpha_bar), below + 1)


@dataclass(frozen=True)
class _Below(NoiseSchedule):
    """A schedule whose grids begin at time `begin`, where alpha_bar is `at_begin`, and go on with what of the grid of
    `points` times lies below."""

    points: int
    begin: float
    at_begin: float

    @property
    def times(self) -> tuple[float, float]:
        return self.begin, super().times[1]

    def grid(self, steps: int, spacing: str) -> tuple[Tensor, Tensor]:
        t, alpha_bar = super().grid(self.points, spacing)
        kept = t < self.begin
        begin = torch.tensor([[self.begin], [self.at_begin]], dtype=torch.float64, device="cpu")
        t, alpha_bar = torch.cat([begin[0], t[kept]]), torch.cat([begin[1], alpha_bar[:-1][kept], alpha_bar[-1:]])
        if len(t) != steps:
            raise ValueError(f"{len(t)} points of the grid lie below t = {self.begin:g}, not {steps}")
        return t, alpha_bar
