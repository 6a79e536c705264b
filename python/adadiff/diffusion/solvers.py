"""Solvers as tables of coefficients: row i goes from evaluation i of a run to evaluation i + 1 (see solver_step).

With a = alpha_bar at the evaluation and a' where its step lands: alpha = sqrt(a), sigma = sqrt(1 - a). All in
float64.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..spelling import Entry, Registry
from .flow import FlowEuler, FlowSDE, check_shift
from .heun import Heun
from .prediction import conversion
from .schedules import NoiseSchedule, evaluations, levels, vp_beta
from .schedules import T as TIMESTEPS
from .singlestep import DPMSolverFast, DPMSolverPPFast
from .tables import Solver, SolverTable, make_table
from .unipc import UniPC


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling (Ho et al. 2020, equation 7).

    Default spacing: "trailing", so that the first evaluation is at the noisiest timestep, where x_T is pure noise
    ("leading" would start up to 1000/steps below it); "uniform" for vp. DiT is published with "respaced".
    variance: "small" (of the posterior), "large" (beta), or None: the network's, between the two (a learned range;
    Nichol and Dhariwal 2021, equation 15), or "small" if it predicts none. Raises ValueError for others.
    """

    spacing: str | None = None
    variance: str | None = None

    def __post_init__(self) -> None:
        if self.variance not in (None, "small", "large"):
            raise ValueError(f"variance must be 'small', 'large' or None, got {self.variance!r}")

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        t, a, after = evaluations(schedule, steps, self.spacing, "trailing")
        beta = 1 - a / after
        posterior = beta * (1 - after) / (1 - a)
        spread = 0.5 * torch.log((1 - a) / (1 - after))  # ln of the ratio of standard deviations, beta over posterior
        noisy = after < 1
        return make_table(
            t,
            base=(after / a).sqrt(),
            cur=-beta * (after / a).sqrt() / (1 - a).sqrt(),
            noise=(beta.where(noisy, 0) if self.variance == "large" else posterior).sqrt(),
            spread=spread.where(noisy, 0) if self.variance is None else torch.zeros_like(t),
        )


TRAILING_OF_DIFFUSERS = "trailing-diffusers"


@dataclass(frozen=True)
class DDIM:
    """DDIM (Song et al. 2021, equations 12 and 16): eta = 0 is deterministic, eta = 1 has the variance of DDPM.

    Default spacing: "trailing", for the reason given at DDPM; "uniform" for vp. With it every step lands where the next
    one begins. DDIMScheduler of diffusers evaluates at the same timesteps, but lands 1000 // steps timesteps lower,
    which is where the next step begins only if `steps` divides 1000: for 16 of the 1000 step counts.
    "trailing-diffusers", which only this solver has, lands as diffusers does (with set_alpha_to_one, its default);
    ValueError for step counts where rounding in diffusers adds timestep -1.
    With schedule "flow" and eta = 0 it is the same as `FlowEuler` without a shift; ValueError for another eta.
    """

    eta: float = 0.0
    spacing: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        if not schedule.has_alpha_bar:
            if self.eta or self.spacing not in (None, "uniform"):
                raise ValueError("with schedule 'flow' ddim is Euler's method: no eta, and no spacing but 'uniform'")
            return FlowEuler().table(schedule, steps)
        if self.spacing == TRAILING_OF_DIFFUSERS:
            t, a, after = _trailing_of_diffusers(schedule, steps)
        else:
            t, a, after = evaluations(schedule, steps, self.spacing, "trailing")
        share = (1 - a / after) / (1 - a)  # the share of 1 - a' that eta = 1 replaces by fresh noise
        direction = ((1 - after) * (1 - self.eta**2 * share)).sqrt()
        return make_table(
            t,
            base=(after / a).sqrt(),
            cur=direction - (after * (1 - a) / a).sqrt(),
            noise=self.eta * ((1 - after) * share).sqrt(),
        )


