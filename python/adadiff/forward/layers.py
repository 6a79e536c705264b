"""The loop of a forward pass: block, score, exit, next block."""

from typing import NamedTuple

from torch import Tensor

from ..models.interface import Backbone
from ..uem import Exits
from .branch_plan import BranchPlan
from .decision import ExitDecision
from .feature_store import StoreUpdate
from .lane_by_lane import LaneRunner
from .options import ExecutionOptions
from .placement import DevicePlacement, HostPlacement
from .rest_of_network import RestOfNetwork
from .reuse_lanes import ReuseLanes
from .runner import BlockRunner
from .structure import Structure


class Asked(NamedTuple):
    """The input of one forward pass of B lanes, checked, with its exit decision. x, t and partner (int32 [B] or None)
    are on the network's device."""

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
    reuse: ReuseLanes | None = None
    branches: BranchPlan | None = None


class Done(NamedTuple):
    """The result of one forward pass. prediction: [B, C or 2 C, H, W]; scores: float32 [L, B] or None; rows: the number
    of rows that each block ran over. head_layer, updates: see `ForwardOutput`."""

    prediction: Tensor
    placement: HostPlacement | DevicePlacement
    scores: Tensor | None
    rows: tuple[int, ...]
    head_layer: Tensor | None = None
    updates: tuple[StoreUpdate, ...] = ()


class Layers:
    """Runs all blocks of one network for the lanes of a placement. scores: float32 [L, lanes], receives the scores of
    running lanes, or None. rest: for lanes that may reuse the rest of the network, or None."""

    def __init__(
        self,
        runner: BlockRunner | LaneRunner,
        placement: HostPlacement | DevicePlacement,
        structure: Structure,
        decision: ExitDecision,
        scores: Tensor | None,
        rest: RestOfNetwork | None = None,
    ) -> None:
        self.runner, self.placement, self.structure, self.decision = runner, placement, structure, decision
        self.scores, self._blocks, self._rest = scores, structure.blocks, rest
        self._gates = frozenset[int]() if rest is None else rest.layers

    def run(self) -> tuple[int, ...]:
        """Returns the number of rows that each block ran over."""
        placement, exit_layers, num_layers = self.placement, self.decision.exit_layers, self.structure.num_layers
        rows, learns, exit_layers = [0] * num_layers, placement.learns, exit_layers | self._gates
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
        """Exits after block `layer`; its output, hidden [n, T, D], becomes the next block's input. u: float32 [n]."""
        placement, keeps = self.placement, layer - 1 in self.structure.skips
        exits = layer in self.decision.exit_layers and self.runner.anybody
        if layer in self._gates:
            mask = self._rest.leave(layer, hidden, placement.exit_mask(u, layer) if exits else None, placement)
            placement.exit_where(mask, hidden, layer, keeps, self.runner.normed)
        elif exits:
            placement.exit(hidden, u, layer, keeps, self.runner.normed)
        placement.hidden = hidden
        if keeps:
            placement.skips[layer - 1] = placement.keep(hidden)
