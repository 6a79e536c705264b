"""The one loop of a forward pass: block, score, exit, next block."""

from typing import NamedTuple

from torch import Tensor

from ..models.interface import Backbone
from ..uem import Exits
from .decision import ExitDecision
from .lane_by_lane import LaneRunner
from .options import ExecutionOptions
from .placement import DevicePlacement, HostPlacement
from .runner import BlockRunner
from .structure import Structure


class Asked(NamedTuple):
    """One forward pass of B lanes, checked and decided about. x, t, partner, int32 [B] or None: on the network's
    device."""

    backbone: Backbone
    exits: Exits | None
    structure: Structure
    decision: ExitDecision
    execution: ExecutionOptions
    x: Tensor
    t: Tensor
    context: Tensor | None
    partner: Tensor | None
    record_scores: bool


class Done(NamedTuple):
    """What came of it. prediction: of all lanes; scores: float32 [L, B] or None; rows: that each block ran over."""

    prediction: Tensor
    placement: HostPlacement | DevicePlacement
    scores: Tensor | None
    rows: tuple[int, ...]


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
        self.scores, self._blocks = scores, structure.blocks

    def run(self) -> tuple[int, ...]:
        """Returns the rows that each block ran over."""
        placement, exit_layers, num_layers = self.placement, self.decision.exit_layers, self.structure.num_layers
        rows, learns = [0] * num_layers, placement.learns
        for layer in range(1, num_layers + 1):
            n = rows[layer - 1] = placement.bound
            if not n:
                break
            self.layer(layer)
            if learns and layer in exit_layers:
                placement.advance(layer)
        return tuple(rows)

    def layer(self, layer: int) -> None:
        """All work of one layer, 1..L: its block, and its exits."""
        block, placement, skip = self._blocks[layer - 1], self.placement, None
        hidden = placement.hidden
        if hidden.shape[0] != placement.bound:
            hidden = hidden[: placement.bound]
        if block.skip_from is not None:
            skip = placement.skip(placement.skips.pop(block.skip_from))
        hidden, u = self.runner.block(block, layer, hidden, skip, placement, layer in self.decision.scored)
        if self.scores is not None and u is not None:
            placement.record(self.scores[layer - 1], u)
        self.exits(layer, hidden, u)

    def exits(self, layer: int, hidden: Tensor, u: Tensor | None) -> None:
        """Who exits after block `layer` does so, and what it wrote, hidden [n, T, D], is handed on. u: float32 [n]."""
        placement, keeps = self.placement, layer - 1 in self.structure.skips
        if layer in self.decision.exit_layers and self.runner.anybody:
            placement.exit(hidden, u, layer, keeps, self.runner.normed)
        placement.hidden = hidden
        if keeps:
            placement.skips[layer - 1] = placement.keep(hidden)
