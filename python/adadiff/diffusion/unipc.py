"""UniPC: a multistep predictor, and a corrector that needs no further network evaluation.

With m the predicted x0, a step from s to u predicts x_u and, once m_u is known, corrects it to c_u (Zhao et al. 2023,
arXiv 2302.04867, algorithms 5 to 8; diffusers, scheduling_unipc_multistep.py):

    x_u = sigma_u / sigma_s c_s - alpha_u (e^-h - 1) m_s - alpha_u B sum_k rho_k (m_k - m_s) / r_k
    c_u = the same with other rho, and m_u among the m_k

where h = lambda_u - lambda_s and r_k = (lambda_k - lambda_s) / h. Their difference c_u - x_u is a sum over m alone, so
c need not be stored: a row computes x_(i+1) = sigma_(i+1) / sigma_i (x_i + (c_i - x_i)) + ... from x_i and earlier m.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from adadiff_kernels import HISTORY

from .flow import check_shift
from .prediction import conversion
from .schedules import NoiseSchedule, levels
from .tables import SolverTable, make_table

VARIANTS = ("bh1", "bh2")  # B is -h, or e^-h - 1
LEAST_ALPHA = 1e-6  # flow begins at alpha = 0, where lambda is not finite; as in diffusers


@dataclass(frozen=True)
class UniPC:
    """UniPC. order: 1 to 3, of predictor and corrector, lower in the first and last steps; variant: "bh1" or "bh2". As
    diffusers' UniPCMultistepScheduler with its defaults: data prediction, a last step to sigma = 0, a correction at
    every evaluation but the first.

    Default spacing: "linspace", that scheduler's own, from the noisiest timestep; "uniform" for vp. shift: for schedule
    "flow", that scheduler's flow_shift. Raises ValueError for another order, variant or shift.
    """

    order: int = 2
    variant: str = "bh2"
    spacing: str | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        if type(self.order) is not int or not 1 <= self.order <= len(HISTORY):
            raise ValueError(f"the order of unipc must be 1, 2 or 3, got {self.order!r}")
        if self.variant not in VARIANTS:
            raise ValueError(f"the variant of unipc must be {' or '.join(VARIANTS)}, got {self.variant!r}")
        check_shift(self.shift)

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        return self.table_from(schedule, steps, 0)

    def table_from(self, schedule: NoiseSchedule, steps: int, first: int) -> SolverTable:
        """The table for samples that begin at row `first`, where the order is 1 again. Rows before it are not used."""
        at = levels(schedule, steps, self.spacing, "linspace", self.shift)
        t, alpha, sigma = at.t, at.alpha, at.sigma
        if not schedule.has_alpha_bar:
            alpha = alpha.clamp(min=LEAST_ALPHA)
            sigma, t = 1 - alpha, 1000 * (1 - alpha)
        half_log_snr = [*(alpha / sigma).log().tolist(), math.inf]
        run = _Run(half_log_snr, at.alpha_after.tolist(), self.variant == "bh2")
        rows = np.zeros((steps, 1 + len(HISTORY)))  # coefficients of m, h[0], h[1] and h[2]
        for i in range(first, steps):
            order = [min(self.order, steps - k, k - first + 1) for k in (i - 1, i)]
            rows[i, :-1] = run.sum(i, order[1], corrected=False)[1:]
            if i > first:
                change = run.sum(i - 1, order[0], corrected=True) - run.sum(i - 1, order[0], corrected=False)
                rows[i] += float(at.sigma_after[i] / sigma[i]) * change
        cur, *older = torch.from_numpy(rows).unbind(1)
        px, pe = conversion(schedule.tables_for, "sample", alpha, sigma)
        return make_table(
            t,
            px=px,
            pe=pe,
            base=at.sigma_after / sigma,
            cur=cur,
            push=torch.arange(steps, device="cpu") < steps - 2,  # the last step is of first order, to sigma = 0
            **dict(zip(HISTORY, older, strict=True)),
        )


@dataclass(frozen=True)
class _Run:
    """lam: lambda at the evaluations, then infinity; alpha: where each step lands; bh2: the variant."""

    lam: list[float]
    alpha: list[float]
    bh2: bool

    def sum(self, s: int, order: int, corrected: bool) -> np.ndarray:
        """Coefficients, float64 [4], of m at evaluations s + 1, s, s - 1 and s - 2 in the result of step s."""
        h = self.lam[s + 1] - self.lam[s]
        grown = math.expm1(-h)
        weights = np.array([0.0, -self.alpha[s] * grown, 0.0, 0.0])
        places = [1 + k for k in range(1, order)] + [0] * corrected
        r = np.array([(self.lam[s + 1 - place] - self.lam[s]) / h for place in places])
        if places:
            b = grown if self.bh2 else -h
            others = -self.alpha[s] * b * self._rho(r, h, b) / r
            weights[places] += others
            weights[1] -= others.sum()
        return weights

    def _rho(self, r: np.ndarray, h: float, b: float) -> np.ndarray:
        """Solves sum_j r_j^(k - 1) rho_j = k! phi_(k + 1)(-h) / B, k from 1 to len(r); one half if there is only one
        (a simplification of the paper and diffusers)."""
        if len(r) == 1:
            return np.array([0.5])
        phi, right = math.expm1(-h) / -h - 1, []
        for k in range(1, len(r) + 1):
            right.append(phi * math.factorial(k) / b)
            phi = phi / -h - 1 / math.factorial(k + 1)
        return np.linalg.solve(np.vander(r, increasing=True).T, np.array(right))
