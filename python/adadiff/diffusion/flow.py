"""Euler's method for flow matching, x' = x + (sigma' - sigma) v, and that of Euler and Maruyama for its SDE."""

import math
from dataclasses import dataclass

import torch

from .schedules import NoiseSchedule, levels
from .tables import SolverTable, make_table


@dataclass(frozen=True)
class FlowEuler:
    """Of models with schedule "flow": FlowMatchEulerDiscreteScheduler of diffusers. shift: above 0; more than 1 spends
    more of the steps where there is much noise (SD3 is published with 3). ValueError for others."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        if schedule.has_alpha_bar:
            raise ValueError(f"flow-euler is for models of schedule 'flow'; with {schedule.name!r} ddim is its like")
        at = levels(schedule, steps, None, "uniform", self.shift)
        return make_table(at.t, base=torch.ones_like(at.t), cur=at.sigma_after - at.sigma)


@dataclass(frozen=True)
class FlowSDE:
    """The reverse SDE of flow matching with diffusion norm * sigma, a step of Euler and Maruyama at a time, as SiT is
    published with (Ma et al., ECCV 2024; willisma/SiT transport/, diffusion_form "sigma", last_step "Mean").

    With s = 1 - sigma from 0 to 1 - last and velocity v of x: dx = [-v - norm (s v + x)] ds + sqrt(2 norm sigma ds) z;
    the last of the `steps` evaluations goes over the rest at once, without noise. SiT takes 250 steps. ValueError for
    other schedules, and for one step.
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
            raise ValueError(f"flow-sde is for models of schedule 'flow', and this is {schedule.name!r}")
        if type(steps) is not int or not 2 <= steps <= 1000:
            raise ValueError(f"steps of flow-sde must be an int from 2 to 1000, got {steps!r}")
        s = torch.linspace(0, 1 - self.last, steps, dtype=torch.float64, device="cpu")
        h = torch.cat([s.diff(), torch.tensor([self.last], dtype=torch.float64, device="cpu")])
        noise = (2 * self.norm * (1 - s) * h).sqrt()
        noise[-1] = 0
        return make_table(1000 * (1 - s), base=1 - self.norm * h, cur=-h * (1 + self.norm * s), noise=noise)


def check_shift(shift: float) -> None:
    """ValueError unless it is a number above 0."""
    if type(shift) not in (int, float) or not 0 < shift < math.inf:
        raise ValueError(f"shift must be a number above 0, got {shift!r}")
