"""Runs blocks branch by branch: some rows compute a branch, others reuse their branch of an earlier step.

Gates and norms of the present step are always computed. On the CPU, rows with the same plan run together, a group of
lanes at a time, with the operations of the plain block. On a device one fused pass reads each row's branch, cached or
fresh; only the computing rows go through attention or MLP, gathered by an index that the device computes.
"""

from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import Cached, residual_uem, upload

from ..models.interface import Backbone, Block, Branch, FusableBlock
from ..uem import Exits
from .branch_plan import BranchPlan
from .lane_by_lane import LaneRunner
from .options import ExecutionOptions
from .placement import DevicePlacement, HostPlacement, Skip
from .runner import BlockRunner, Rows, groups, read_by
from .structure import Structure


class BranchRunner(BlockRunner):
    """As `BlockRunner`, with branch reuse by a `BranchPlan`."""

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits | None,
        execution: ExecutionOptions,
        structure: Structure,
        host: bool,
        plan: BranchPlan,
    ):
        super().__init__(backbone, exits, execution, structure, host)
        self._plan = plan
        self._rows: tuple[np.ndarray, slice | np.ndarray] | None = None
        self._uploaded: dict[bytes, Tensor] = {}
        self._known: dict[tuple[int, bytes], Work] = {}

    def _block(
        self,
        block: Block,
        layer: int,
        hidden: Tensor,
        skip: Skip | None,
        placement: HostPlacement | DevicePlacement,
        scored: bool,
    ) -> Rows:
        if not self._plan.touches(layer):
            return super()._block(block, layer, hidden, skip, placement, scored)
        block = cast(FusableBlock, block)
        if self._on_device:
            return self._on_a_device(block, layer, hidden, skip, cast(DevicePlacement, placement), scored)
        return self._on_the_host(block, layer, hidden, skip, placement.row_to_lane, scored)

    def _on_the_host(
        self, block: FusableBlock, layer: int, hidden: Tensor, skip: Skip | None, row_to_lane: Tensor, scored: bool
    ) -> Rows:
        n, out = len(hidden), torch.empty_like(hidden)
        lanes, entries = self._of_rows(row_to_lane)
        keeps, alike_all = self._plan.keeps[layer - 1][:, lanes], self._plan.alike[layer - 1]
        kinds = _kinds(self._plan.takes[layer - 1][:, lanes]) if alike_all is None else [(alike_all, None)]
        for taken, alike in kinds:
            for part in groups(n if alike is None else len(alike), self._group_size or n):
                rows = part if alike is None else alike[part]
                at = rows if alike is None else torch.from_numpy(rows)
                entry = _part(entries, rows)
                given = (hidden[at], _joined(skip, at, n), row_to_lane[at], entry, taken, keeps[:, rows])
                if alike is None:
                    self._alike(block, layer, *given, out[at])
                else:
                    out.index_copy_(0, at, self._alike(block, layer, *given, None))
        self.anybody = not scored
        if not scored:
            return out, None
        u = []
        for part in groups(n, self._group_size or n):
            u.append(self._scores(out[part], layer, row_to_lane[part]).clone())
            self.anybody |= self._scores.anybody
        return out, torch.cat(u)

    def _of_rows(self, row_to_lane: Tensor) -> tuple[np.ndarray, slice | np.ndarray]:
        """The lanes and the store's entries of the running rows, by row. They change only when rows leave."""
        n = len(row_to_lane)
        if self._rows is None or len(self._rows[0]) != n:
            lanes = row_to_lane.numpy().copy()
            self._rows = lanes, _together(self._plan.entry[lanes])
        return self._rows

    def _alike(
        self,
        block: FusableBlock,
        layer: int,
        x: Tensor,
        skip: tuple[Tensor, Tensor | None] | None,
        lanes: Tensor,
        entry: slice | Tensor,
        taken: list[bool],
        keeps: np.ndarray,
        out: Tensor | None,
    ) -> Tensor:
        """The block's output (written to `out` if given) for rows x [n, T, D], of lanes int32 [n], that all reuse the
        same branches. entry: of these rows in the store; taken: by branch, whether it is reused; keeps: bool [J, n]."""
        last = len(block.branches) - 1
        if skip is not None:
            x = block.join(x, skip[0], None, skip[1]).to(x.dtype)
        for j, branch in enumerate(block.branches):
            if taken[j]:
                rows = self._plan.rows(layer, j)
                b = rows[entry] if isinstance(entry, slice) else rows.index_select(0, entry)
            else:
                b = branch(read_by(branch, x, self._cond, lanes), self._cond, lanes)
                if keeps[j].any():
                    _keep(self._plan.rows(layer, j), b, entry, keeps[j])
            ours = x if skip is not None or j > 0 else None
            target = out if j == last and out is not None else ours
            x = residual_uem(x, b, row_to_lane=lanes, gate=branch.gate(self._cond), out=target)[0]
            del b  # frees its memory for the next branch
        return x

    def _on_a_device(
        self,
        block: FusableBlock,
        layer: int,
        hidden: Tensor,
        skip: Skip | None,
        placement: DevicePlacement,
        scored: bool,
    ) -> Rows:
        n, lanes, plan = hidden.shape[0], placement.row_to_lane, self._plan
        ours = skip is not None
        if skip is not None:
            hidden = block.join(hidden, *skip).to(hidden.dtype)
        h = None if self.normed is None or skip is not None else self.normed[:n]
        u, last = None, len(block.branches) - 1
        for j, branch in enumerate(block.branches):
            work = self._work(layer, j, placement)
            adds_bias = branch.bias is None or not self.fuses
            b, cached = self._fresh(branch, hidden, h, lanes, work, adds_bias), None
            if work is not None:
                rows = plan.rows(layer, j)
                b = rows.new_empty(0, *rows.shape[1:]) if b is None else b.to(rows.dtype)  # differs under autocast
                cached = Cached(rows, work.source, work.keep)
            if j < last:
                computes = not plan.takes[layer - 1, j + 1].all()
                norm = block.branches[j + 1].norm(self._cond) if computes and self.fuses else None
            else:
                norm = self.norm_after(layer) if self.fuses and not self._nobody_computes(layer + 1) else None
            hidden, h, u = residual_uem(
                hidden,
                b,
                row_to_lane=lanes,
                gate=branch.gate(self._cond),
                bias=None if adds_bias else branch.bias,
                score=self._scores.of(layer, placement.tickets) if scored and self.fuses and j == last else None,
                norm=norm,
                out=hidden if ours else None,
                cached=cached,
            )
            ours = True
        self.normed, self.anybody = h, True
        if scored and not self.fuses:
            u = self._scores(hidden, layer, lanes)
            self.anybody = self._scores.anybody
        return hidden, u

    def _nobody_computes(self, layer: int) -> bool:
        """Whether all lanes reuse the first branch of block `layer`."""
        return layer <= len(self._plan.takes) and bool(self._plan.takes[layer - 1, 0].all())

    def _fresh(
        self, branch: Branch, hidden: Tensor, h: Tensor | None, lanes: Tensor, work: "Work | None", add_bias: bool
    ) -> Tensor | None:
        """[work.fresh, T, D], the branch of the rows that compute it; None if none does. h: all rows after the norm, if
        the previous pass wrote them."""
        if work is not None and not work.fresh:
            return None
        rows = None if work is None else work.rows
        if h is None:
            if rows is not None:
                hidden, lanes = hidden.index_select(0, rows), lanes.index_select(0, rows)
            h = read_by(branch, hidden, self._cond, lanes)
        elif rows is not None:
            h, lanes = h.index_select(0, rows), lanes.index_select(0, rows)
        return branch(h, self._cond, lanes, add_bias)

    def _work(self, layer: int, j: int, placement: DevicePlacement) -> "Work | None":
        """How to run branch j of block `layer`; cached for equal plans as long as no row moves. None: all lanes compute
        and none stores."""
        if not self._plan.touches(layer, j):
            return None
        takes, keeps = self._plan.takes[layer - 1, j], self._plan.keeps[layer - 1, j]
        moved = 0 if placement.saved is None else layer  # no row moves where no lane exits
        key = moved, takes.tobytes() + keeps.tobytes()
        if key not in self._known:
            self._known[key] = self._new_work(takes, keeps, placement)
        return self._known[key]

    def _new_work(self, takes: np.ndarray, keeps: np.ndarray, placement: DevicePlacement) -> "Work":
        if not (computing := int(len(takes) - takes.sum())):
            entry = self._on(placement, self._plan.entry.astype(np.int32))
            return Work(0, None, entry.index_select(0, placement.row_to_lane), None)
        kinds = np.stack([takes, keeps, self._plan.entry]).astype(np.int32)
        taken, kept, entry = self._on(placement, kinds).index_select(1, placement.row_to_lane)
        n, running = placement.bound, placement.running()
        row = torch.arange(n, dtype=torch.int32, device=entry.device)
        computes = (taken == 0) & running
        keep = torch.where(computes & (kept != 0), entry, -1) if keeps.any() else None
        if not takes.any():
            return Work(n, None, -1 - row, keep)
        rank = computes.cumsum(0, dtype=torch.int32) - 1
        fresh = min(n, computing)
        # the computing rows in order; if they are fewer, the rest of `rows` is row 0, whose result is not used
        place = torch.where(computes, rank, n).long()
        rows = torch.zeros(n + 1, dtype=torch.int32, device=entry.device).scatter_(0, place, row)[:fresh]
        return Work(fresh, rows, torch.where(computes, -1 - rank, entry), keep)

    def _on(self, placement: DevicePlacement, values: np.ndarray) -> Tensor:
        """int32 values on the device; equal values are uploaded once."""
        key = values.tobytes()
        if key not in self._uploaded:
            self._uploaded[key] = upload(torch.from_numpy(values), placement.row_to_lane.device)
        return self._uploaded[key]


