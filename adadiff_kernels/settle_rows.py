"""What a leave does with rows in memory: those that leave are kept by lane, and kept ones take their places.

    for every move (row, lane, source) with row >= 0, in any order:
        saved[lane] <- rows[row]
        rows[row] <- rows[source]    where source >= 0

rows: [bound, ...], what the block wrote; saved: [B, ...] by lane, where no later block writes; moves: int32 [bound, 3],
as `DeviceSet.leave` made them: all rows and sources are different, and those that are not used come last. How many are,
only the device knows. Rows from the new count on hold what they held; nobody looks at them any more.
"""

import torch
from torch import Tensor


def settle_rows_reference(moves: Tensor, rows: Tensor, saved: Tensor) -> None:
    """`settle_rows` in PyTorch, on any device, without waiting for it: every row is read and written back."""
    n, (row, lane, source) = len(moves), moves.long().unbind(1)
    if not n:
        return
    origin = torch.arange(n + 1, device=rows.device)  # the last one is nobody's, here and below
    origin[row.where(source >= 0, n)] = source.where(source >= 0, n)
    leaving = torch.full((len(saved) + 1,), -1, device=rows.device)
    leaving[lane.where(row >= 0, len(saved))] = row
    leaving, one = leaving[:-1], [1] * (saved.dim() - 1)
    saved.copy_(torch.where((leaving >= 0).view(-1, *one), rows.index_select(0, leaving.clamp(min=0)), saved))
    rows[:n] = rows.index_select(0, origin[:n])


def check_settle(moves: Tensor, rows: Tensor, saved: Tensor) -> None:
    """ValueError where shapes or dtypes do not fit."""
    if rows.dim() < 2 or saved.shape[1:] != rows.shape[1:] or saved.dtype != rows.dtype:
        raise ValueError(
            f"rows and saved must be [n, ...] and [B, ...] of one dtype, got {rows.dtype} {list(rows.shape)} and "
            f"{saved.dtype} {list(saved.shape)}"
        )
    if moves.dtype != torch.int32 or moves.dim() != 2 or moves.shape[1] != 3 or moves.shape[0] > rows.shape[0]:
        raise ValueError(
            f"moves must be int32 [k, 3], of no more than {rows.shape[0]} rows, got {moves.dtype} {list(moves.shape)}"
        )
