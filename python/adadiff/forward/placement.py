"""Which rows run and where they lie, tracked on the host or on a device. Both exit by the same algorithm
(adadiff_kernels/compaction/), and save by lane the hidden states at the lane's exit layer.

Each block writes new rows. Rows of exiting lanes are saved before the next block runs, and the remaining rows are moved
to be contiguous. On a device the host launches every block over an upper bound of the rows; results beyond the count
are never read.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adadiff_kernels import ActiveSet, DeviceSet, settle_rows

from ..policies.interface import below
from .count_sync import CountSync, bucket
from .decision import ExitDecision


class Skip(NamedTuple):
    """A long skip as its block wrote it: row r joins rows[index[r]] or, with row_to_lane, rows[index[row_to_lane[r]]];
    without index, rows[r]. See `join_skip`."""

    rows: Tensor
    row_to_lane: Tensor | None
    index: Tensor | None

    @property
    def row_index(self) -> Tensor | None:
        """The index by row, for blocks that do not use row_to_lane."""
        by_row = self.row_to_lane is None or self.index is None
        return self.index if by_row else self.index.index_select(0, self.row_to_lane)


class Placement:
    """The state between blocks. hidden: [bound or more, T, D]. skips: long skips not joined yet, by the index of their
    block. learns: whether the host learns of exits only through `advance`."""

    learns = False

    row_to_lane: Tensor

    def __init__(self, hidden: Tensor, decision: ExitDecision, partner: Tensor | None) -> None:
        self.hidden, self._decision, self._partner = hidden, decision, partner
        self.skips: dict[int, tuple[Tensor, Tensor | None]] = {}

    def running(self) -> Tensor | None:
        """bool [n]: rows that still run; None: all do."""
        raise NotImplementedError

    def exit_mask(self, u: Tensor | None, layer: int) -> Tensor:
        """bool [n]: rows that their policies let exit after `layer`. u: float32 [n] or None."""
        lanes, limits, running = self.row_to_lane, self._decision.limits, self.running()
        u = _larger_of_tied(u, lanes, self._partner)
        if limits is None:
            return self._decision.mask(u, layer, lanes, running)
        mask = below(u, limits[layer - 1].index_select(0, lanes))
        return mask if running is None else mask & running

    def both_tied(self, mask: Tensor) -> Tensor:
        """The mask restricted to rows whose partner's is true, too. mask: bool [n] by row, false for rows that do not
        run."""
        if self._partner is None:
            return mask
        lanes = self.row_to_lane.long()
        by_lane = torch.zeros(len(self._partner), dtype=torch.bool, device=mask.device).index_copy_(0, lanes, mask)
        return mask & by_lane.index_select(0, self._partner.index_select(0, lanes))


class HostPlacement(Placement):
    """Placement on the host. bound: n, the running rows. row_to_lane: int32 [n]. in_order: whether row i holds lane i,
    for all lanes. saved: [B, T, D] by lane, hidden states of exited lanes; None before the first exit. exits: (layer, n
    before, n after) for each layer with exits. partner: int32 [B] or None, the lane that has to exit together with each
    lane."""

    tickets = None

    def __init__(self, hidden: Tensor, decision: ExitDecision, partner: Tensor | None):
        super().__init__(hidden, decision, partner)
        self._shape = hidden.shape
        self.bound, self.in_order = len(hidden), True
        self.saved: Tensor | None = None
        self.row_to_lane = self._identity = torch.arange(self.bound, dtype=torch.int32, device="cpu")
        self._active: ActiveSet | None = None  # created when a lane may exit
        self.exits: list[tuple[int, int, int]] = []

    def exit(self, hidden: Tensor, u: Tensor | None, layer: int, keeps: bool, normed: Tensor | None = None) -> None:
        """Saves the rows of hidden [n, T, D] that exit after `layer`, and moves the others, in place. u: float32 [n] or
        None. keeps, normed: used by `DevicePlacement` only."""
        limits = self._decision.limits
        if limits is None:
            self.exit_where(self.exit_mask(u, layer), hidden, layer, keeps, normed)
            return
        moves = self._set().exit_rows(u, limits[layer - 1], layer, partner=self._partner)
        self._settle(moves, hidden, layer)

    def exit_where(self, mask: Tensor, hidden: Tensor, layer: int, keeps: bool, normed: Tensor | None = None) -> None:
        """As `exit`, for rows where mask, bool [n], is true; partners exit only if both masks are."""
        self._settle(self._set().exit_rows_where(mask, layer, partner=self._partner), hidden, layer)

    def running(self) -> None:
        return None  # all rows

    def _set(self) -> ActiveSet:
        if self._active is None:
            self._active = ActiveSet(self._shape[0])
        return self._active

    def _settle(self, moves: Tensor, hidden: Tensor, layer: int) -> None:
        active = self._active
        if active.count == self.bound:
            return
        if self.saved is None:
            self.saved = hidden.new_empty(self._shape)
        settle_rows(moves, hidden, self.saved)
        self.exits.append((layer, self.bound, active.count))
        self.bound, self.row_to_lane, self.in_order = active.count, active.running, False

    def keep(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Remembers a long skip that is written now."""
        return hidden, self._identity if self.in_order else self._active.snapshot()

    def skip(self, kept: tuple[Tensor, Tensor | None]) -> Skip:
        rows, snapshot = kept
        return Skip(rows, None, None if self.in_order else self._active.locate(snapshot))

    def record(self, scores: Tensor, u: Tensor) -> None:
        """Writes u of the running rows to scores: float32 [B] by lane."""
        scores.index_copy_(0, self.row_to_lane.long(), u)

    def finish(self, hidden: Tensor, num_layers: int) -> None:
        """All running lanes exit after the last layer; `saved` then holds all lanes."""
        n, active = self.bound, self._active
        if n:
            self.exits.append((num_layers, n, 0))
        if self.in_order:
            self.saved, self.order, self.moved = hidden, self.row_to_lane, 0
            self.exit_layer = torch.full((n,), num_layers, dtype=torch.int32, device="cpu")
            return
        if n:
            self.saved.index_copy_(0, self.row_to_lane.long(), hidden[:n])
            active.finish(num_layers)
        self.exit_layer, self.moved, self.order = active.exit_layer, active.moved, active.row_to_lane


