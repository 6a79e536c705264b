"""Row-wise kernels for early exit at batch > 1. Rows and integers; knows nothing of diffusion."""

from adadiff_kernels.compaction import ActiveSet, Swaps, leave_reference, take_rows
from adadiff_kernels.device_set import CountSnapshot, DeviceSet
from adadiff_kernels.join_skip import join_skip_reference
from adadiff_kernels.library import join_skip, residual_uem, settle_rows, solver_step, swap_rows
from adadiff_kernels.ops import fuses
from adadiff_kernels.philox import philox4x32, philox_normal
from adadiff_kernels.residual_uem import (
    Norm,
    Score,
    layer_norm,
    no_autocast,
    residual_uem_reference,
    uem_score,
    uem_score_reference,
)
from adadiff_kernels.settle_rows import settle_rows_reference
from adadiff_kernels.solver_step import (
    COLUMNS,
    Guidance,
    Noise,
    SolverState,
    StepRows,
    guide,
    solver_step_reference,
)
from adadiff_kernels.upload import captures, upload

__all__ = [
    "COLUMNS",
    "ActiveSet",
    "CountSnapshot",
    "DeviceSet",
    "Guidance",
    "Noise",
    "Norm",
    "Score",
    "SolverState",
    "StepRows",
    "Swaps",
    "captures",
    "fuses",
    "guide",
    "join_skip",
    "join_skip_reference",
    "layer_norm",
    "leave_reference",
    "no_autocast",
    "philox4x32",
    "philox_normal",
    "residual_uem",
    "residual_uem_reference",
    "settle_rows",
    "settle_rows_reference",
    "solver_step",
    "solver_step_reference",
    "swap_rows",
    "take_rows",
    "uem_score",
    "uem_score_reference",
    "upload",
]