class Work(NamedTuple):
    """How one branch runs on a device. fresh: m, an upper bound on the rows that compute it. rows: int32 [m], these
    rows; None: all n. source and keep: see `Cached`."""

    fresh: int
    rows: Tensor | None
    source: Tensor
    keep: Tensor | None


class BranchLaneRunner(LaneRunner):
    """As `LaneRunner`, with branch reuse by a `BranchPlan`."""

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits | None,
        execution: ExecutionOptions,
        structure: Structure,
        host: bool,
        plan: BranchPlan,
    ):
        super().__init__(backbone, exits, execution, structure, host)
        self._plan = plan

    def _one(self, block: Block, layer: int, lane: int, x: Tensor, skip: Tensor | None) -> Tensor:
        plan, cond = self._plan, self._conds[lane]
        if not plan.touches(layer):
            return super()._one(block, layer, lane, x, skip)
        block, entry = cast(FusableBlock, block), int(plan.entry[lane])
        if skip is not None:
            x = block.join(x, skip).to(x.dtype)
        for j, branch in enumerate(block.branches):
            stored = slice(entry, entry + 1)
            if plan.takes[layer - 1, j, lane]:
                b = plan.rows(layer, j)[stored].clone()
            else:
                b = branch(read_by(branch, x, cond, self._only), cond, self._only)
                if plan.keeps[layer - 1, j, lane]:
                    plan.rows(layer, j)[stored].copy_(b)
            x = residual_uem(x, b, row_to_lane=self._only, gate=branch.gate(cond))[0]
        return x