class DevicePlacement(Placement):
    """Placement on a device; see `HostPlacement`. bound: an upper bound on the running rows. rounds: launch a rounded
    number of rows. leave: whether lanes may leave before the last layer (None: as `decision` says).
    Only `advance` reads from the device; all else is queued. At the end exits and order (int32 [B], the lanes by row)
    are None unless the host knows every count."""

    in_order, learns = False, True
    exits: list[tuple[int, int, int]] | None

    def __init__(
        self,
        active: DeviceSet,
        hidden: Tensor,
        decision: ExitDecision,
        partner: Tensor | None,
        count_sync: CountSync,
        rounds: bool,
        leave: bool | None = None,
    ):
        super().__init__(hidden, decision, partner)
        self._active = active
        limits = decision.limits
        self._limits: Sequence[Tensor] | Tensor | None = None if limits is None else limits.unbind(0)  # by layer
        self._count_sync, self._rounds = count_sync, rounds and not decision.whole_batch
        self._lanes = self._count = hidden.shape[0]
        self.tickets = active.tickets
        leave = bool(decision.exit_layers) if leave is None else leave
        self.saved = self._empty(hidden) if leave else None
        self.exits: list[tuple[int, int, int]] = []
        self._asked: list[int] = []
        self._snapshot: Tensor | None = None
        self._launch_over(self._lanes)

    def _empty(self, hidden: Tensor) -> Tensor:
        return torch.empty_like(hidden)

    def _launch_over(self, bound: int) -> None:
        self.bound, self.row_to_lane = bound, self._active.row_to_lane[:bound]

    def outputs(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Where block `layer` has to write its output and the next norm's output, [bound, T, D]; None: new memory."""
        return None, None

    def exit(self, hidden: Tensor, u: Tensor | None, layer: int, keeps: bool, normed: Tensor | None = None) -> None:
        """See `HostPlacement.exit`. keeps: whether a long skip is written at this layer. normed: [n, T, D], rows that
        move along with those of hidden."""
        if self._limits is None:
            self.exit_where(self.exit_mask(u, layer), hidden, layer, keeps, normed)
            return
        moves = self._active.exit_rows(u, self._limits[layer - 1], layer, **self._given(layer, keeps))
        settle_rows(moves, hidden, self.saved, normed)

    def exit_where(self, mask: Tensor, hidden: Tensor, layer: int, keeps: bool, normed: Tensor | None = None) -> None:
        """As `exit`, for rows where mask, bool [n], is true; partners exit only if both masks are."""
        moves = self._active.exit_rows_where(mask, layer, **self._given(layer, keeps))
        settle_rows(moves, hidden, self.saved, normed)

    def _given(self, layer: int, keeps: bool) -> dict[str, Any]:
        self._snapshot = self._new_snapshot(layer) if keeps else None
        return {"bound": self.bound, "partner": self._partner, "snapshot": self._snapshot}

    def advance(self, layer: int) -> None:
        """Updates the bound from what the host knows of the count, after the exit of `layer` was queued."""
        self._asked.append(layer)
        before, self._count = self._count, self._count_sync.bound(self._active, self._asked, self._count)
        if self._count < before:
            self.exits.append((layer, before, self._count))
            if (bound := self._rounded(self._count)) < self.bound:
                self._launch_over(bound)

    def _rounded(self, count: int) -> int:
        """The number of rows to launch over when up to `count` run."""
        return bucket(count, self._active.num_lanes) if self._rounds else count

    def _new_snapshot(self, layer: int) -> Tensor:
        return torch.empty_like(self._active.lane_to_row)

    def keep(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.saved is None:  # no lane exits, so no row moves
            return hidden, None
        if self._snapshot is None:
            self._snapshot = self._active.snapshot()
        return hidden, self._snapshot

    def skip(self, kept: tuple[Tensor, Tensor | None]) -> Skip:
        rows, snapshot = kept
        return Skip(rows, None, None) if snapshot is None else Skip(rows, self.row_to_lane, snapshot)

    def record(self, scores: Tensor, u: Tensor) -> None:
        lanes = self.row_to_lane.long()
        scores.index_copy_(0, lanes, torch.where(self.running(), u, scores.index_select(0, lanes)))

    def finish(self, hidden: Tensor, num_layers: int) -> None:
        self.settle_last(hidden, num_layers)
        self.end(hidden, num_layers)

    def settle_last(self, hidden: Tensor, num_layers: int) -> None:
        """The part of `finish` on the device."""
        moves = self._active.finish(num_layers, bound=self.bound)
        if self.saved is not None:
            settle_rows(moves, hidden[: self.bound], self.saved)

    def end(self, hidden: Tensor, num_layers: int) -> None:
        """The part of `finish` on the host."""
        active = self._active
        if self.saved is None:
            self.saved = hidden
        if self._count:
            self.exits.append((num_layers, self._count, 0))
        # copies: the next pass reuses the set
        self.exit_layer, self.moved = active.exit_layer[: self._lanes].clone(), active.moved.clone()
        exact = self._count_sync.exact
        self.order: Tensor | None
        self.exits, self.order = (self.exits, active.row_to_lane[: self._lanes].clone()) if exact else (None, None)

    def running(self) -> Tensor:
        return torch.arange(self.bound, device=self.row_to_lane.device) < self._active.count


def _larger_of_tied(u: Tensor | None, row_to_lane: Tensor, partner: Tensor | None) -> Tensor | None:
    """u by row, the larger one for two partners."""
    if u is None or partner is None:
        return u
    lanes = row_to_lane.long()
    by_lane = torch.zeros(len(partner), dtype=torch.float32, device=u.device).index_copy_(0, lanes, u)
    return torch.maximum(u, by_lane.index_select(0, partner.index_select(0, lanes)))


_idle = threading.local()
_of_graphs: list[DeviceSet] = []  # kept alive: a captured graph writes to the memory of its set


@contextmanager
def device_set(B: int, device: torch.device) -> Iterator[DeviceSet]:
    """A started set for exclusive use. Creating one needs pinned memory and waits for the device, so sets are kept and
    reused; threads, streams and captured graphs do not share sets."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _idle.__dict__.setdefault((B, device, stream), [])
    with torch.inference_mode(False):  # a later caller may be in another mode
        active = kept.pop() if kept else DeviceSet(B, device)
    active.start()
    try:
        yield active
    finally:
        (_of_graphs if active.recorded else kept).append(active)
