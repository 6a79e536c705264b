"""A forward pass from captured CUDA graphs: the work of an eager pass on a device, over memory at fixed addresses."""

import torch
from torch import Tensor

from adadiff_kernels import upload

from ..models.layers import check_labels
from .count_sync import CountSync, Sync, bucket
from .decision import ExitDecision
from .layers import Asked, Done, Layers
from .memory import Embedded, Memory
from .placement import DevicePlacement, Skip
from .predictions import predictions, without_the_host
from .runner import BlockRunner
from .spaces import Space, space_of
from .structure import Structure


class CapturedPlacement(DevicePlacement):
    """A `DevicePlacement` whose rows lie in the memory of a `Space`. Passes of any number of lanes up to the space's
    share the same graphs: every block, the first one included, is launched over a rounded number of rows."""

    def __init__(
        self,
        space: Space,
        memory: Memory,
        lanes: int,
        decision: ExitDecision,
        tied: bool,
        count_sync: CountSync,
    ) -> None:
        self._memory = memory
        by_limits = decision.limits is not None
        partner = memory.partner if tied or by_limits else None
        super().__init__(space.active, memory.rows(0)[:lanes], decision, partner, count_sync, rounds=True)
        self._limits = memory.limits if by_limits else None
        # policies called in Python hold data of this pass's lanes only
        self._most = space.lanes if by_limits or not decision.exit_layers else lanes
        self._launch_over(self._rounded(lanes))

    def _empty(self, hidden: Tensor) -> Tensor:
        return self._memory.saved

    def _rounded(self, count: int) -> int:
        return min(bucket(count, self._active.num_lanes), self._most) if self._rounds else count

    def begin_layer(self, layer: int, skip_from: int | None) -> None:
        """Points at the input of block `layer` and the long skip it joins, where earlier pieces have written them."""
        memory, self._layer, self._snapshot = self._memory, layer, None
        self.hidden = memory.rows(layer - 1)[: self.bound]
        if skip_from is not None:
            snapshot = None if self.saved is None else memory.snapshots[skip_from]
            self.skips[skip_from] = memory.rows(skip_from + 1), snapshot

    def keep(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.saved is not None and self._snapshot is None:  # no lane could exit after this layer
            self._memory.snapshots[self._layer - 1].copy_(self._active.lane_to_row)
        return hidden, None

    def skip(self, kept: tuple[Tensor, Tensor | None]) -> Skip:
        rows, snapshot = kept
        return super().skip((rows[: self.bound] if snapshot is None else rows, snapshot))

    def outputs(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        return self._memory.rows(layer)[: self.bound], self._memory.normed[: self.bound]

    def _new_snapshot(self, layer: int) -> Tensor:
        return self._memory.snapshots[layer - 1]


class CapturedLayers(Layers):
    """Each layer is one piece, including its exits if a kernel decides them; policies that decide in Python are called
    between two pieces."""

    runner: BlockRunner
    placement: CapturedPlacement

    def __init__(
        self,
        space: Space,
        memory: Memory,
        embedded: Embedded,
        runner: BlockRunner,
        placement: CapturedPlacement,
        structure: Structure,
        decision: ExitDecision,
        record_scores: bool,
    ) -> None:
        super().__init__(runner, placement, structure, decision, memory.scores if record_scores else None)
        self._space, self._memory, self._records = space, memory, record_scores
        self._embedded, self._begun = embedded, False
        self._asks = bool(decision.exit_layers) and decision.limits is None

    def layer(self, layer: int) -> None:
        decision, n = self.decision, self.placement.bound
        exits, scored = layer in decision.exit_layers and not self._asks, layer in decision.scored

        def work() -> None:
            self._stand_at(layer, n, self.structure.blocks[layer - 1].skip_from, wrote=layer - 1)
            super(CapturedLayers, self).layer(layer)

        moves = self.placement.saved is not None
        self._space.pieces.run(("layer", layer, n, scored, exits, self._records, moves, self._asks), work)
        if self._asks:
            self._stand_at(layer, n, None, wrote=layer)
            super().exits(layer, self._memory.rows(layer)[:n], self._memory.u[:n] if scored else None)

    def exits(self, layer: int, hidden: Tensor, u: Tensor | None) -> None:
        if not self._asks:
            super().exits(layer, hidden, u)
        elif u is not None:  # for the policies called after this piece
            self._memory.u[: hidden.shape[0]].copy_(u)

    def _stand_at(self, layer: int, n: int, skip_from: int | None, wrote: int) -> None:
        """Sets the Python state that the work of a layer reads, from what earlier pieces left in memory; a replay needs
        none of it. wrote: the block that ran last."""
        runner = self.runner
        if not self._begun:
            runner.begin(self._embedded, None)
            self._begun = True
        self.placement.begin_layer(layer, skip_from)
        runner.normed = self._memory.normed[:n] if runner.writes_norm(wrote) else None


def in_pieces(asked: Asked) -> Done:
    """Runs stem, layers and head, each as a captured piece."""
    backbone, exits, structure, decision, execution, x, t, context, partner, record_scores, *_ = asked
    B, scored = x.shape[0], bool(decision.scored)
    classes = getattr(getattr(backbone, "config", None), "num_classes", None)
    if context is not None and classes:
        check_labels(context, B, classes)  # before the upload: labels on the device are not checked
    context = None if context is None else upload(context, x.device)
    with space_of(backbone, exits, max(B, execution.max_lanes or 1), x, context) as space:
        run, n = space.pieces.run, bucket(B, space.lanes)
        runner = BlockRunner(backbone, exits, execution, structure, host=False)
        memory = space.begin(runner, structure, x, t, context)

        def stem() -> None:
            memory.store(runner.embedded(*space.inputs(n), scored))

        run(("stem", n, scored), stem)
        space.load_decision(decision, partner)
        hidden, cond, offsets = memory.embedded
        embedded = Embedded(hidden, cond, offsets if scored else None)
        count_sync = execution.count_sync or (Sync() if decision.whole_batch else space.count_sync)
        placement = CapturedPlacement(space, memory, B, decision, partner is not None, count_sync)
        if record_scores:
            memory.scores.fill_(torch.nan)
        rows = CapturedLayers(space, memory, embedded, runner, placement, structure, decision, record_scores).run()
        hidden, exits = memory.rows(structure.num_layers), exits if decision.exit_layers else None
        if bound := placement.bound:
            moves = placement.saved is not None
            run(("finish", bound, moves), lambda: placement.settle_last(hidden, structure.num_layers))
        placement.end(hidden, structure.num_layers)
        if exits is not None and exits.heads is not None and exits.config.head != "linear":
            runner.begin(embedded, None)
            placement.saved = placement.saved[:B]  # large heads: one call for all lanes of an exit layer
            prediction = predictions(runner, placement, backbone, exits)
        else:
            saved = placement.saved

            def head() -> None:
                runner.begin(embedded, None)
                patches = saved[:n, backbone.num_prefix_tokens :]
                given = (runner, backbone, exits, patches, memory.identity[:n], space.active.exit_layer[:n])
                memory.prediction[:n].copy_(without_the_host(*given))

            run(("head", n, exits is not None), head)
            prediction = memory.prediction[:B].clone()
        return Done(prediction, placement, memory.scores[:, :B].clone() if record_scores else None, rows)
