"""Runs blocks: plainly, fused with score and norm, or compiled."""

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import cast

import torch
from torch import Tensor, nn

from adadiff_kernels import LayerScores, Norm, Score, is_fused, layer_norm, residual_uem

from ..models.interface import Backbone, Block, Branch, Conditioning, FusableBlock
from ..uem import Exits
from .memory import Embedded
from .options import ExecutionOptions
from .placement import DevicePlacement, HostPlacement, Skip
from .structure import Structure

Rows = tuple[Tensor, Tensor | None]  # a block's output and u
FusedRows = tuple[Tensor, Tensor | None, Tensor | None]  # a block's output, its rows for the next block's norm, and u
Blocks = Callable[..., Tensor | FusedRows]


def plain_block(
    block: Block,
    hidden: Tensor,
    cond: Conditioning,
    skip: Tensor | None,
    index: Tensor | None,
    row_to_lane: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """hidden, out: [n, T, D]; skip and index: see `Block`; row_to_lane: int32 [n], None if row i holds lane i."""
    return block(hidden, cond, skip, index, row_to_lane, out)


def read_by(branch: Branch, hidden: Tensor, cond: Conditioning, row_to_lane: Tensor) -> Tensor:
    """[n, T, D]: the input of a branch, hidden [n, T, D] after the branch's norm."""
    norm = branch.norm(cond)
    return hidden if norm is None else layer_norm(hidden, norm, row_to_lane)


def fused_block(
    block: FusableBlock,
    hidden: Tensor,
    cond: Conditioning,
    skip: Skip | None,
    row_to_lane: Tensor,
    score: Score | None,
    normed: Tensor | None = None,
    after: Norm | None = None,
    out: Tensor | None = None,
    norm_out: Tensor | None = None,
) -> FusedRows:
    """Runs a block with one fused pass after each branch: bias, gate, sum, score, and the norm of the next branch.

    normed: hidden after the norm of the first branch, if the previous block wrote it. after: the first norm of the next
    block, computed by the last pass. out, norm_out: [n, T, D], receive the outputs of the last pass.
    """
    if skip is not None:
        hidden = block.join(hidden, *skip).to(hidden.dtype)
    branches, u = block.branches, None
    h = read_by(branches[0], hidden, cond, row_to_lane) if normed is None else normed
    for branch, following in zip(branches, (*branches[1:], None), strict=True):
        b = branch(hidden if h is None else h, cond, row_to_lane, branch.bias is None)
        last = following is None
        target = out if last else None
        if target is None and b.dtype == hidden.dtype:
            target = b  # the branch is not needed any more
        hidden, h, u = residual_uem(
            hidden,
            b,
            row_to_lane=row_to_lane,
            gate=branch.gate(cond),
            bias=branch.bias,
            score=score if last else None,
            norm=after if last else following.norm(cond),
            out=target,
            norm_out=norm_out if last else None,
        )
    return hidden, h, u


class BlockRunner:
    """Runs blocks for all running rows at once, on a CPU a group of lanes at a time.

    anybody: whether any row may exit after the last block; True if only the placement can tell. fuses: whether blocks
    that expose their branches run fused. normed: [n, T, D], the last block's output after the first norm of the next
    block; None if that block does not begin with a norm or the last block did not compute it.
    """

    normed: Tensor | None = None

    def __init__(
        self, backbone: Backbone, exits: Exits | None, execution: ExecutionOptions, structure: Structure, host: bool
    ):
        self._backbone, self._exits, self._nvtx = backbone, exits, execution.nvtx
        self._group_size = execution.group_size or (structure.group_size if host else None)
        self.fuses, self._on_device, self._structure = not host, not host, structure
        compiled = execution.runner == "compiled"
        self._plain = compiled_function(plain_block) if compiled else plain_block
        self._fused = compiled_function(fused_block) if compiled else fused_block
        self._scores: LayerScores | None = None
        self.anybody = True

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None, scored: bool, limits: Tensor | None) -> Tensor:
        """[B, T, D]: the input of the first block. scored: whether any layer will be scored; limits: float32 [L - 1, B]
        or None, the score below which a lane may exit."""
        return self.begin(self.embedded(x, t, context, scored), limits)

    def embedded(self, x: Tensor, t: Tensor, context: Tensor | None, scored: bool) -> Embedded:
        """The stem's output. scored: whether to compute the offsets of scores, if the network has exits."""
        hidden, cond = self._backbone.embed(x, t, context)
        offsets = self._exits.offsets(cond.time, t) if scored and self._exits is not None else None
        return Embedded(hidden, cond, offsets)

    def begin(self, embedded: Embedded, limits: Tensor | None) -> Tensor:
        """As `embed`, for a stem output computed before."""
        hidden, self._cond, offsets = embedded
        if offsets is not None:
            exits = self._exits
            self._scores = LayerScores(exits.weight, offsets, exits.num_prefix_tokens, limits)
        if self.fuses:
            self.fuses = is_fused(hidden, 1 if self._exits is None else self._exits.outputs)
        return hidden

    def first_read(self, hidden: Tensor) -> Tensor:
        """[B, T, D]: the input of the first block's first branch. hidden: [B, T, D], the block's input by lane."""
        lanes = torch.arange(len(hidden), dtype=torch.int32, device=hidden.device)
        return read_by(cast(FusableBlock, self._structure.blocks[0]).branches[0], hidden, self._cond, lanes)

    def norm_after(self, layer: int) -> Norm | None:
        """The first norm of the next block, to be computed by the last pass of block `layer`; None if the next block
        joins a long skip first, has no such norm, or does not expose its branches."""
        blocks = self._structure.blocks
        if layer == len(blocks) or blocks[layer].skip_from is not None or not hasattr(blocks[layer], "branches"):
            return None
        return cast(FusableBlock, blocks[layer]).branches[0].norm(self._cond)

    def writes_norm(self, layer: int) -> bool:
        """Whether block `layer` computes the first norm of the next block; layer 0: before the first block."""
        fused = self.fuses and layer > 0 and hasattr(self._structure.blocks[layer - 1], "branches")
        return fused and self.norm_after(layer) is not None

    def block(
        self,
        block: Block,
        layer: int,
        hidden: Tensor,
        skip: Skip | None,
        placement: HostPlacement | DevicePlacement,
        scored: bool,
    ) -> Rows:
        """Runs one block on hidden: [n, T, D]. Returns its output and u, float32 [n], None unless scored."""
        if self._nvtx:
            with torch.cuda.nvtx.range(f"block {layer}"):
                return self._block(block, layer, hidden, skip, placement, scored)
        return self._block(block, layer, hidden, skip, placement, scored)

    def _block(
        self,
        block: Block,
        layer: int,
        hidden: Tensor,
        skip: Skip | None,
        placement: HostPlacement | DevicePlacement,
        scored: bool,
    ) -> Rows:
        row_to_lane = placement.row_to_lane
        if self.fuses and hasattr(block, "branches"):
            score = self._scores.of(layer, placement.tickets) if scored else None
            after = self.norm_after(layer)
            out, norm_out = placement.outputs(layer)
            norm_out = None if after is None else norm_out
            normed = None if self.normed is None else self.normed[: hidden.shape[0]]
            given = (self._cond, skip, row_to_lane, score, normed, after, out, norm_out)
            hidden, self.normed, u = self._fused(block, hidden, *given)
            return hidden, u
        n, group, rows, index = hidden.shape[0], self._group_size, None, None
        if skip is not None:
            rows, index = skip.rows, skip.row_index
            if index is None and rows.shape[0] != n:
                rows = rows[:n]
        by_lane = None if placement.in_order else row_to_lane
        scores = self._scores if scored else None
        if group is not None and n > group:
            return self._in_groups(block, layer, hidden, rows, index, by_lane, row_to_lane, scores)
        out = None
        if self._on_device:
            self.normed, out = None, placement.outputs(layer)[0]
        y = self._plain(block, hidden, self._cond, rows, index, by_lane, out)
        if scores is None:
            self.anybody = True
            return y, None
        u = scores(y, layer, row_to_lane)
        self.anybody = scores.anybody
        return y, u

    def _in_groups(
        self,
        block: Block,
        layer: int,
        hidden: Tensor,
        skip: Tensor | None,
        index: Tensor | None,
        by_lane: Tensor | None,
        row_to_lane: Tensor,
        scores: LayerScores | None,
    ) -> Rows:
        out, u, self.anybody = torch.empty_like(hidden), [], scores is None
        for part in groups(hidden.shape[0], self._group_size):
            own_skip = skip if skip is None or index is not None else skip[part]
            own_index = None if index is None else index[part]
            lanes = row_to_lane[part]
            # row i of a slice is not lane i, so lanes are always passed
            y = self._plain(block, hidden[part], self._cond, own_skip, own_index, lanes, out[part])
            if scores is not None:
                u.append(scores(y, layer, lanes).clone())
                self.anybody |= scores.anybody
        return out, torch.cat(u) if u else None

    def head(self, head: nn.Module, patches: Tensor, lanes: Tensor) -> Tensor:
        """The head's output for patches: [n, N, D] of lanes: int32 [n]."""
        return head(patches, self._cond, lanes)

    def one_prediction(self, hidden: Tensor) -> Tensor:
        """[1, C or 2 C, H, W]: the output of the network's own head for hidden: [1, T, D]."""
        lane = torch.zeros(1, dtype=torch.int32, device=hidden.device)
        return self.head(self._backbone.head, hidden[:, self._backbone.num_prefix_tokens :], lane)

    def heads_by_lane(self, patches: Tensor, lanes: Tensor, exit_layer: Tensor) -> Tensor:
        """Each lane through the head of its exit layer, 1..L-1; see `Exits.heads_by_lane`."""
        return self._exits.heads_by_lane(patches, self._cond, lanes, exit_layer)


