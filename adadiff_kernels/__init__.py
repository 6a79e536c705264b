"""Row-wise kernels for early exit at batch > 1. Rows and integers; knows nothing of diffusion."""

from adadiff_kernels.compaction import ActiveSet, Swaps, leave_reference, swap_rows, take_rows
from adadiff_kernels.philox import philox4x32, philox_normal
from adadiff_kernels.residual_uem import Norm, Score, layer_norm, residual_uem, uem_score, uem_score_reference
from adadiff_kernels.solver_step import (
    COLUMNS,
    SolverState,
    StepRows,
    guide,
    solver_step,
    solver_step_reference,
)

__all__ = [
    "COLUMNS",
    "ActiveSet",
    "Norm",
    "Score",
    "SolverState",
    "StepRows",
    "Swaps",
    "guide",
    "layer_norm",
    "leave_reference",
    "philox4x32",
    "philox_normal",
    "residual_uem",
    "solver_step",
    "solver_step_reference",
    "swap_rows",
    "take_rows",
    "uem_score",
    "uem_score_reference",
]
