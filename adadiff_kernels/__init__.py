"""Operators on the rows of a batch, for early exit at batch > 1; one folder per operator. They know nothing of
diffusion networks or policies."""

from adadiff_kernels.backends import OPERATORS, backends
from adadiff_kernels.compaction import ActiveSet, CountSnapshot, DeviceSet, exit_rows_reference, take_rows
from adadiff_kernels.join_skip import join_skip, join_skip_reference
from adadiff_kernels.philox import philox4x32, philox_normal
from adadiff_kernels.residual_uem import (
    Cached,
    LayerScores,
    Norm,
    Score,
    is_fused,
    layer_norm,
    no_autocast,
    residual_uem,
    residual_uem_reference,
    uem_score,
    uem_score_reference,
)
from adadiff_kernels.settle_rows import settle_rows, settle_rows_reference
from adadiff_kernels.solver_step import (
    COLUMNS,
    HISTORY,
    Guidance,
    Noise,
    SolverState,
    StepRows,
    guide,
    solver_step,
    solver_step_reference,
)
from adadiff_kernels.upload import captures, upload, upload_together

__all__ = [
    "COLUMNS",
    "HISTORY",
    "OPERATORS",
    "ActiveSet",
    "Cached",
    "CountSnapshot",
    "DeviceSet",
    "Guidance",
    "LayerScores",
    "Noise",
    "Norm",
    "Score",
    "SolverState",
    "StepRows",
    "backends",
    "captures",
    "exit_rows_reference",
    "guide",
    "is_fused",
    "join_skip",
    "join_skip_reference",
    "layer_norm",
    "no_autocast",
    "philox4x32",
    "philox_normal",
    "residual_uem",
    "residual_uem_reference",
    "settle_rows",
    "settle_rows_reference",
    "solver_step",
    "solver_step_reference",
    "take_rows",
    "uem_score",
    "uem_score_reference",
    "upload",
    "upload_together",
]
