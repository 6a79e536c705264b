"""Checks, before any work, for reuse policies that cannot work or work less well than expected."""

import logging
from functools import cache

from torch import Tensor

from adadiff_kernels import COLUMNS

from ..diffusion.solvers import solver_from
from ..diffusion.tables import Solver
from ..forward.narrow import network_of
from ..forward.rest_of_network import check_reuse
from ..model import Model
from ..policies.estimated import EstimatedReuse
from ..policies.parts import Parts
from ..policies.reuse import Reuse, ReusePolicy


def check_reuse_of(model: Model, policy: ReusePolicy, solver: Solver, steps: Tensor) -> None:
    """Raises ValueError for a policy that this model cannot follow, and for a schedule by which no sample could ever
    reuse. Logs a warning for a stochastic solver. steps: int64 [n], the steps of each sample."""
    check_reuse(policy, model.backbone)
    if not len(steps):
        return
    most = int(steps.max())
    if isinstance(policy, Reuse) and policy.dense_early + policy.dense_late >= most > 1:
        raise ValueError(
            f"policy '{policy}' lets no sample reuse in {most} steps: the first {policy.dense_early} and the last "
            f"{policy.dense_late} are full; take smaller dense_early and dense_late"
        )
    table = solver.table(model.schedule, most)
    if bool(table.coefficients[:, COLUMNS.index("noise")].any()):
        _warn_stochastic(type(policy).__name__, type(solver).__name__)


def check_estimates(model: Model, parts: Parts, solver: Solver, steps: Tensor) -> None:
    """Raises ValueError for estimated errors of another network, solver or number of steps. steps: int64 [n]."""
    policy = parts.reuse
    assert isinstance(policy, EstimatedReuse)
    estimates = policy.estimates
    if estimates.network != network_of(model.config):
        raise ValueError(f"policy '{policy}': its errors were estimated for another network")
    if parts.width is not None or parts.cascade is not None:
        raise ValueError(f"policy '{policy}': its errors were estimated for the whole network alone; leave others out")
    if solver != solver_from(estimates.solver):
        raise ValueError(
            f"policy '{policy}': its errors were estimated with the solver {estimates.solver}; take that, or "
            "`adadiff calibrate-reuse` makes others"
        )
    if other := sorted(set(steps.tolist()) - {estimates.steps}):
        raise ValueError(
            f"policy '{policy}': its errors were estimated for {estimates.steps} steps, got {other[0]}; "
            "`adadiff calibrate-reuse` makes others"
        )


@cache
def _warn_stochastic(policy: str, solver: str) -> None:
    """Once per pair of classes."""
    logging.getLogger("adadiff").warning(
        "a %s policy with the solver %s, which adds noise at every step: reused features fit the next step less well",
        policy,
        solver,
    )


@cache
def warn_calibrated_whole(policy: str) -> None:
    """Once per policy."""
    logging.getLogger("adadiff").warning(
        "policy %s: its thresholds were calibrated on the whole network; narrow networks have other uncertainties, so "
        "the share of the work may differ; measure it with `adadiff evaluate`",
        policy,
    )
