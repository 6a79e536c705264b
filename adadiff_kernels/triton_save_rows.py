"""Rows of lanes that stop, kept on a GPU bit for bit. Formula, letters and reference: save_rows.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadiff_kernels.launch import need
from adadiff_kernels.triton_rows import WORDS


@triton.jit
def _save_rows_kernel(
    rows_ptr,  # [n, width] of integers
    saved_ptr,  # [B, width]
    lane_ptr,  # i32 [n]
    exit_layer_ptr,  # i32 [B]
    layer,
    stride_rows,
    stride_saved,
    width,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.load(lane_ptr + row).to(tl.int64)
    stopped = tl.load(exit_layer_ptr + lane)
    if (stopped == layer) | (stopped == -layer):
        at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(rows_ptr + row * stride_rows + at, mask=at < width)
        tl.store(saved_ptr + lane * stride_saved + at, values, mask=at < width)


def launch_save_rows(rows: Tensor, saved: Tensor, lane: Tensor, exit_layer: Tensor, layer: int) -> None:
    """As `save_rows`. Every row contiguous, of 1, 2, 4 or 8 bytes an element; all on one device. Lanes are not checked
    against B."""
    if rows.element_size() not in WORDS:
        raise ValueError(f"rows must have elements of 1, 2, 4 or 8 bytes, got {rows.dtype}")
    shape = tuple(rows.shape[1:])
    need("rows", rows, ("n", *shape), rows, (rows.dtype,), rows_apart=True)
    need("saved", saved, ("B", *shape), rows, (rows.dtype,), rows_apart=True)
    need("lane", lane, (len(rows),), rows, (torch.int32,))
    need("exit_layer", exit_layer, (len(saved),), rows, (torch.int32,))
    if not rows.numel():
        return
    width = rows[0].numel()
    BLOCK = 4096 // rows.element_size()  # two loads of 16 bytes a thread
    word = WORDS[rows.element_size()]
    _save_rows_kernel[(len(rows) * triton.cdiv(width, BLOCK),)](
        *(rows.view(word), saved.view(word), lane, exit_layer, layer, rows.stride(0), saved.stride(0), width),
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
