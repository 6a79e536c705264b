"""Checks that a block can be run for a subset of lanes, on a few lanes before any block is skipped.

Two properties are tested. First, lanes without the others give the same results as beside them, up to rounding, since
other numbers of rows may round differently. Second, a lane's result does not depend on its neighbours: two calls of one
shape round alike, so this comparison is exact in any dtype and shows leaks that 16-bit rounding hides in the first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .compaction import Rows
from .layout import Outputs

# Tolerances by dtype: shares of what the block adds, and of its output.
# For rows alone versus beside others: a few products round differently.
ALONE = {
    torch.float64: (1e-6, 1e-12),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (1e-2, 2**-11),
    torch.bfloat16: (2e-2, 2**-8),
}
# For other neighbours, if the bits differ. No tested class needs it; it is for mixtures of experts, where the router
# decides the number of rows of a product.
BESIDE = {
    torch.float64: (1e-8, 1e-14),
    torch.float32: (1e-5, 1e-7),
    torch.float16: (1e-3, 2**-16),
    torch.bfloat16: (1e-3, 2**-13),
}
Limits = Mapping[torch.dtype, tuple[float, float]]


def check_lanes(
    run: Callable[[Rows], Sequence[Any]],
    outputs: Outputs,
    parts: Sequence[Any],
    kept: Mapping[str, Tensor],
    B: int,
    dim: int,
) -> None:
    """Raises ValueError unless lanes can be run without the others.

    run: returns the block's outputs for some lanes, from the inputs `kept` (by argument); parts: its outputs for all B
    lanes. dim: of the rows. Few lanes are tried, where an effect of the whole batch shows most.
    """
    if B < 2:
        return
    first, second = min(1, B - 1), B - 1
    lanes = sorted({first, second})
    rows = _rows(lanes, B)
    alone = run(rows)
    beside = alone if len(lanes) == 2 else run(_rows([first, second], B))
    others = run(_rows([first, 0], B)), run(_rows([0, second], B))
    for p, source in enumerate(outputs.sources):
        if source is None:
            continue
        repeat = parts[p].shape[dim] // B
        index = rows.index(repeat, False, parts[p].device)
        wanted, came = parts[p].index_select(dim, index), kept[source].index_select(dim, index)
        if alone[p].shape != wanted.shape or not same(alone[p], wanted, came, ALONE):
            raise ValueError("its rows give other results without their neighbours")
        for position, (lane, other) in enumerate(zip((first, second), others, strict=True)):
            came = kept[source].narrow(dim, lane * repeat, repeat)
            a, b = (values[p].narrow(dim, position * repeat, repeat) for values in (other, beside))
            if not same(a, b, came, BESIDE):
                raise ValueError("its rows give other results beside other neighbours")


def _rows(lanes: Sequence[int], B: int) -> Rows:
    return Rows(torch.tensor(lanes, dtype=torch.int64, device="cpu"), B, views=False)


def same(a: Tensor, b: Tensor, came: Tensor, limits: Limits) -> bool:
    """Whether a equals b within limits relative to what the block added to its input `came`, and to b; NaN equals
    NaN."""
    limit, dtype = limits.get(came.dtype, limits[torch.bfloat16]), torch.promote_types(came.dtype, torch.float32)
    a, b, came = a.to(dtype), b.to(dtype), came.to(dtype)
    added = (b - came).abs()
    difference = (a - b).abs()
    broken = a.isnan() & b.isnan()
    difference, added = difference[~broken], added[~broken]
    if not difference.numel():
        return True
    return bool(difference.mean() <= limit[0] * added.mean() + limit[1] * b.abs()[~broken].mean())
