"""Branches of an earlier step in place of fresh ones, by an index per row, for the fused pass.

    b[r] = rows[source[r]]                where source[r] >= 0
    b[r] = branch[-1 - source[r]]         elsewhere
    rows[keep[r]] = b[r]                  where keep[r] >= 0

What is kept is the branch before its bias and gate, as it is stored, so that a row that reads it later gets what a
fresh branch of these values would give it. Products need run over the computing rows only, compactly: `branch` may
have fewer rows than x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cached:
    """rows: [E, T, D] in the dtype of the fresh branch. source: int32 [n], for each row the index of a cached row, or
    -1 - i for row i of the fresh branch. keep: int32 [n], where in `rows` a row's branch is stored, -1: nowhere; None:
    nothing is kept. Indices are not checked on a GPU. No row may be kept where another one reads or is kept, too."""

    rows: Tensor
    source: Tensor
    keep: Tensor | None = None

    def read(self, branch: Tensor) -> Tensor:
        """b: [n, T, D]. branch: fresh rows [m, T, D], m >= 0."""
        rows, source = self.rows, self.source
        if not len(branch):
            return rows.index_select(0, source)
        fresh = branch.index_select(0, (-1 - source).clamp(min=0))
        if not len(rows):
            return fresh
        return torch.where((source >= 0)[:, None, None], rows.index_select(0, source.clamp(min=0)), fresh)

    def write(self, b: Tensor) -> None:
        """Keeps what is to be kept of b: [n, T, D]."""
        if self.keep is not None:
            kept = (self.keep >= 0).nonzero().squeeze(1)
            self.rows.index_copy_(0, self.keep[kept].long(), b[kept])


def check_cached(x: Tensor, branch: Tensor, cached: Cached) -> None:
    """ValueError for shapes or dtypes that do not fit x [n, T, D] and branch [m, T, D]."""
    n, rows = len(x), cached.rows
    for name, value in (("branch", branch), ("cached.rows", rows)):
        if x.ndim != 3 or value.ndim != 3 or value.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"x and {name} must be [n, T, D] of one T and D, got {tuple(x.shape)} and {tuple(value.shape)}"
            )
    if rows.dtype != branch.dtype:
        raise ValueError(f"cached.rows must be {branch.dtype} as the branch, got {rows.dtype}")
    for name, index in (("source", cached.source), ("keep", cached.keep)):
        if index is not None and (index.dtype != torch.int32 or index.shape != (n,)):
            raise ValueError(f"cached.{name} must be int32 [{n}], got {index.dtype} {list(index.shape)}")


def check_apart(branch: Tensor, cached: Cached, **written: Tensor | None) -> None:
    """ValueError where a result would be written over rows that are read by an index."""
    for name, value in written.items():
        for other, read in (("branch", branch), ("cached.rows", cached.rows)):
            if value is not None and _overlap(value, read):
                raise ValueError(f"{name} must not be the memory of {other}, whose rows are read in another order")


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    (start, end), (other, last) = ((v.data_ptr(), v.data_ptr() + v.nbytes) for v in (a, b))
    return start < last and other < end
