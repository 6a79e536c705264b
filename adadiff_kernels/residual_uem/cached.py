"""Cached branches for the fused pass: an index per row selects a branch of an earlier step or a fresh one.

    b[r] = rows[source[r]]                where source[r] >= 0
    b[r] = branch[-1 - source[r]]         elsewhere
    rows[keep[r]] = b[r]                  where keep[r] >= 0

Branches are cached before bias and gate, in the dtype in which they are stored, so that a cached branch gives the same
result as a fresh one of the same values. `branch` holds only the rows that compute and may have fewer rows than x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cached:
    """Which rows take a cached branch, and which branches are cached.

    rows: [E, T, D], the cache, in the dtype of the fresh branch. source: int32 [n], for each row an index into `rows`,
    or -1 - i for row i of the fresh branch. keep: int32 [n], the index in `rows` where a row's branch is stored (-1:
    not stored); None: no branch is stored. Indices are not checked on a GPU. An index in `keep` may neither occur twice
    nor be read by another row.
    """

    rows: Tensor
    source: Tensor
    keep: Tensor | None = None

    def read(self, branch: Tensor) -> Tensor:
        """Returns b: [n, T, D], the branch of each row. branch: fresh rows [m, T, D], m >= 0."""
        rows, source = self.rows, self.source
        if not len(branch):
            return rows.index_select(0, source)
        fresh = branch.index_select(0, (-1 - source).clamp(min=0))
        if not len(rows):
            return fresh
        return torch.where((source >= 0)[:, None, None], rows.index_select(0, source.clamp(min=0)), fresh)

    def write(self, b: Tensor) -> None:
        """Stores the rows of b: [n, T, D] that `keep` selects."""
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
    """ValueError where an output shares memory with rows that are read by index."""
    for name, value in written.items():
        for other, read in (("branch", branch), ("cached.rows", cached.rows)):
            if value is not None and _overlap(value, read):
                raise ValueError(f"{name} must not share memory with {other}, whose rows are read in another order")


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    (start, end), (other, last) = ((v.data_ptr(), v.data_ptr() + v.nbytes) for v in (a, b))
    return start < last and other < end