@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2); the first and last row are first-order, as in
    diffusers' DPMSolverMultistepScheduler with a final sigma of zero.

    Default spacing: "linspace", that scheduler's own, also from the noisiest timestep; "uniform" for vp. shift: for
    schedule "flow", see `FlowEuler`; at alpha = 0, coefficients are limits.
    """

    spacing: str | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        at = levels(schedule, steps, self.spacing, "linspace", self.shift)
        alpha, sigma, alpha_after, sigma_after = at.alpha, at.sigma, at.alpha_after, at.sigma_after
        lam = torch.log(alpha / sigma)  # for flow it begins at -inf: the second step is first-order, too
        h = lam[1:] - lam[:-1]
        # -alpha' (exp(-h) - 1), which is 1 on the last row, where sigma' is 0 and h infinite
        first = alpha_after - alpha * sigma_after / sigma
        second = torch.zeros(steps, dtype=torch.float64, device="cpu")
        second[1:-1] = first[1:-1] * h[1:] / (2 * h[:-1])  # first / (2 r0)
        px, pe = conversion(schedule.tables_for, "sample", alpha, sigma)
        return make_table(
            at.t,
            px=px,
            pe=pe,
            base=sigma_after / sigma,
            cur=first + second,
            m0=-second,
            push=torch.arange(steps, device="cpu") < steps - 2,
        )


@dataclass(frozen=True)
class EulerMaruyama:
    """Euler-Maruyama for the reverse SDE of vp (Song et al. 2021; U-ViT, sde.py); the last step, to t = 0, adds no
    noise. The published U-ViTs on pixels use 1000 steps. `table` raises ValueError for other schedules, and for one
    step, which would go from t = 1 to 0 at once and give no image (U-ViT's code then begins at t = 1e-3, where there is
    almost no noise to remove).
    """

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        if schedule.name != "vp":
            raise ValueError(f"Euler-Maruyama integrates the SDE of schedule 'vp', got {schedule.name!r}")
        if steps == 1:
            raise ValueError("Euler-Maruyama gives no image in 1 step; use 2 or more, hundreds for good images")
        t, a, after = evaluations(schedule, steps, None, "uniform")
        change = vp_beta(t) * (torch.cat([t[1:], t.new_zeros(1)]) - t) / 999  # beta dt, below 0
        return make_table(
            t,
            base=1 - change / 2,
            cur=change / (1 - a).sqrt(),
            noise=(-change).sqrt().where(after < 1, 0),
        )


SOLVERS: Registry[Solver] = Registry(
    "solver",
    (
        Entry("ddpm", DDPM, words={"variance": "small|large"}),
        Entry("ddim", DDIM, "eta", bare=True, words={"eta": "ETA"}),
        Entry("dpm++2m", DPMSolverPP2M),
        Entry("dpm-fast", DPMSolverFast),
        Entry("dpm++fast", DPMSolverPPFast),
        Entry("euler-maruyama", EulerMaruyama),
        Entry("unipc", UniPC, words={"variant": "bh1|bh2"}),
        Entry("heun", Heun),
        Entry("flow-euler", FlowEuler),
        Entry("flow-sde", FlowSDE),
    ),
    Solver,
)


@lru_cache(maxsize=256)
def solver_from(text: str, *, own: bool = True) -> Solver:
    """The solver spelled as in SOLVERS: "ddim:0.5" (eta), "ddim:spacing=trailing", "unipc:order=3,variant=bh1". Raises
    ValueError for anything else. own=False: also for users' classes, see `Registry.read`."""
    return SOLVERS.read(text, own=own)


def _trailing_of_diffusers(schedule: NoiseSchedule, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `evaluations`, with steps that land as in diffusers' DDIMScheduler (scheduling_ddim.py, `step`)."""
    t, alpha_bar = schedule.grid(steps, "trailing")
    if math.ceil(TIMESTEPS / (TIMESTEPS / steps)) != steps:  # the length of numpy.arange(1000, 0, -1000 / steps)
        raise ValueError(
            f"diffusers' trailing timesteps end with -1 at {steps} steps; take another number, or 'trailing'"
        )
    low = t - TIMESTEPS // steps
    first = schedule.times[1]
    inside = low >= first
    after = schedule.log_alpha_bar(low.where(inside, first)).exp()
    return t, alpha_bar[:-1], after.where(inside, 1.0)
