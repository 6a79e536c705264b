"""The operators. Each picks its implementation by the device of its tensors, or takes it by name. Public under the same
names as library.py has them, which tells compilers about them.

backend: "reference" is plain PyTorch on any device; "cpu" the compiled core; "triton" a fused kernel on a CUDA device,
or in Triton's interpreter. A choice that cannot be honoured raises RuntimeError and says what is missing. None takes
Triton on a CUDA device and the core on the CPU, each where it is there, and else PyTorch, which alone has gradients.
"""

from typing import Literal, get_args

from torch import Tensor

from adadiff_kernels import extension
from adadiff_kernels.compaction import Swaps, check_rows, core_swaps, swap_rows_core, swap_rows_reference
from adadiff_kernels.join_skip import check_join, join_skip_reference
from adadiff_kernels.launch import interpreted, on_device_of, triton_missing
from adadiff_kernels.residual_uem import (
    Norm,
    Score,
    check_score,
    check_sum,
    core_scores,
    learns,
    residual_uem_reference,
    score_rows,
    uem_score_core,
    uem_score_reference,
)
from adadiff_kernels.settle_rows import check_settle, settle_rows_reference
from adadiff_kernels.solver_step import Guidance, Noise, SolverState, StepRows, check_step, solver_step_pytorch

Backend = Literal["reference", "cpu", "triton"]


