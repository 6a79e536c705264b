"""The one loop of a forward pass: block, score, exit, next block."""

import torch
from torch import Tensor

from .decision import ExitDecision
from .lane_by_lane import LaneRunner
from .placement import DevicePlacement, HostPlacement
from .runner import BlockRunner
from .structure import Structure


class Layers:
    """All blocks of one network, for the lanes that a placement holds. scores: float32 [L, lanes], filled with the
    scores of those that run, or None."""

    def __init__(
        self,
        runner: BlockRunner | LaneRunner,
        placement: HostPlacement | DevicePlacement,
        structure: Structure,
        decision: ExitDecision,
        scores: Tensor | None,
    ) -> None:
        self.runner, self.placement, self.structure, self.decision = runner, placement, structure, decision
        self.scores = scores

    def run(self) -> tuple[int, ...]:
        """Returns the rows that each block ran over."""
        placement, exit_layers, num_layers = self.placement, self.decision.exit_layers, self.structure.num_layers
        rows = [0] * num_layers
        for layer in range(1, num_layers + 1):
            n = rows[layer - 1] = placement.bound
            if not n:
                break
            self.layer(layer)
            if layer in exit_layers:
                placement.advance(layer)
        return tuple(rows)

    def layer(self, layer: int) -> None:
        """All work of one layer."""
        self.exits(layer, *self.block(layer))

    def block(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Runs block `layer`, 1..L. Returns its output [n, T, D], and u, float32 [n], None unless it was scored."""
        block, placement = self.structure.blocks[layer - 1], self.placement
        hidden, skip = placement.take(block, layer)
        hidden, u = self.runner.block(block, layer, hidden, skip, placement, layer in self.decision.scored)
        if self.scores is not None and u is not None:
            placement.record(self.scores[layer - 1], u)
        return hidden, u

    def exits(self, layer: int, hidden: Tensor, u: Tensor | None) -> None:
        """Who exits after block `layer` does so, and what it wrote is handed on."""
        keeps = layer - 1 in self.structure.skips
        if layer in self.decision.exit_layers and self.runner.anybody:
            self.placement.exit(hidden, u, layer, keeps, self.runner.normed)
        self.placement.put(hidden, layer, keeps)


def no_scores(num_layers: int, lanes: int, device: torch.device) -> Tensor:
    """float32 [L, lanes] of NaN: nobody has been scored."""
    return torch.full((num_layers, lanes), torch.nan, dtype=torch.float32, device=device)
