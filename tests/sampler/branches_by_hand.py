"""Reuse of branches as one lane alone would do it: the rules in words, and the networks' own modules one after the
other, with a dictionary of what they said."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from adadiff.models.dit import DiT
from adadiff.models.interface import Backbone
from adadiff.policies.reuse import Reuse
from adadiff.uem import Exits

UNITS = ("attention", "mlp")
Branch = tuple[int, int]  # layer from 1, and 0 for attention, 1 for the MLP


@dataclass
class OneLane:
    """What a lane may take. kept: which step computed a branch."""

    policy: Reuse
    num_layers: int
    kept: dict[Branch, int] = field(default_factory=dict)
    full: int | None = None
    network: int | None = None

    def chosen(self) -> set[Branch]:
        first, last = self.policy.layers or (1, self.num_layers)
        return {(layer, j) for layer in range(first, last + 1) for j in (0, 1) if self.policy.unit in (None, UNITS[j])}

    def step(self, step: int, left: int, network: int = 0) -> tuple[set[Branch], set[Branch], bool]:
        """Branches that it takes, those to keep, and whether the step is full."""
        p = self.policy
        dense = step < p.dense_early or left < p.dense_late
        full = dense or self.full is None or self.network != network or step - self.full >= p.every
        young = {branch for branch, written in self.kept.items() if step - written < p.every}
        taken = set() if full else self.chosen() & young
        kept = self.chosen() - taken if left > 0 and p.every > 1 else set()
        return taken, kept, full

    def ends(self, step: int, kept: set[Branch], full: bool, exit_layer: int, network: int = 0) -> None:
        if self.network != network:
            self.kept.clear()
        self.kept |= {branch: step for branch in kept if branch[0] <= exit_layer}
        if full:
            self.full, self.network = step, network


def pass_by_hand(
    backbone: Backbone,
    exits: Exits | None,
    x: Tensor,
    t: Tensor,
    context: Tensor | None,
    taken: set[Branch],
    said: dict[Branch, Tensor],
    exit_layer: int,
) -> Tensor:
    """The prediction of one lane that exits after so many blocks. said: what branches said last, [1, T, D]; taken ones
    are read there, others written."""
    rows, cond = backbone.embed(x, t, context)
    outputs: list[Tensor] = []
    for layer, block in enumerate(backbone.blocks[:exit_layer], start=1):
        if block.skip_from is not None:
            rows = block.skip_linear(torch.cat([rows, outputs[block.skip_from]], -1))
        for j, body in enumerate((block.attn, block.mlp)):
            if isinstance(backbone, DiT):
                shift, scale, gate = (v[:, None] for v in cond.modulation[:, layer - 1, j].unbind(1))
                h = F.layer_norm(rows, rows.shape[-1:], eps=1e-6) * (1 + scale) + shift
            else:
                h, gate = (block.norm1, block.norm2)[j](rows), 1.0
            if (layer, j) not in taken:
                said[layer, j] = body(h)
            rows = rows + gate * said[layer, j]
        outputs.append(rows)
    own = exits is not None and exits.heads is not None and exit_layer < len(backbone.blocks)
    head = exits.heads[exit_layer - 1] if own else backbone.head
    prediction = head(rows[:, backbone.num_prefix_tokens :], cond, torch.zeros(1, dtype=torch.int32))
    return prediction.chunk(2, 1)[0] if backbone.learned_variance else prediction
