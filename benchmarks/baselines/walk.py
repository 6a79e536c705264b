"""One forward pass of a network, block by block, for baselines that change what a block does."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adadiff.forward.runner import read_by
from adadiff.models.interface import Backbone, Block, Branch, Conditioning

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x, t, context -> prediction


class Lanes(NamedTuple):
    """What a pass knows of its B lanes. index: int32 [B], row i holds lane i."""

    cond: Conditioning
    index: Tensor


Step = Callable[[int, Block, Tensor, Tensor | None, Lanes], Tensor]


def walk(backbone: Backbone, x: Tensor, t: Tensor, context: Tensor | None, step: Step) -> Tensor:
    """The prediction with the rows [B, T, D] after each block taken from step(number, block, rows, skip, lanes).

    number: of the block, from 0. skip: the rows of its long skip, None for a block without one.
    """
    rows, cond = backbone.embed(x, t, context)
    lanes = Lanes(cond, torch.arange(len(x), dtype=torch.int32))
    sources = {block.skip_from for block in backbone.blocks}
    skips: dict[int, Tensor] = {}
    for number, block in enumerate(backbone.blocks):
        rows = step(number, block, rows, None if block.skip_from is None else skips.pop(block.skip_from), lanes)
        if number in sources:
            skips[number] = rows
    return backbone.head(rows[:, backbone.num_prefix_tokens :], *lanes)


def computed(branch: Branch, rows: Tensor, lanes: Lanes) -> Tensor:
    """The branch's output for rows [B, T, D], before its gate."""
    return branch(read_by(branch, rows, *lanes), *lanes)
