"""Row copies after an exit: exiting rows are saved by lane, and remaining rows take their places.

    for every move (row, lane, source) with row >= 0, in any order:
        saved[lane] <- rows[row]
        rows[row] <- rows[source]      where source >= 0
        beside[row] <- beside[source]  likewise, where there is such a tensor

rows: [bound or more, ...], a block's output; saved: [B, ...] by lane, which no later block writes; moves: int32
[bound, 3] from `ActiveSet.exit_rows` or `DeviceSet.exit_rows`. No row occurs twice among rows and sources; unused moves
come last. Rows at or above the new count keep stale values, which are not read again.
"""

import math

import torch
from torch import Tensor

from adadiff_kernels import extension
from adadiff_kernels.launch import rows_are_contiguous


def settle_rows_reference(moves: Tensor, rows: Tensor, saved: Tensor, beside: Tensor | None = None) -> None:
    """`settle_rows` in PyTorch, on any device, without host synchronisation: every row is read and written back."""
    n, (row, lane, source) = len(rows), moves.long().unbind(1)
    if not len(moves):
        return
    origin = torch.arange(n + 1, device=rows.device)  # one spare element, here and below, for unused moves
    origin[row.where(source >= 0, n)] = source.where(source >= 0, n)
    exiting = torch.full((len(saved) + 1,), -1, dtype=torch.int64, device=rows.device)
    exiting[lane.where(row >= 0, len(saved))] = row
    exiting, one = exiting[:-1], [1] * (saved.dim() - 1)
    saved.copy_(torch.where((exiting >= 0).view(-1, *one), rows.index_select(0, exiting.clamp(min=0)), saved))
    for moved in (rows,) if beside is None else (rows, beside):
        moved.copy_(moved.index_select(0, origin[:n]))


def check_settle(moves: Tensor, rows: Tensor, saved: Tensor, beside: Tensor | None = None) -> None:
    """ValueError for shapes, dtypes or memory that do not fit."""
    if rows.dim() < 1 or saved.shape[1:] != rows.shape[1:] or saved.dtype != rows.dtype:
        raise ValueError(
            f"rows and saved must be [n, ...] and [B, ...] of one dtype, got {rows.dtype} {list(rows.shape)} and "
            f"{saved.dtype} {list(saved.shape)}"
        )
    if moves.dtype != torch.int32 or moves.dim() != 2 or moves.shape[1] != 3 or moves.shape[0] > rows.shape[0]:
        raise ValueError(
            f"moves must be int32 [k, 3], of no more than {rows.shape[0]} rows, got {moves.dtype} {list(moves.shape)}"
        )
    if beside is not None and beside.shape != rows.shape:
        raise ValueError(f"beside must be of the shape of rows, {list(rows.shape)}, got {list(beside.shape)}")
    for name, tensor in (("rows", rows), ("saved", saved), ("beside", beside)):
        if tensor is None:
            continue
        if tensor.device != moves.device:
            raise ValueError(f"{name} must be on {moves.device} like the moves, got {tensor.device}")
        if tensor.requires_grad:
            raise ValueError(f"{name} must not require grad: rows move in place, and autograd does not see it")
        count = tensor.shape[0]
        if count > 1 and not (rows_are_contiguous(tensor) and tensor.stride(0) >= tensor.numel() // count):
            raise ValueError(f"{name} must have contiguous rows that do not overlap, got strides {tensor.stride()}")


def settle_rows_core(moves: Tensor, rows: Tensor, saved: Tensor, beside: Tensor | None = None) -> None:
    """`settle_rows` in C++, for tensors on the CPU. Raises ValueError for moves that name a row or lane twice or out of
    range."""
    size = rows.element_size()
    moves = moves.contiguous()
    extension.core.settle_rows(
        *(moves.data_ptr(), len(moves)),
        *(rows.data_ptr(), len(rows), rows.stride(0) * size),
        *(saved.data_ptr(), len(saved), saved.stride(0) * size),
        math.prod(rows.shape[1:]) * size,
    )
    if beside is not None:
        _, _, source = moves.long().unbind(1)
        filled = moves.long()[source >= 0]
        beside[filled[:, 0]] = beside[filled[:, 2]]
