"""Concatenates a long skip with the running rows: formula in reference.py, GPU kernel in kernel.py."""

from functools import wraps

from torch import Tensor

from adadiff_kernels import dispatch
from adadiff_kernels.dispatch import Backend, is_opaque, needs_grad
from adadiff_kernels.extension import traced
from adadiff_kernels.join_skip.reference import check_join, join_skip_reference
from adadiff_kernels.launch import on_device_of
from adadiff_kernels.library import register


def _run(
    x: Tensor,
    skip: Tensor,
    row_to_lane: Tensor | None = None,
    index: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Concatenates each row of x with its row of skip, along the channels: [n, T, 2 D].

    x: [n, T, D]; skip: [rows, T, D], of the same dtype. row_to_lane, index: int32 or int64. With row_to_lane [n], the
    row of lane b in skip is index[b], see `ActiveSet.snapshot`; without it, index [n] gives the row of skip for each
    row (`ActiveSet.locate`); with neither, row r of x takes row r of skip.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    check_join(x, skip, row_to_lane, index)
    if dispatch.choose(backend, x, core=False, needs_grad=needs_grad(x, skip)) == "triton":
        from adadiff_kernels.join_skip.kernel import launch_join_skip

        with on_device_of(x):
            return launch_join_skip(x, skip, row_to_lane, index)
    return join_skip_reference(x, skip, row_to_lane, index)


def _shape(*given: Tensor | None) -> Tensor:
    check_join(*given)
    return join_skip_reference(*given)


_OPERATOR = register(
    "join_skip(Tensor x, Tensor skip, Tensor? row_to_lane, Tensor? index, str? backend) -> Tensor",
    lambda *given: _run(*given[:-1], backend=given[-1]),
    lambda *given: _shape(*given[:-1]),
)


@wraps(_run)
def join_skip(
    x: Tensor,
    skip: Tensor,
    row_to_lane: Tensor | None = None,
    index: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    if traced(x) and is_opaque(backend, x):
        return _OPERATOR(x, skip, row_to_lane, index, backend)
    return _run(x, skip, row_to_lane, index, backend=backend)