def _joined(skip: Skip | None, at: slice | Tensor, n: int) -> tuple[Tensor, Tensor | None] | None:
    """The long skip for rows `at` of n: its rows, and the index by row or None."""
    if skip is None:
        return None
    index = skip.row_index
    if index is not None:
        return skip.rows, index[at]
    return (skip.rows[:n][at], None) if isinstance(at, slice) else (skip.rows, at)


def _kinds(takes: np.ndarray) -> list[tuple[list[bool], np.ndarray | None]]:
    """Groups rows that reuse the same branches. takes: bool [J, n], by row. Returns for each group which branches are
    taken and the rows, int64 [k] (None: all)."""
    if (takes == takes[:, :1]).all():
        return [(takes[:, 0].tolist(), None)]
    code = (takes << np.arange(len(takes))[:, None]).sum(0)
    rows = [(code == kind).nonzero()[0] for kind in np.unique(code)]
    return [(takes[:, alike[0]].tolist(), alike) for alike in rows]


def _together(entry: np.ndarray) -> slice | np.ndarray:
    """entry: int64 [n]. Returns a slice if the entries are consecutive."""
    first, n = int(entry[0]), len(entry)
    return slice(first, first + n) if (entry == np.arange(first, first + n)).all() else entry


def _part(entries: slice | np.ndarray, rows: slice | np.ndarray) -> slice | Tensor:
    """The entries of some of the rows."""
    if isinstance(entries, slice) and isinstance(rows, slice):
        return slice(entries.start + rows.start, entries.start + rows.stop)
    every = np.arange(entries.start, entries.stop) if isinstance(entries, slice) else entries
    entry = _together(every[rows])
    return entry if isinstance(entry, slice) else torch.from_numpy(entry)


def _keep(rows: Tensor, b: Tensor, entry: slice | Tensor, keeps: np.ndarray) -> None:
    """Stores branches b: [n, T, D] at their entries, for rows where keeps, bool [n], is true."""
    if isinstance(entry, slice):
        if keeps.all():
            rows[entry].copy_(b)
            return
        entry = torch.arange(entry.start, entry.stop, device=rows.device)
    kept = torch.from_numpy(keeps.nonzero()[0])
    rows.index_copy_(0, entry[kept], b[kept].to(rows.dtype))
