"""Flow matching: Euler's method, x' = x + (sigma' - sigma) v, and Euler-Maruyama for its SDE."""

import math
from dataclasses import dataclass

import torch

from .schedules import NoiseSchedule, levels
from .tables import SolverTable, make_table


@dataclass(frozen=True)
class FlowEuler:
    """Euler's method for models with schedule "flow", as FlowMatchEulerDiscreteScheduler of diffusers. shift: above 0;
    above 1, more of the steps are at high noise (SD3 is published with 3). Raises ValueError for other values, and in
    `table` for other schedules."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        if schedule.has_alpha_bar:
            raise ValueError(f"flow-euler is for models of schedule 'flow'; with {schedule.name!r} use ddim")
        at = levels(schedule, steps, None, "uniform", self.shift)
        return make_table(at.t, base=torch.ones_like(at.t), cur=at.sigma_after - at.sigma)


@dataclass(frozen=True)
class FlowSDE:
    """Euler-Maruyama for the reverse SDE of flow matching with diffusion norm * sigma, as SiT is published with (Ma et
    al., ECCV 2024; willisma/SiT transport/, diffusion_form "sigma", last_step "Mean").

    With s = 1 - sigma from 0 to 1 - last and velocity v of x: dx = [-v - norm (s v + x)] ds + sqrt(2 norm sigma ds) z;
    the last of the `steps` evaluations covers the remaining interval `last` in one step, without noise. SiT uses 250
    steps. Raises ValueError for norm below 0 or last outside (0, 1), and in `table` for other schedules and one step.
    """

    norm: float = 1.0
    last: float = 0.04

    def __post_init__(self) -> None:
        if type(self.norm) not in (int, float) or not 0 <= self.norm < math.inf:
            raise ValueError(f"norm must be a number of at least 0, got {self.norm!r}")
        if type(self.last) not in (int, float) or not 0 < self.last < 1:
            raise ValueError(f"last must lie between 0 and 1, got {self.last!r}")

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        if schedule.has_alpha_bar:
            raise ValueError(f"flow-sde is for models of schedule 'flow', got {schedule.name!r}")
        if type(steps) is not int or not 2 <= steps <= 1000:
            raise ValueError(f"steps of flow-sde must be an int from 2 to 1000, got {steps!r}")
        s = torch.linspace(0, 1 - self.last, steps, dtype=torch.float64, device="cpu")
        h = torch.cat([s.diff(), torch.tensor([self.last], dtype=torch.float64, device="cpu")])
        noise = (2 * self.norm * (1 - s) * h).sqrt()
        noise[-1] = 0
        return make_table(1000 * (1 - s), base=1 - self.norm * h, cur=-h * (1 + self.norm * s), noise=noise)


def check_shift(shift: float) -> None:
    """Raises ValueError unless shift is a finite number above 0."""
    if type(shift) not in (int, float) or not 0 < shift < math.inf:
        raise ValueError(f"shift must be a number above 0, got {shift!r}")
