"""Whether a block may be run for some lanes alone: tried on a few of them before anything is left out.

Two things have to hold. Some lanes without the others come to what they come to beside them; other numbers of rows may
round otherwise, so this is up to rounding. And a lane comes to the same whoever is beside it; two calls of one shape
round alike, so this is exact in any dtype, which shows what rounding of 16 bits would hide in the first comparison.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .compaction import Rows
from .layout import Outputs

# By dtype, how far rows may be off: as a share of what the block adds, and of its output.
# Of rows alone and of the same rows beside others: a rounded product here and there.
ALONE = {
    torch.float64: (1e-6, 1e-12),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (1e-2, 2**-11),
    torch.bfloat16: (2e-2, 2**-8),
}
# Beside another neighbour, where the bits are not the same. No class that is tested needs it; it is for products of
# experts, whose number of rows is for the router to say.
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
    """ValueError unless lanes may be run without the others.

    run: the block's outputs for some lanes, of the inputs `kept` by argument; parts: its outputs for all B. dim: of
    the rows. The lanes are few: what a block makes of the whole batch then shows most.
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
            raise ValueError("its rows come out otherwise without their neighbours")
        for place, (lane, other) in enumerate(zip((first, second), others, strict=True)):
            came = kept[source].narrow(dim, lane * repeat, repeat)
            a, b = (values[p].narrow(dim, place * repeat, repeat) for values in (other, beside))
            if not same(a, b, came, BESIDE):
                raise ValueError("its rows come out otherwise beside other neighbours")


def _rows(lanes: Sequence[int], B: int) -> Rows:
    return Rows(torch.tensor(lanes, dtype=torch.int64, device="cpu"), B, views=False)


def same(a: Tensor, b: Tensor, came: Tensor, limits: Limits) -> bool:
    """Whether a equals b up to a share of what the block has added to `came`; NaN equals NaN."""
    limit, dtype = limits.get(came.dtype, limits[torch.bfloat16]), torch.promote_types(came.dtype, torch.float32)
    a, b, came = a.to(dtype), b.to(dtype), came.to(dtype)
    added = (b - came).abs()
    difference = (a - b).abs()
    broken = a.isnan() & b.isnan()
    difference, added = difference[~broken], added[~broken]
    if not difference.numel():
        return True
    return bool(difference.mean() <= limit[0] * added.mean() + limit[1] * b.abs()[~broken].mean())
