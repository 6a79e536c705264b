"""Concatenates a long skip with the running rows on a GPU, bit for bit. Formula and reference: reference.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadiff_kernels.launch import WORDS, cdiv, need, next_power_of_2


@triton.jit
def _join_skip_kernel(
    x_ptr,  # [n, T, D] of integers
    skip_ptr,  # [rows, T, D]
    row_to_lane_ptr,  # [n] or None
    index_ptr,  # [B], or [n] without row_to_lane, or None
    out_ptr,  # [n, T, 2 D]
    T,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_T)
    row = tl.program_id(0) // tiles
    token = (tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    source = row
    if row_to_lane_ptr is not None:
        source = tl.load(row_to_lane_ptr + source)
    if index_ptr is not None:
        source = tl.load(index_ptr + source)
    x_ptr += row.to(tl.int64) * T * D
    skip_ptr += source.to(tl.int64) * T * D
    out_ptr += row.to(tl.int64) * T * 2 * D
    for start in tl.static_range(0, D, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)[None, :]
        inside = (token < T) & (channel < D)
        x = tl.load(x_ptr + token * D + channel, mask=inside)
        skip = tl.load(skip_ptr + token * D + channel, mask=inside)
        tl.store(out_ptr + token * 2 * D + channel, x, mask=inside)
        tl.store(out_ptr + token * 2 * D + D + channel, skip, mask=inside)


def launch_join_skip(x: Tensor, skip: Tensor, row_to_lane: Tensor | None, index: Tensor | None) -> Tensor:
    """As `join_skip`. x, skip, row_to_lane and index must be contiguous and on one device; indices are not checked
    against the rows of skip."""
    n, T, D = x.shape
    need("x", x, (n, T, D), x, (x.dtype,))
    need("skip", skip, ("rows", T, D), x, (x.dtype,))
    need("row_to_lane", row_to_lane, (n,), x, (torch.int32, torch.int64))
    need("index", index, ("B" if row_to_lane is not None else n,), x, (torch.int32, torch.int64))
    if x.element_size() not in WORDS:
        raise ValueError(f"x must have elements of 1, 2, 4 or 8 bytes, got {x.dtype}")
    out = x.new_empty(n, T, 2 * D)
    if out.numel() == 0:
        return out
    word = WORDS[x.element_size()]
    BLOCK_T = 16
    _join_skip_kernel[(n * cdiv(T, BLOCK_T),)](
        *(x.view(word), skip.view(word), row_to_lane, index, out.view(word), T),
        D=D,
        BLOCK_T=BLOCK_T,
        BLOCK_D=min(512 // x.element_size(), next_power_of_2(D)),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
