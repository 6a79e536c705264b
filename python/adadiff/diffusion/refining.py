"""Denoising from an intermediate noise level, to refine an image to which noise has been added up to that level."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import NoiseSchedule
from .solvers import TRAILING_OF_DIFFUSERS
from .tables import Solver, SolverTable


@dataclass(frozen=True)
class Refining:
    """A `Solver`: an evaluation at t*, where alpha_bar = 1 - sigma, then those evaluations of `solver` that lie below
    t*.

    sigma: in (0, 1) (Starodubcev et al., CVPR 2024: x = sqrt(1 - sigma) x0 + sqrt(sigma) z). Tables have one row for
    each of these evaluations. `table` raises ValueError if the schedule does not reach this noise level, and for a
    spacing whose steps do not land on its timesteps.
    """

    solver: Solver
    sigma: float

    @property
    def alpha_bar(self) -> float:
        """alpha_bar at t*."""
        return 1 - self.sigma

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        if getattr(self.solver, "spacing", None) == TRAILING_OF_DIFFUSERS:
            raise ValueError(
                f"the steps of spacing {TRAILING_OF_DIFFUSERS!r} do not land on its timesteps; use 'trailing'"
            )
        if not schedule.has_alpha_bar:
            raise ValueError(
                f"refining needs alpha_bar, which schedule {schedule.name!r} does not have; use mode=regenerate"
            )
        try:
            begin = float(schedule.time(torch.tensor(self.alpha_bar, dtype=torch.float64, device="cpu").log()))
        except ValueError:
            raise ValueError(f"schedule {schedule.name!r} has no noise level of sigma = {self.sigma:g}") from None
        below = int((self.solver.table(schedule, steps).t < begin).sum())
        points = self.solver.points(steps) if hasattr(self.solver, "points") else steps
        return self.solver.table(_Below(schedule.name, points, begin, self.alpha_bar), below + 1)


@dataclass(frozen=True)
class _Below(NoiseSchedule):
    """A schedule whose grids begin at time `begin`, where alpha_bar is `at_begin`, and continue with those points of
    the grid of `points` times that lie below."""

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