def residual_uem(
    x: Tensor,
    branch: Tensor,
    *,
    lanes: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    score: Score | None = None,
    norm: Norm | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass over the residual stream.

    x, branch: [n, T, D]; lanes: i32 [n], row -> lane; gate: [B, D] by lane; bias: [D]; out: [n, T, D], may be x or
    branch. x may be float32 beside a branch of two bytes.
    Returns y in x's dtype, the normalised rows in branch's dtype (None without `norm`) and u, float32 [n] (None
    without `score`). Raises ValueError where shapes or dtypes do not fit.
    """
    check_sum(x, branch, lanes, gate, bias, out)
    if score is not None:
        check_score(x, score, lanes)
    parts = (*(() if score is None else (score.weight, score.offset)), *(() if norm is None else norm.parameters))
    chosen = choose(backend, x, learns=learns(x, branch, gate, bias, *parts))
    given = {"lanes": lanes, "gate": gate, "bias": bias, "score": score, "norm": norm, "out": out}
    if chosen == "triton":
        from adadiff_kernels.triton_residual_uem import launch_residual_uem

        with on_device_of(x):
            return launch_residual_uem(x, branch, **given)
    if chosen == "cpu" and score is not None and not core_scores(x, score):
        raise RuntimeError(
            "backend='cpu' scores one output a token of contiguous float32 or bfloat16 rows, got "
            f"{len(score.weight)} of {x.dtype}; backend='reference' takes any"
        )
    scorer = {"reference": uem_score_reference, "cpu": uem_score_core, None: score_rows}[chosen]
    return residual_uem_reference(x, branch, **given, scorer=scorer)


def fuses(x: Tensor) -> bool:
    """Whether `residual_uem` is one kernel for tensors like x: [n, T, D] that need no gradients. Where it is not, its
    parts are no faster for being asked for together."""
    return choose(None, x, core=False) == "triton"


def swap_rows(swaps: Swaps, *rows: Tensor, backend: Backend | None = None) -> None:
    """Exchanges the rows of `swaps`, of `ActiveSet.leave`, in place along dim 0, in each tensor.

    rows: any dtype, [before or more, ...] on the device of the pairs; every row contiguous, rows any distance apart.
    Raises ValueError, with nothing moved, for other tensors or overlapping pairs (elsewhere than on the CPU pairs are
    taken as they are, so that nobody waits for them).
    """
    check_rows(swaps, *rows)
    chosen = choose(backend, swaps.pairs)
    if chosen == "triton":
        from adadiff_kernels.triton_rows import launch_swap_rows

        with on_device_of(swaps.pairs):
            launch_swap_rows(swaps.pairs, *rows)
        return
    if not len(swaps.pairs):
        return
    if chosen == "cpu" or (chosen is None and core_swaps(swaps)):
        swap_rows_core(swaps, *rows)
    else:
        swap_rows_reference(swaps, *rows)


def join_skip(
    x: Tensor,
    skip: Tensor,
    lanes: Tensor | None = None,
    index: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """[n, T, 2 D]: each row of x beside its row of skip, along the channels.

    x: [n, T, D]; skip: [rows, T, D]. lanes, index: int32 or int64. With lanes [n] the row of lane b is index[b], as
    `ActiveSet.snapshot` gave it; without, index [n] names the row itself (`ActiveSet.locate`); with neither, the first
    n rows in order. Raises ValueError where shapes or dtypes do not fit.
    """
    check_join(x, skip, lanes, index)
    if choose(backend, x, core=False, learns=learns(x, skip)) == "triton":
        from adadiff_kernels.triton_rows import launch_join_skip

        with on_device_of(x):
            return launch_join_skip(x, skip, lanes, index)
    return join_skip_reference(x, skip, lanes, index)


def settle_rows(moves: Tensor, rows: Tensor, saved: Tensor, *, backend: Backend | None = None) -> None:
    """Does what a leave asks for: saved[lane] = rows[row] of those that leave, then rows[row] = rows[source] of those
    that take their places.

    moves: int32 [k, 3] of `DeviceSet.leave`; rows: any dtype, [k or more, ...]; saved: [B, ...], by lane; every row
    contiguous. Raises ValueError where shapes or dtypes do not fit.
    """
    check_settle(moves, rows, saved)
    if choose(backend, rows, core=False) == "triton":
        from adadiff_kernels.triton_settle_rows import launch_settle_rows

        with on_device_of(rows):
            launch_settle_rows(moves, rows, saved)
    else:
        settle_rows_reference(moves, rows, saved)


def solver_step(
    state: SolverState,
    eps: Tensor,
    rows: StepRows,
    slots: Tensor | None = None,
    z: Tensor | None = None,
    variance: Tensor | None = None,
    *,
    guidance: Guidance | None = None,
    noise: Noise | None = None,
    backend: Backend | None = None,
) -> None:
    """Advance samples in place: all of the state, or those at slots: int64[n], all different.

    eps, z, variance: [n, ...] in the order of slots; eps and variance of any floating dtype, converted up.
    z: float32 noise, needed where rows.noise, unless `noise` says how to draw it; a sample whose noise coefficient is
    0 brings zeros. With `guidance` eps is combined first.
    ValueError for a state that is not float32, other shapes, missing noise, or a state without the base or
    history that the rows need.
    """
    given = (state, eps, rows, slots, z, variance, guidance, noise)
    check_step(*given)
    if choose(backend, state.x, core=False) == "triton":
        from adadiff_kernels.triton_solver_step import launch_solver_step

        with on_device_of(state.x):
            launch_solver_step(*given)
    else:
        solver_step_pytorch(*given)


def choose(backend: Backend | None, x: Tensor, core: bool = True, learns: bool = False) -> Backend | None:
    """What serves tensors on x's device; None: PyTorch, with the core where it can. core: it has this function.
    learns: gradients are to pass."""
    if backend is None:
        return "triton" if x.is_cuda and not learns and triton_missing() is None else None
    if backend in ("cpu", "triton") and learns:
        raise RuntimeError(f"backend={backend!r} has no gradients; take 'reference', or call it under torch.no_grad()")
    if backend == "triton":
        if (missing := triton_missing()) is not None:
            raise RuntimeError(f"backend='triton': {missing}")
        if not x.is_cuda and not (x.is_cpu and interpreted()):
            raise RuntimeError(f"backend='triton' needs tensors on a CUDA device, got {x.device}")
    elif backend == "cpu":
        if not core:
            raise RuntimeError("backend='cpu': the compiled core does not have this function; take 'reference'")
        if extension.core is None:
            raise RuntimeError("backend='cpu': the extension is not built; install a C++ compiler and install again")
        if not x.is_cpu:
            raise RuntimeError(f"backend='cpu' needs tensors on the CPU, got {x.device}")
    elif backend != "reference":
        raise ValueError(f"backend must be one of {get_args(Backend)} or None, got {backend!r}")
    return backend
