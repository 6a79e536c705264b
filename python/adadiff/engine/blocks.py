"""One block over the rows that run, fused with the score of its layer; and what an evaluation returns."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from adadiff_kernels import Score, layer_norm, residual_uem, uem_score

from ..models.interface import Block, Conditioning, WholeBlock


@dataclass(frozen=True)
class Evaluation:
    eps: Tensor  # [B, C, H, W], the network's dtype
    exit_layer: Tensor  # i32 [B], blocks a lane ran, 1..L
    macs: int  # multiply-adds run, all lanes together
    macs_full: int  # the same lanes through the plain network
    moved: int  # rows moved to keep the running ones together
    scores: Tensor | None  # float32 [L, B], NaN where nobody was asked; None unless recorded
    rows: tuple[int, ...] = ()  # rows each block was run over, those included whose result is not used
    variance: Tensor | None = None  # [B, C, H, W], v of a learned range (solver_step); None where none was learned


def advance(
    block: Block | WholeBlock,
    rows: Tensor,
    skip: Tensor | None,
    cond: Conditioning,
    lanes: Tensor,
    score: Score | None,
    out: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One block: rows, skip, out [n, T, D]; lanes i32 [n]. Returns the block's output and u, float32 [n] or None.

    index: i32 [B], the row of each lane in skip, where that is as its block wrote it.
    """
    if isinstance(block, WholeBlock):
        y = block.whole(rows, cond, lanes)
        return (y if out is None else out.copy_(y)), None if score is None else uem_score(y, score, lanes)
    if skip is not None:
        rows = block.join(rows, skip) if index is None else block.join(rows, skip, lanes, index)
    *first, last = block.branches
    for branch in first:
        b = branch(layer_norm(rows, branch.norm(cond), lanes))
        rows, _, _ = residual_uem(rows, b, lanes=lanes, gate=branch.gate(cond), out=b)  # b is ours to overwrite
    b = last(layer_norm(rows, last.norm(cond), lanes))
    y, _, u = residual_uem(rows, b, lanes=lanes, gate=last.gate(cond), score=score, out=b if out is None else out)
    return y, u


def block_range(layer: int, nvtx: bool) -> AbstractContextManager:
    """A range named "block LAYER" for NVIDIA's profilers, where asked for."""
    return torch.cuda.nvtx.range(f"block {layer}") if nvtx else nullcontext()
