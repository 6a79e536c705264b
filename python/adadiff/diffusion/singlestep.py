"""U-ViT's DPM-Solver-fast and DPM-Solver++ fast: third-order singlestep solvers, uniform in log-SNR or in time.

A step from s to u evaluates the network at s and at up to two points in between. Each evaluation is a row; with
m = eps and A = alpha, C = sigma, z = lambda - lambda_s (DPM-Solver; Lu et al. 2022a), or with m = x0 and A = sigma,
C = alpha, z = lambda_s - lambda (DPM-Solver++; Lu et al. 2022b), the row that evaluates m_j and lands at point v is

    x_v = A_v / A_s x_s - C_v (e^z_v - 1) m_s - c (m_j - m_s)

    c = C_v z_v / z_j ((e^z_v - 1) / z_v - 1)   third order
    c = C_v z_v / z_j (e^z_v - 1) / 2           second order

with c = 0 where j = s. (baofff/U-ViT, dpm_solver_pytorch.py and dpm_solver_pp.py.)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .prediction import conversion
from .schedules import NoiseSchedule
from .tables import SolverTable, make_table


@dataclass(frozen=True)
class DPMSolverFast:
    """DPM-Solver-fast: noise prediction, uniform in log-SNR; the solver of U-ViT's models with the vp schedule.

    As in the authors' code, it stops at t = 1e-4 (vp) or the last timestep, so a little noise remains. `steps` counts
    evaluations; there are about a third as many solver steps.
    """

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        begin, end = schedule.times
        orders = _orders(schedule, steps)
        t = torch.tensor([begin, end], dtype=torch.float64, device="cpu")
        first, last = _half_log_snr(schedule, t).tolist()
        width = (last - first) / len(orders)
        lam = [first + width * (k + j / order) for k, order in enumerate(orders) for j in range(order)]
        inner = schedule.time(F.logsigmoid(2 * torch.tensor(lam[1:], dtype=torch.float64, device="cpu")))
        return _table(schedule, torch.cat([t[:1], inner, t[1:]]), orders, data=False)


@dataclass(frozen=True)
class DPMSolverPPFast:
    """DPM-Solver++ fast: data prediction, uniform in time; the solver of U-ViT's stable_diffusion models.

    The last time and the meaning of `steps` are as for `DPMSolverFast`.
    """

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        begin, end = schedule.times
        orders = _orders(schedule, steps)
        t = torch.linspace(begin, end, steps + 1, dtype=torch.float64, device="cpu")
        return _table(schedule, t, orders, data=True)


def _orders(schedule: NoiseSchedule, steps: int) -> list[int]:
    """The order of each step, which is its number of evaluations: 3, with one or two lower orders at the end."""
    if type(steps) is not int or not 1 <= steps <= 1000:
        raise ValueError(f"steps must be an int from 1 to 1000, got {steps!r}")
    threes = steps // 3
    return [3] * (threes - 1) + [2, 1] if steps % 3 == 0 else [3] * threes + [steps % 3]


def _half_log_snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    log_a = schedule.log_alpha_bar(t)
    return (log_a - (-log_a.expm1()).log()) / 2


def _table(schedule: NoiseSchedule, t: Tensor, orders: list[int], data: bool) -> SolverTable:
    """The table for t: float64[steps + 1], the times of all evaluations and the final time."""
    log_a, lam = schedule.log_alpha_bar(t), _half_log_snr(schedule, t).tolist()
    alpha, sigma = (log_a / 2).exp(), (-log_a.expm1()).sqrt()
    carried, other = (sigma.tolist(), alpha.tolist()) if data else (alpha.tolist(), sigma.tolist())
    rows, s = [], 0
    for order in orders:
        z = [(lam[s] - v if data else v - lam[s]) for v in lam[s : s + order + 1]]
        for j in range(order):
            v = j + 1
            whole, c = other[s + v] * math.expm1(z[v]), 0.0
            if j:
                curve = math.expm1(z[v]) / z[v] - 1 if order == 3 else math.expm1(z[v]) / 2
                c = other[s + v] * z[v] / z[j] * curve
            last = v == order
            rows.append((carried[s + v] / carried[s], c - whole if j else 0.0, -c if j else -whole, not j, last))
        s += order
    base, m0, cur, begins, ends = zip(*rows, strict=True)
    end = torch.tensor(ends, dtype=torch.bool, device="cpu")
    stored = torch.tensor(begins, dtype=torch.bool, device="cpu") & ~end
    columns = {}
    if data:
        columns = dict(zip(("px", "pe"), conversion("epsilon", "sample", alpha[:-1], sigma[:-1]), strict=True))
    return make_table(
        t[:-1],
        push=stored,
        end=end,
        base=torch.tensor(base, dtype=torch.float64, device="cpu"),
        m0=torch.tensor(m0, dtype=torch.float64, device="cpu"),
        cur=torch.tensor(cur, dtype=torch.float64, device="cpu"),
        **columns,
    )
