"""A long skip joins the rows that still run, from wherever it lay when it was written.

    joined[r] = [x[r], skip[index[lanes[r]]]]   along the channels

x holds n running rows; skip stays as its block wrote it, whole. index is the row of each lane at that time
(`ActiveSet.snapshot`), composed here with the lane of each row now.
"""

import torch
from torch import Tensor


def join_skip_reference(x: Tensor, skip: Tensor, lanes: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    """`join_skip` in PyTorch."""
    rows = skip_rows(lanes, index)
    return torch.cat([x, skip[: x.shape[0]] if rows is None else skip.index_select(0, rows)], dim=-1)


def skip_rows(lanes: Tensor | None, index: Tensor | None) -> Tensor | None:
    """The row of skip for each row of x, or None for the first n in order."""
    return index if lanes is None else index.index_select(0, lanes)


def check_join(x: Tensor, skip: Tensor, lanes: Tensor | None, index: Tensor | None) -> None:
    """ValueError where shapes or dtypes do not fit."""
    n = x.shape[0] if x.dim() else 0
    if x.dim() != 3 or skip.dim() != 3 or skip.shape[1:] != x.shape[1:] or skip.dtype != x.dtype:
        raise ValueError(
            f"x and skip must be [n, T, D] and [rows, T, D] of one dtype, got {x.dtype} {list(x.shape)} and "
            f"{skip.dtype} {list(skip.shape)}"
        )
    if lanes is not None and index is None:
        raise ValueError("lanes need the index of each lane's row, as ActiveSet.snapshot gives it")
    for name, value, length in (("lanes", lanes, n), ("index", index, n if lanes is None else None)):
        if value is None:
            continue
        if value.dtype not in (torch.int32, torch.int64) or value.dim() != 1 or length not in (None, value.shape[0]):
            wanted = "[B]" if length is None else f"[{length}]"  # made earlier, it would fix n where this is compiled
            raise ValueError(f"{name} must be int32 or int64 {wanted}, got {value.dtype} {list(value.shape)}")
    if index is None and skip.shape[0] < n:
        raise ValueError(f"skip must have a row for each of {n} rows of x, got {skip.shape[0]}")
