"""Checks, before any work, for reuse policies that cannot work or work less well than expected."""

import logging
from functools import cache

from torch import Tensor

from adadiff_kernels import COLUMNS

from ..diffusion.tables import Solver
from ..forward.rest_of_network import check_reuse
from ..model import Model
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
