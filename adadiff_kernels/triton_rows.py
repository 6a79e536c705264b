"""Moves of rows on a GPU, bit for bit. References: compaction.py (exchanging pairs), join_skip.py (a long skip)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadiff_kernels.launch import need

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _swap_rows_kernel(
    rows_ptr,  # [rows, width] of integers
    pairs_ptr,  # i32 [k, 2]
    stride,
    width,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    pair = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(pairs_ptr + 2 * pair).to(tl.int64)
    second = tl.load(pairs_ptr + 2 * pair + 1).to(tl.int64)
    inside = at < width
    here = rows_ptr + first * stride + at
    there = rows_ptr + second * stride + at
    ours = tl.load(here, mask=inside)
    theirs = tl.load(there, mask=inside)
    tl.store(here, theirs, mask=inside)
    tl.store(there, ours, mask=inside)


@triton.jit
def _join_skip_kernel(
    x_ptr,  # [n, T, D] of integers
    skip_ptr,  # [rows, T, D]
    lanes_ptr,  # [n] or None
    index_ptr,  # [B], or [n] without lanes, or None
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
    if lanes_ptr is not None:
        source = tl.load(lanes_ptr + source)
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


def launch_swap_rows(pairs: Tensor, *rows: Tensor) -> None:
    """pairs: int32 [k, 2]; rows: [any, ...], each row contiguous, of 1, 2, 4 or 8 bytes an element.
    Pairs must be disjoint rows of theirs, as those of `ActiveSet.leave` are: on a GPU nobody looks."""
    need("pairs", pairs, ("k", 2), pairs, (torch.int32,))
    for position, tensor in enumerate(rows):
        if tensor.element_size() not in WORDS:
            raise ValueError(f"rows[{position}] must have elements of 1, 2, 4 or 8 bytes, got {tensor.dtype}")
    for tensor in rows:
        width = tensor[0].numel() if len(tensor) else 0
        if not width or not len(pairs):
            continue
        BLOCK = 4096 // tensor.element_size()  # two loads of 16 bytes a thread
        _swap_rows_kernel[(len(pairs) * triton.cdiv(width, BLOCK),)](
            *(tensor.view(WORDS[tensor.element_size()]), pairs, tensor.stride(0), width),
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


def launch_join_skip(x: Tensor, skip: Tensor, lanes: Tensor | None, index: Tensor | None) -> Tensor:
    """As `join_skip`. x, skip, lanes and index contiguous and on one device; rows are not checked against skip's."""
    n, T, D = x.shape
    need("x", x, (n, T, D), x, (x.dtype,))
    need("skip", skip, ("rows", T, D), x, (x.dtype,))
    need("lanes", lanes, (n,), x, (torch.int32, torch.int64))
    need("index", index, ("B" if lanes is not None else n,), x, (torch.int32, torch.int64))
    if x.element_size() not in WORDS:
        raise ValueError(f"x must have elements of 1, 2, 4 or 8 bytes, got {x.dtype}")
    out = x.new_empty(n, T, 2 * D)
    if out.numel() == 0:
        return out
    word = WORDS[x.element_size()]
    BLOCK_T = 16
    _join_skip_kernel[(n * triton.cdiv(T, BLOCK_T),)](
        *(x.view(word), skip.view(word), lanes, index, out.view(word), T),
        D=D,
        BLOCK_T=BLOCK_T,
        BLOCK_D=min(512 // x.element_size(), triton.next_power_of_2(D)),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