def groups(n: int, group: int) -> Iterator[slice]:
    """Slices of n rows in as few groups as possible, of nearly equal size: a small last group would run less
    efficiently."""
    parts = -(-n // group)
    bounds = [n * i // parts for i in range(parts + 1)]
    return (slice(a, b) for a, b in itertools.pairwise(bounds))


def compile_each_kind(function: Blocks, **options: object) -> Blocks:
    """`function` through torch.compile(dynamic=True, **options), for any number of rows and blocks.

    Dynamo limits the graphs of a function (torch._dynamo.config.recompile_limit, eight) and then runs it eagerly. A
    network needs more: blocks with and without skip, with and without score, one row or several. So every kind of call
    gets a copy of the function.
    """
    number = itertools.count()

    @cache
    def compiled(*kind: object) -> Blocks:
        code = function.__code__.replace(co_name=f"{function.__name__}_{next(number)}")
        renamed = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
        return torch.compile(renamed, dynamic=True, **options)

    def call(block: Block, *given: object) -> Tensor | FusedRows:
        return compiled(type(block), *map(_kind, given))(block, *given)

    return call


def _kind(value: object) -> object:
    """The property of an argument that needs a graph of its own."""
    if isinstance(value, Tensor):
        return value.shape[0] == 1
    if isinstance(value, Score):
        return value.offset.shape[0] == 1
    return None if value is None else type(value)


@cache
def compiled_function(function: Blocks) -> Blocks:
    """`compile_each_kind(function)`, shared by all forward passes, so that nothing is compiled twice."""
    return compile_each_kind(function)
