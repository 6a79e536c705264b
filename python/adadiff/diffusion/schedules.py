"""Noise schedules: x = alpha x0 + sigma eps, and the time input of the network. All but "flow" have an alpha_bar with
alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar).

name               alpha_bar                                                   t of the network
linear             1000 betas from 1e-4 to 0.02 (DDPM)                         0..999
cosine             1000 betas of cos^2, at most 0.999 (Nichol and Dhariwal)    0..999
stable_diffusion   1000 betas, linear in their root (U-ViT, discrete)          1..1000
vp                 exp(-0.1 t - 9.95 t^2), t in [0, 1] (U-ViT, sde.py)         999 t
flow               alpha = 1 - t, sigma = t in [0, 1] (flow matching; SD3)     1000 t
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

T = 1000
VP_END = 1e-3  # the last evaluation; the step from there lands at t = 0, as in U-ViT's Euler-Maruyama
BETA_0, BETA_1 = 0.1, 20.0  # for vp: beta(t) = BETA_0 + (BETA_1 - BETA_0) t
NAMES = ("linear", "cosine", "stable_diffusion", "vp", "flow")


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule by name, one of NAMES; all values are float64 on the CPU. Raises ValueError for other names."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"no noise schedule {self.name!r}; there are {', '.join(NAMES)}")

    @property
    def has_alpha_bar(self) -> bool:
        return self.name != "flow"

    @property
    def tables_for(self) -> str:
        """The prediction type that solver tables are written for, see prediction.py: one that determines x0 and eps at
        every time, the first included."""
        return "epsilon" if self.has_alpha_bar else "flow"

    @property
    def spacings(self) -> tuple[str, ...]:
        if not self.has_alpha_bar:
            return "uniform", "linspace"
        return ("uniform",) if self.name == "vp" else ("leading", "trailing", "linspace", "respaced")

    @property
    def times(self) -> tuple[float, float]:
        """The first (noisiest) and last timestep of U-ViT's DPM-Solvers, in the network's time."""
        if self.name == "vp":
            return 999.0, 999 * 1e-4
        if not self.has_alpha_bar:
            return 1000.0, 1.0
        return float(T - 1 + self._first), float(self._first)

    def training_times(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Training times (t_net, alpha_bar), float64, shaped as u. u: float64 in [0, 1), any shape, drawn uniformly.

        Discrete schedules use index floor(1000 u), vp uses t = u. Raises ValueError for another dtype or range, and for
        flow.
        """
        self._check_alpha_bar()
        if u.dtype != torch.float64 or not bool(((u >= 0) & (u < 1)).all()):
            raise ValueError(f"u must be float64 in [0, 1), as torch.rand gives it, got {u.dtype} {u}")
        if self.name == "vp":
            return 999 * u, _vp_log_alpha_bar(u).exp()
        return self._at((T * u).long())

    def training_levels(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training times and levels (t_net, alpha, sigma), float32, shaped as u. u: see `training_times`; flow uses
        t = u."""
        if self.has_alpha_bar:
            t, alpha_bar = (value.float() for value in self.training_times(u))
            return t, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        t, (alpha, sigma) = 1000 * u, self.alpha_sigma(1000 * u)
        return t.float(), alpha.float(), sigma.float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t: float64, any shape, the network's times. Raises ValueError for other times."""
        if self.has_alpha_bar:
            alpha_bar = self.log_alpha_bar(t).exp()
            return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if not bool(((t >= 0) & (t <= 1000)).all()):
            raise ValueError(f"times of schedule {self.name!r} are 0..1000, got {t}")
        return 1 - t / 1000, t / 1000

    def grid(self, steps: int, spacing: str) -> tuple[Tensor, Tensor]:
        """The evaluations of a run, noisiest first: (t_net float64[steps], alpha_bar float64[steps + 1]).

        alpha_bar[i] belongs to evaluation i; alpha_bar[steps] = 1 is where the last step lands (no noise).
        With N steps, the discrete spacings are those of diffusers' set_timesteps:
            leading   k * (1000 // N), k = N-1..0                     (DDPMScheduler, DDIMScheduler)
            trailing  round(1000 - k * 1000 / N) - 1, k = 0..N-1      (the same; where DDIMScheduler lands: see DDIM)
            linspace  round(linspace(0, 999, N + 1)) without its 0    (DPMSolverMultistepScheduler); N <= 999
        and that of improved diffusion, which DiT samples with:
            respaced  round(k * 999 / (N - 1)), k = N-1..0            (space_timesteps); N >= 2
        vp has only "uniform": t = linspace(1, 1e-3, N), then 0.
        Raises ValueError for steps outside 1..1000, for a spacing that the schedule does not have, and for flow (see
        `flow_grid`).
        """
        self._check_alpha_bar()
        self._check(steps, spacing)
        k = torch.arange(steps, dtype=torch.float64, device="cpu")
        if spacing == "uniform":
            t = torch.linspace(1, VP_END, steps, dtype=torch.float64, device="cpu")
            t_net, alpha_bar = 999 * t, _vp_log_alpha_bar(t).exp()
        elif spacing == "leading":
            t_net, alpha_bar = self._at((k * (T // steps)).long().flip(0))
        elif spacing == "trailing":
            # as numpy.arange computes its stride, start - (start - step): ties of round() depend on the rounding
            stride = T - (T - T / steps)
            t_net, alpha_bar = self._at((T - k * stride).round().long() - 1)
        elif spacing == "respaced":
            if steps == 1:
                raise ValueError("spacing 'respaced' begins at timestep 0 with 1 step; take 2 or more")
            # accumulated as in the authors' code: ties of round() depend on the rounding
            index = list(itertools.accumulate(itertools.repeat((T - 1) / (steps - 1), steps - 1), initial=0.0))
            t_net, alpha_bar = self._at(torch.tensor([round(i) for i in index[::-1]], dtype=torch.int64, device="cpu"))
        else:
            if steps == T:
                raise ValueError(f"spacing 'linspace' repeats a timestep at {T} steps; take {T - 1} or fewer")
            t_net, alpha_bar = self._at(((k + 1) * ((T - 1) / steps)).round().long().flip(0))
        return t_net, torch.cat([alpha_bar, torch.ones(1, dtype=torch.float64, device="cpu")])

    def flow_grid(self, steps: int, spacing: str, shift: float = 1.0) -> Tensor:
        """For flow: sigma at the evaluations of a run, noisiest first, then the final 0, float64 [steps + 1].

        With N steps and s(t) = shift t / (1 + (shift - 1) t), as diffusers:
            uniform   s(linspace(1, s(1e-3), N))             (FlowMatchEulerDiscreteScheduler, ...Heun...)
            linspace  s(linspace(1, 1e-3, N + 1)[:-1])       (UniPCMultistepScheduler with use_flow_sigmas)
        Raises ValueError as `grid` does, and for a schedule with alpha_bar.
        """
        if self.has_alpha_bar:
            raise ValueError(f"schedule {self.name!r} is not flow matching; its times have no shift")
        self._check(steps, spacing)

        def shifted(t: Tensor) -> Tensor:
            return shift * t / (1 + (shift - 1) * t)

        last = torch.tensor(1e-3, dtype=torch.float64, device="cpu")
        if spacing == "uniform":
            t = torch.linspace(1, float(shifted(last)), steps, dtype=torch.float64, device="cpu")
        else:
            t = torch.linspace(1, float(last), steps + 1, dtype=torch.float64, device="cpu")[:-1]
        return torch.cat([shifted(t), torch.zeros(1, dtype=torch.float64, device="cpu")])

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """ln(alpha_bar) at t: float64, any shape, the network's times: 0..999, or 1..1000 with stable_diffusion.

        Linear in t between the timesteps of a discrete schedule (DPM-Solver). Raises ValueError for other times, and
        for flow.
        """
        self._check_alpha_bar()
        index = t - self._first
        if not bool(((index >= 0) & (index <= 999)).all()):
            raise ValueError(f"times of schedule {self.name!r} are {self._first}..{self._first + 999}, got {t}")
        if self.name == "vp":
            return _vp_log_alpha_bar(t / 999)
        logs, low = _alpha_bar(self.name).log(), index.floor().long()
        return torch.lerp(logs[low], logs[(low + 1).clamp(max=T - 1)], index - low)

    def time(self, log_alpha_bar: Tensor) -> Tensor:
        """The inverse of `log_alpha_bar`: the network's time, float64, shaped as its argument. Raises ValueError
        outside the schedule."""
        self._check_alpha_bar()
        if self.name == "vp":  # the positive root of (BETA_1 - BETA_0) t^2 / 2 + BETA_0 t + log_alpha_bar = 0
            rate = 2 * (BETA_1 - BETA_0) * -log_alpha_bar
            t = rate / ((BETA_0**2 + rate).sqrt() + BETA_0) / (BETA_1 - BETA_0)
            low, high = 0.0, 1 + 1e-9
        else:
            logs = -_alpha_bar(self.name).log()  # ascending
            above = torch.searchsorted(logs, -log_alpha_bar.contiguous()).clamp(1, T - 1)
            t = above - 1 + (-log_alpha_bar - logs[above - 1]) / (logs[above] - logs[above - 1])
            low, high = -1e-9, T - 1 + 1e-9
        if not bool(((t >= low) & (t <= high)).all()):
            raise ValueError(f"schedule {self.name!r} has no such log alpha_bar: {log_alpha_bar}")
        return 999 * t.clamp(max=1) if self.name == "vp" else t.clamp(0, T - 1) + self._first

    def _check_alpha_bar(self) -> None:
        if not self.has_alpha_bar:
            raise ValueError(
                f"schedule {self.name!r} has no alpha_bar, and this needs one; its solvers are ddim, flow-euler, heun, "
                "unipc and dpm++2m"
            )

    def _check(self, steps: int, spacing: str) -> None:
        if type(steps) is not int or not 1 <= steps <= T:
            raise ValueError(f"steps must be an int from 1 to {T}, got {steps!r}")
        if spacing not in self.spacings:
            raise ValueError(f"schedule {self.name!r} has spacings {self.spacings}, got {spacing!r}")

    @property
    def _first(self) -> int:
        """The network's time at index 0."""
        return 1 if self.name == "stable_diffusion" else 0

    def _at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return (index + self._first).double(), _alpha_bar(self.name)[index]


def evaluations(
    schedule: NoiseSchedule, steps: int, spacing: str | None, default: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The grid of a solver by steps: the network's time, alpha_bar, and alpha_bar where the step lands, float64 [steps]
    each. spacing: None: `default`, or "uniform" if the schedule does not have that."""
    if spacing is None:
        spacing = default if default in schedule.spacings else "uniform"
    t, alpha_bar = schedule.grid(steps, spacing)
    return t, alpha_bar[:-1], alpha_bar[1:]


@dataclass(frozen=True)
class Levels:
    """The network's time, alpha and sigma at the evaluations of a run, and alpha and sigma where each step lands; each
    float64 [steps]."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_after: Tensor
    sigma_after: Tensor


def levels(schedule: NoiseSchedule, steps: int, spacing: str | None, default: str, shift: float = 1.0) -> Levels:
    """As `evaluations`, for any schedule. shift: for flow; raises ValueError for a shift with another schedule."""
    if not schedule.has_alpha_bar:
        spacing = spacing or (default if default in schedule.spacings else "uniform")
        sigma = schedule.flow_grid(steps, spacing, shift)
        return Levels(1000 * sigma[:-1], 1 - sigma[:-1], sigma[:-1], 1 - sigma[1:], sigma[1:])
    if shift != 1:
        raise ValueError(f"shift is for schedule 'flow', got {schedule.name!r}; leave it out")
    t, a, after = evaluations(schedule, steps, spacing, default)
    return Levels(t, a.sqrt(), (1 - a).sqrt(), after.sqrt(), (1 - after).sqrt())


def vp_beta(t: Tensor) -> Tensor:
    """beta in the SDE of vp, dx = -beta x / 2 dt + sqrt(beta) dw. t: float64, any shape, the network's time."""
    return BETA_0 + (BETA_1 - BETA_0) * t / 999


def _vp_log_alpha_bar(t: Tensor) -> Tensor:
    return -BETA_0 * t - (BETA_1 - BETA_0) / 2 * t * t


@lru_cache
def _alpha_bar(name: str) -> Tensor:
    if name == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64, device="cpu")
    elif name == "stable_diffusion":
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64, device="cpu") ** 2
    else:
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64, device="cpu") / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, 0)
