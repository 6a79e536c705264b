"""One block over the rows that run, fused with the score of its layer; and what an evaluation returns."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import FunctionType

import torch
from torch import Tensor

from adadiff_kernels import Score, layer_norm, residual_uem, uem_score

from ..models.interface import Block, Conditioning, WholeBlock


@dataclass(frozen=True)
class ForwardOutput:
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
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One block: rows, skip, out [n, T, D]; lanes i32 [n]. Returns the block's output and u, float32 [n] or None.

    index: i32 [B], the row of each lane in skip, where that is as its block wrote it. fused: each branch's bias and the
    norm after it belong to the pass that adds the branch, see `fuses`. Under autocast, products and branches are of its
    dtype, and the rows stay what they are.
    """
    if isinstance(block, WholeBlock):
        y = block.whole(rows, cond, lanes)
        return (y if out is None else out.copy_(y)), None if score is None else uem_score(y, score, lanes)
    if skip is not None:
        joined = block.join(rows, skip) if index is None else block.join(rows, skip, lanes, index)
        rows = joined.to(rows.dtype)
    branches = block.branches
    h = layer_norm(rows, branches[0].norm(cond), lanes)
    for branch, after in zip(branches, (*branches[1:], None), strict=True):
        b = branch(h, add_bias=False) if fused and branch.bias is not None else branch(h)
        target = _ours(b, rows) if after is not None or out is None else out
        given = {
            "row_to_lane": lanes,
            "gate": branch.gate(cond),
            "out": target,
            "score": score if after is None else None,
        }
        norm = None if after is None else after.norm(cond)
        if fused:
            rows, h, u = residual_uem(rows, b, bias=branch.bias, norm=norm, **given)
        else:
            rows, _, u = residual_uem(rows, b, **given)
            h = None if norm is None else layer_norm(rows, norm, lanes)
    return rows, u


def _ours(branch: Tensor, rows: Tensor) -> Tensor | None:
    """The branch, which nobody needs any more, for the sum to overwrite."""
    return branch if branch.dtype == rows.dtype else None


def compile_advance(**options: object) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`advance` through torch.compile(dynamic=True, **options), for any number of rows and blocks.

    Dynamo counts graphs by function, and after eight of them (torch._dynamo.config.recompile_limit) runs it eagerly. A
    network takes more: blocks with and without skip, with and without score, one row or several. So every kind of
    call has a function of its own.
    """
    number = itertools.count()

    @cache
    def own(*kind: object) -> Callable[..., tuple[Tensor, Tensor | None]]:
        code = advance.__code__.replace(co_name=f"advance_{next(number)}")
        function = FunctionType(code, advance.__globals__, advance.__name__, advance.__defaults__)
        return torch.compile(function, dynamic=True, **options)

    def call(
        block: Block | WholeBlock,
        rows: Tensor,
        skip: Tensor | None,
        cond: Conditioning,
        lanes: Tensor,
        score: Score | None,
        out: Tensor | None = None,
        index: Tensor | None = None,
        fused: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        there = tuple(None if value is None else len(value) == 1 for value in (rows, skip, out, index))
        one = score is not None and len(score.offset) == 1
        compiled = own(type(block), score is None, one, fused, *there)
        return compiled(block, rows, skip, cond, lanes, score, out, index, fused)

    return call


@cache
def compiled_advance() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`compile_advance`, one for all evaluations, so that nothing is compiled twice."""
    return compile_advance()


def block_range(layer: int, nvtx: bool) -> AbstractContextManager:
    """A range named "block LAYER" for NVIDIA's profilers, where asked for."""
    return torch.cuda.nvtx.range(f"block {layer}") if nvtx else nullcontext()
