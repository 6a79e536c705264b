"""Checks, before any work, for reuse policies that cannot work or work less well than expected."""

import math
from weakref import WeakKeyDictionary

from torch import Tensor

from adadiff_kernels import COLUMNS

from ..diffusion.solvers import solver_from
from ..diffusion.tables import Solver
from ..forward.narrow import network_of
from ..forward.rest_of_network import check_reuse
from ..model import Model
from ..policies.estimated import FIRST_REUSE, EstimatedReuse, norms_of, same_norms
from ..policies.exits import Full
from ..policies.parts import Parts
from ..policies.reuse import Reuse, ReusePolicy
from .warn_once import warn_once

STOCHASTIC = (
    "a %s policy with the solver %s, which adds noise at every step: reused features fit the next step less well"
)
OTHER_GUIDANCE = (
    "policy %s: its errors were estimated with guidance_scale=%g; with another one, the share of the work differs"
)
WITH_EXITS = (
    "policy %s: its errors were estimated for samples that run all blocks; one that exits early reuses nothing until "
    "it has run all blocks in two steps, so the share of the work differs"
)

_NORMS: WeakKeyDictionary[Model, tuple[object, tuple[float, ...]]] = WeakKeyDictionary()


def check_reuse_of(model: Model, policy: ReusePolicy, solver: Solver, steps: Tensor, first: Tensor) -> None:
    """Raises ValueError for a policy that this model cannot follow, and for a schedule by which no sample could ever
    reuse. Logs a warning for a stochastic solver. steps, first: int64 [n], as in `SampleBatch`."""
    check_reuse(policy, model.backbone)
    if not len(steps):
        return
    most = int((steps - first).max())
    if isinstance(policy, Reuse) and policy.dense_early + policy.dense_late >= most > 1:
        raise ValueError(
            f"policy '{policy}' lets no sample reuse in {most} steps: the first {policy.dense_early} and the last "
            f"{policy.dense_late} are full; take smaller dense_early and dense_late"
        )
    table = solver.table(model.schedule, int(steps.max()))
    if bool(table.coefficients[:, COLUMNS.index("noise")].any()):
        warn_once(STOCHASTIC, type(policy).__name__, type(solver).__name__)


def check_estimates(model: Model, parts: Parts, solver: Solver, steps: Tensor, first: Tensor, guidance: Tensor) -> None:
    """Raises ValueError for estimated errors of another network, solver or number of steps, and where no sample could
    reuse. Logs a warning for another guidance. steps, first: int64 [n], guidance: float32 [n], as in `SampleBatch`."""
    policy = parts.reuse
    assert isinstance(policy, EstimatedReuse)
    estimates = policy.estimates
    known = estimates.network == network_of(model.config) and len(estimates.weights[0]) == model.backbone.dim
    if not known or not same_norms(estimates.norms, _norms(model)):
        raise ValueError(f"policy '{policy}': its errors were estimated for another network")
    if parts.width is not None or parts.cascade is not None:
        raise ValueError(f"policy '{policy}': its errors were estimated for the whole network alone; leave others out")
    if solver != solver_from(estimates.solver, own=False):  # a file may not name classes
        raise ValueError(
            f"policy '{policy}': its errors were estimated with the solver {estimates.solver}; take that, or "
            "`adadiff calibrate-reuse` makes others"
        )
    if other := sorted(set(steps.tolist()) - {estimates.steps}):
        raise ValueError(
            f"policy '{policy}': its errors were estimated for {estimates.steps} steps, got {other[0]}; "
            "`adadiff calibrate-reuse` makes others"
        )
    times = solver.table(model.schedule, estimates.steps).t.tolist()
    if not all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in zip(estimates.t, times, strict=True)):
        raise ValueError(f"policy '{policy}': its errors were estimated at other times")
    if len(steps) and int((steps - first).max()) <= FIRST_REUSE:
        raise ValueError(f"policy '{policy}' lets no sample reuse in {FIRST_REUSE} steps or fewer")
    if bool(((guidance + 1 - estimates.guidance_scale).abs() > 1e-6).any()):
        warn_once(OTHER_GUIDANCE, str(policy), estimates.guidance_scale)
    if not isinstance(parts.exit, Full):
        warn_once(WITH_EXITS, str(parts))


def _norms(model: Model) -> tuple[float, ...]:
    """Computed anew for weights that were replaced or edited in place."""
    weights = [value for block in model.backbone.blocks for value in block.parameters()]
    state = tuple((value.data_ptr(), 0 if value.is_inference() else value._version) for value in weights)
    if model not in _NORMS or _NORMS[model][0] != state:
        _NORMS[model] = state, norms_of(model.backbone.blocks)
    return _NORMS[model][1]
