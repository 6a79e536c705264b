"""Euler's method for flow matching: x' = x + (sigma' - sigma) v."""

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


def check_shift(shift: float) -> None:
    """ValueError unless it is a number above 0."""
    if type(shift) not in (int, float) or not 0 < shift < math.inf:
        raise ValueError(f"shift must be a number above 0, got {shift!r}")
