"""Row copies after an exit, on a GPU and bit for bit. Formula and reference: reference.py.

Only the device knows how many rows exit; most often it is none. So the grid is just large enough to keep a GPU busy:
its programs take blocks of the exiting rows in turn, until none is left.
"""

import triton
import triton.language as tl
from torch import Tensor

from adadiff_kernels.launch import WORDS, cdiv, need

PROGRAMS = 512


@triton.jit
def _settle_rows_kernel(
    moves_ptr,  # i32 [k, 3]
    rows_ptr,  # [n, width] of integers
    saved_ptr,  # [B, width]
    beside_ptr,  # [n, width] or None
    stride_rows,
    stride_saved,
    stride_beside,
    width,
    items,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    item = tl.program_id(0)
    row = tl.load(moves_ptr + 3 * (item // blocks), mask=item < items, other=-1)
    while row >= 0:
        move = moves_ptr + 3 * (item // blocks)
        lane = tl.load(move + 1).to(tl.int64)
        source = tl.load(move + 2)
        at = item % blocks * BLOCK + tl.arange(0, BLOCK)
        here = rows_ptr + row.to(tl.int64) * stride_rows + at
        exiting = tl.load(here, mask=at < width)
        moved = at < tl.where(source < 0, 0, width)
        staying = tl.load(rows_ptr + source.to(tl.int64) * stride_rows + at, mask=moved)
        tl.store(saved_ptr + lane * stride_saved + at, exiting, mask=at < width)
        tl.store(here, staying, mask=moved)
        if beside_ptr is not None:
            staying = tl.load(beside_ptr + source.to(tl.int64) * stride_beside + at, mask=moved)
            tl.store(beside_ptr + row.to(tl.int64) * stride_beside + at, staying, mask=moved)
        item += tl.num_programs(0)
        row = tl.load(moves_ptr + 3 * (item // blocks), mask=item < items, other=-1)


def launch_settle_rows(moves: Tensor, rows: Tensor, saved: Tensor, beside: Tensor | None = None) -> None:
    """As `settle_rows`. Each row must be contiguous, with elements of 1, 2, 4 or 8 bytes; all on one device. The ranges
    of rows and lanes are not checked."""
    for name, tensor in (("rows", rows), ("beside", beside)):
        if tensor is not None and tensor.element_size() not in WORDS:
            raise ValueError(f"{name} must have elements of 1, 2, 4 or 8 bytes, got {tensor.dtype}")
    shape = tuple(rows.shape[1:])
    need("rows", rows, ("n", *shape), rows, (rows.dtype,), rows_apart=True)
    need("saved", saved, ("B", *shape), rows, (rows.dtype,), rows_apart=True)
    if beside is not None:
        need("beside", beside, (len(rows), *shape), rows, (beside.dtype,), rows_apart=True)
        beside = beside.view(WORDS[beside.element_size()])
    need("moves", moves, ("k", 3), rows, (moves.dtype,))
    width = rows.numel() // len(rows) if len(moves) else 0
    if not width:
        return
    BLOCK = 8192 // rows.element_size()  # four loads of 16 bytes a thread
    word = WORDS[rows.element_size()]
    items = len(moves) * cdiv(width, BLOCK)
    _settle_rows_kernel[(min(items, PROGRAMS),)](
        *(moves, rows.view(word), saved.view(word), beside),
        *(rows.stride(0), saved.stride(0), 0 if beside is None else beside.stride(0), width, items),
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
