"""Concatenates a long skip with the running rows, which may have moved since it was written. Formula and reference.

    joined[r] = [x[r], skip[index[row_to_lane[r]]]]   along the channels

x holds the n running rows; skip lies as its block wrote it. index is `lane_to_row` at that time, see
`ActiveSet.snapshot`; row_to_lane is the present lane of each row.
"""

import torch
from torch import Tensor


def join_skip_reference(
    x: Tensor, skip: Tensor, row_to_lane: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """`join_skip` in PyTorch."""
    rows = skip_rows(row_to_lane, index)
    return torch.cat([x, skip[: x.shape[0]] if rows is None else skip.index_select(0, rows)], dim=-1)


def skip_rows(row_to_lane: Tensor | None, index: Tensor | None) -> Tensor | None:
    """The row of skip for each row of x, or None if these are the first n in order."""
    return index if row_to_lane is None else index.index_select(0, row_to_lane)


def check_join(x: Tensor, skip: Tensor, row_to_lane: Tensor | None, index: Tensor | None) -> None:
    """ValueError for shapes or dtypes that do not fit."""
    n = x.shape[0] if x.dim() else 0
    if x.dim() != 3 or skip.dim() != 3 or skip.shape[1:] != x.shape[1:] or skip.dtype != x.dtype:
        raise ValueError(
            f"x and skip must be [n, T, D] and [rows, T, D] of one dtype, got {x.dtype} {list(x.shape)} and "
            f"{skip.dtype} {list(skip.shape)}"
        )
    if row_to_lane is not None and index is None:
        raise ValueError("row_to_lane needs the index of each lane's row, as ActiveSet.snapshot gives it")
    for name, value, length in (("row_to_lane", row_to_lane, n), ("index", index, n if row_to_lane is None else None)):
        if value is None:
            continue
        if value.dtype not in (torch.int32, torch.int64) or value.dim() != 1 or length not in (None, value.shape[0]):
            wanted = "[B]" if length is None else f"[{length}]"  # not earlier: it would fix n in a compiled graph
            raise ValueError(f"{name} must be int32 or int64 {wanted}, got {value.dtype} {list(value.shape)}")
    if index is None and skip.shape[0] < n:
        raise ValueError(f"skip must have a row for each of {n} rows of x, got {skip.shape[0]}")
