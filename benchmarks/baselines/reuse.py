"""Layer-level reuse, a baseline: FORA (Selvaraju et al. 2024, arXiv 2407.01425), the inheritance of whole layers in
A-SDM (arXiv 2406.00210). Every K-th forward pass runs all blocks. In between, the outputs of each block's attention and
MLP branches at the last full pass are added again, with the gates of the current timestep. Long skips, stem and head
always run; norms only with their branches.
"""

import torch
from torch import Tensor

from adadiff.models.interface import Backbone, Block, Conditioning
from benchmarks.baselines.walk import Lanes, computed, walk


class Reusing:
    """Wraps a network; called with x, t, context, for one batch of samples in lockstep from their first step on. Passes
    0, `every`, 2 `every`, ... are full."""

    def __init__(self, backbone: Backbone, every: int):
        if type(every) is not int or every < 1:
            raise ValueError(f"a whole forward pass comes every 1, 2, ... steps, got {every!r}")
        self.backbone, self.every = backbone, every
        self._kept: list[list[Tensor]] = []  # by block: outputs of its branches, or their sum if they have no gates
        self._calls = 0

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        whole = self._calls % self.every == 0
        keeping = whole and self.every > 1
        self._calls += 1
        if keeping:
            self._kept = []

        def step(number: int, block: Block, rows: Tensor, skip: Tensor | None, lanes: Lanes) -> Tensor:
            fresh = skip is not None  # rows that may be overwritten
            if fresh:
                rows = block.join(rows, skip)
            if not whole:
                return _reused(rows, block, lanes.cond, self._kept[number], fresh)
            outputs = []
            for branch in block.branches:
                outputs.append(computed(branch, rows, lanes))
                rows = _added(rows, outputs[-1], branch.gate(lanes.cond), fresh=False)
            if keeping:
                self._kept.append(_kept(block, lanes.cond, outputs))
            return rows

        return walk(self.backbone, x, t, context, step)


def macs(backbone: Backbone, steps: int, every: int) -> int:
    """Multiply-adds of one lane in `steps` passes; like the network's, they count matrix products only."""
    blocks = [block.macs(backbone.tokens) for block in backbone.blocks]
    branches = min(blocks)  # of a block without a long skip
    joins = sum(cost - branches for cost in blocks)
    whole = -(-steps // every)
    return steps * (sum(backbone.stem_and_head_macs()) + joins) + whole * len(blocks) * branches


def _kept(block: Block, cond: Conditioning, outputs: list[Tensor]) -> list[Tensor]:
    if any(branch.gate(cond) is not None for branch in block.branches):
        return outputs
    first, *others = outputs
    for other in others:
        first.add_(other)
    return [first]


def _reused(rows: Tensor, block: Block, cond: Conditioning, kept: list[Tensor], fresh: bool) -> Tensor:
    if len(kept) == 1:
        return _added(rows, kept[0], None, fresh)
    for branch, output in zip(block.branches, kept, strict=True):
        rows, fresh = _added(rows, output, branch.gate(cond), fresh), True
    return rows


def _added(rows: Tensor, output: Tensor, gate: Tensor | None, fresh: bool) -> Tensor:
    if gate is None:
        return rows.add_(output) if fresh else rows + output
    return rows.addcmul_(gate[:, None], output) if fresh else torch.addcmul(rows, gate[:, None], output)
