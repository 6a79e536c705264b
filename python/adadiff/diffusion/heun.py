"""Heun's method for the probability-flow ODE: two evaluations a step, each with its own table row and tick.

In y = x / alpha and s = sigma / alpha the ODE is dy / ds = eps (Karras et al. 2022, algorithm 1 without churn;
diffusers, scheduling_heun_discrete.py); for flow matching it is dx / dsigma = v. A step from s to u evaluates the slope
twice: at s, and where Euler's step lands.
"""

from dataclasses import dataclass

import torch

from .flow import check_shift
from .schedules import NoiseSchedule, levels
from .tables import SolverTable, make_table


@dataclass(frozen=True)
class Heun:
    """`steps` counts network evaluations, as for every solver: N steps of Heun's method are 2 N - 1 evaluations (N is
    num_inference_steps in diffusers), since the last step, to sigma = 0, is an Euler step. For even `steps` the step
    before it is an Euler step, too.

    Default spacing: "trailing", from the noisiest timestep; "uniform" for vp and flow. shift: for schedule "flow", see
    `FlowEuler`.
    """

    spacing: str | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def points(self, steps: int) -> int:
        """The number of grid points for `steps` evaluations."""
        return steps // 2 + 1

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        if type(steps) is not int or not 1 <= steps <= 1000:
            raise ValueError(f"steps must be an int from 1 to 1000, got {steps!r}")
        at = levels(schedule, self.points(steps), self.spacing, "trailing", self.shift)
        twice = torch.arange(len(at.t), device="cpu") < (steps - 1) // 2  # steps with a second evaluation
        of, second = _rows(twice)
        base, change = torch.ones_like(at.t), at.sigma_after - at.sigma
        if schedule.has_alpha_bar:
            base = at.alpha_after / at.alpha
            change = at.sigma_after - base * at.sigma
        base, change = base[of], change[of]
        return make_table(
            at.t[of + second.long()],
            base=base,
            cur=change.where(~second, change / 2),
            m0=(change / 2).where(second, 0),
            push=twice[of] & ~second,
            end=~twice[of] | second,
        )


def _rows(twice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row: its step, int64, and whether it is the step's second evaluation, bool."""
    of = torch.repeat_interleave(torch.arange(len(twice), device="cpu"), 1 + twice.long())
    second = torch.zeros_like(of, dtype=torch.bool)
    second[1:] = of[1:] == of[:-1]
    return of, second
