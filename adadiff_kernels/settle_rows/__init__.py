"""Row copies after an exit: formula in reference.py, GPU kernel in kernel.py."""

from functools import wraps

from torch import Tensor

from adadiff_kernels import dispatch, extension
from adadiff_kernels.dispatch import Backend, is_opaque
from adadiff_kernels.extension import traced
from adadiff_kernels.launch import on_device_of
from adadiff_kernels.library import register
from adadiff_kernels.settle_rows.reference import check_settle, settle_rows_core, settle_rows_reference


def _run(
    moves: Tensor, rows: Tensor, saved: Tensor, beside: Tensor | None = None, *, backend: Backend | None = None
) -> None:
    """Saves exiting rows by lane and moves remaining rows into their places, in place.

    moves: int32 [k, 3] from `ActiveSet.exit_rows` or `DeviceSet.exit_rows`; rows: any dtype, [k or more, ...]; saved:
    [B, ...] by lane, of the same dtype. beside: a second tensor by row, of the shape of rows and any dtype: its
    remaining rows move likewise, and none is saved. Each row must be contiguous; row strides are free.
    Raises ValueError, with nothing moved, for shapes or dtypes that do not fit; the C++ core raises it also for moves
    that name a row or lane twice. On a GPU moves are not checked, since that would wait for the device.
    """
    check_settle(moves, rows, saved, beside)
    chosen = dispatch.choose(backend, rows)
    if chosen == "triton":
        from adadiff_kernels.settle_rows.kernel import launch_settle_rows

        with on_device_of(rows):
            launch_settle_rows(moves, rows, saved, beside)
    elif chosen == "cpu" or (chosen is None and rows.is_cpu and extension.core is not None):
        settle_rows_core(moves, rows, saved, beside)
    else:
        settle_rows_reference(moves, rows, saved, beside)


_OPERATOR = register(
    "settle_rows(Tensor moves, Tensor(a!) rows, Tensor(b!) saved, Tensor(c!)? beside, str? backend) -> ()",
    lambda *given: _run(*given[:-1], backend=given[-1]),
    lambda *given: check_settle(*given[:-1]),
)


@wraps(_run)
def settle_rows(
    moves: Tensor, rows: Tensor, saved: Tensor, beside: Tensor | None = None, *, backend: Backend | None = None
) -> None:
    if traced(rows) and (is_opaque(backend, rows) or backend is None):
        return _OPERATOR(moves, rows, saved, beside, backend)
    return _run(moves, rows, saved, beside, backend=backend)
