"""One evaluation on a device: who runs is known there, and the host launches every block over a bound of the rows.

Blocks write fresh rows. Those of a lane that leaves are saved by lane before the next block runs, by a kernel that
looks up on the device which they are. So whatever the host launches over rows that have left, what a lane delivers is
what it had at its own layer.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from adadiff_kernels import DeviceSet, is_fused, settle_rows

from ..models.interface import Backbone
from ..uem import Exits
from .blocks import ForwardOutput, advance, block_range, compiled_advance
from .counts import Counts, bucket
from .decision import Decision


class DeviceEvaluation(ForwardOutput):
    """Its tensors lie on the device, perhaps not yet written. `macs` and `moved` wait for it when they are read."""

    def __init__(
        self,
        eps: Tensor,
        variance: Tensor | None,
        exit_layer: Tensor,
        scores: Tensor | None,
        macs_by_depth: Sequence[int],
        moved: Tensor,
        rows: Sequence[int],
    ):
        own = {"eps": eps, "variance": variance, "exit_layer": exit_layer, "scores": scores, "rows": tuple(rows)}
        own |= {"macs_full": len(exit_layer) * macs_by_depth[0], "_macs_by_depth": macs_by_depth, "_moved": moved}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @property
    def macs(self) -> int:
        return sum(self._macs_by_depth[depth] for depth in self.exit_layer.tolist())

    @property
    def moved(self) -> int:
        return int(self._moved)


def evaluate_on_device(
    backbone: Backbone,
    exits: Exits | None,
    decision: Decision,
    x: Tensor,
    t: Tensor,
    context: Tensor | None,
    *,
    partner: Tensor | None,
    counts: Counts,
    record: bool,
    compiled: bool,
    nvtx: bool,
) -> DeviceEvaluation:
    """`adadiff.evaluate`, once everything is checked and on x's device. partner: i32 [B], who a lane is tied to."""
    B = len(x)
    rows, cond = backbone.embed(x, t, context)
    offsets = exits.offsets(cond.time, t) if decision.scored else None
    lanes = _Lanes(backbone, exits, decision, rows, cond, offsets, partner, record, compiled, nvtx)
    with _device_set(B, x.device) as active:
        lanes.run(active, rows, counts)
        exit_layer, moved = active.exit_layer.clone(), active.moved.clone()
        order = active.row_to_lane.clone() if counts.exact else None
    outputs = x.shape[1] * (2 if backbone.learned_variance else 1)
    eps, variance = lanes.heads(exit_layer, order) if B else rows.new_empty(0, outputs, *x.shape[2:]), None
    if backbone.learned_variance:
        eps, variance = eps.chunk(2, dim=1)
    return DeviceEvaluation(eps, variance, exit_layer, lanes.scores, lanes.macs_by_depth, moved, lanes.rows)


class _Lanes:
    """B lanes on their way through the network, and what is kept of them."""

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits | None,
        decision: Decision,
        rows: Tensor,
        cond: object,
        offsets: Tensor | None,
        partner: Tensor | None,
        record: bool,
        compiled: bool,
        nvtx: bool,
    ):
        B, L = len(rows), len(backbone.blocks)
        self._backbone, self._exits, self._decision, self._cond = backbone, exits, decision, cond
        self._partner, self._nvtx = partner, nvtx
        self._advance = compiled_advance() if compiled else advance
        self._offsets = offsets
        self._needed = {block.skip_from for block in backbone.blocks} - {None}
        self._skips: dict[int, tuple[Tensor, Tensor]] = {}  # block -> its rows, and the row of each lane in them
        self._saved = torch.empty_like(rows)  # [B, T, D] by lane: what it had where it left
        self.scores = torch.full((L, B), torch.nan, device=rows.device) if record else None
        self.rows = [0] * L  # over which each block was launched
        self._outputs = 1 if exits is None else exits.weight.shape[1]
        self._left: list[tuple[int, int, int]] = []  # layer, rows before and after, where the host knows them exactly

    def run(self, active: DeviceSet, rows: Tensor, counts: Counts) -> None:
        """All blocks over rows [n, T, D] of `active`, until all its lanes have left."""
        blocks, decision, saved = self._backbone.blocks, self._decision, self._saved
        bound = count = len(rows)
        asked_at, index_now, fused = [], active.snapshot(), is_fused(rows, self._outputs)
        for layer, block in enumerate(blocks, start=1):
            if not bound:
                return
            lanes, rows = active.row_to_lane[:bound], rows[:bound]
            skip, index = None, None
            if block.skip_from is not None:
                skip, index = self._skips.pop(block.skip_from)
            scored = layer in decision.scored
            score = self._exits.score(layer, self._offsets, active.tickets) if scored else None
            with block_range(layer, self._nvtx):
                rows, u = self._advance(block, rows, skip, self._cond, lanes, score, index=index, fused=fused)
            self.rows[layer - 1] += bound
            if scored and self.scores is not None:
                self._record(layer, u, active, lanes)
            needed = layer - 1 in self._needed
            if layer in decision.asked and layer < len(blocks):
                asked_at.append(layer)
                index_now = torch.empty_like(active.lane_to_row) if needed else None
                settle_rows(self._leave(active, u, layer, lanes, index_now), rows, saved)
                before, count = count, counts.bound(active, asked_at, bound)
                self._left.append((layer, before, count))
                bound = min(bound, bucket(count, len(saved))) if decision.by_lane else count
            if needed:
                index_now = active.snapshot() if index_now is None else index_now
                self._skips[layer - 1] = rows, index_now
        self._left.append((len(blocks), count, 0))
        moves = active.finish(len(blocks), bound=bound)
        if decision.asked:
            settle_rows(moves, rows[:bound], saved)
        else:
            self._saved = rows

    def heads(self, exit_layer: Tensor, order: Tensor | None) -> Tensor:
        """[B, C or 2 C, H, W]. One call where the head is shared; else one for the last layer, one for all others.

        order: i32 [B], the lanes as they lie at the end, where the host knew every count: larger heads are then called
        once for each layer, on those who left there.
        """
        backbone, exits, cond = self._backbone, self._exits, self._cond
        patches = self._saved[:, backbone.num_prefix_tokens :]
        own = exits is not None and exits.heads is not None and bool(self._decision.asked)
        if own and order is not None and exits.config.head != "linear":
            left = [(layer, order[after:before]) for layer, before, after in self._left if after < before][::-1]
            parts = [exits.head(backbone, layer)(patches.index_select(0, lanes), cond, lanes) for layer, lanes in left]
            eps = torch.cat(parts)
            return torch.empty_like(eps).index_copy_(0, order.long(), eps)
        lanes = torch.arange(len(patches), dtype=torch.int32, device=patches.device)
        eps = backbone.head(patches, cond, lanes)
        if not own:
            return eps
        last = (exit_layer == len(backbone.blocks)).view(-1, 1, 1, 1)
        return torch.where(last, eps, exits.heads_by_lane(patches, cond, lanes, exit_layer))

    @property
    def macs_by_depth(self) -> list[int]:
        """Multiply-adds of a lane that leaves after so many blocks; of the plain network at 0."""
        backbone, scored = self._backbone, self._decision.scored
        blocks = [block.macs(backbone.tokens) for block in backbone.blocks]
        score = self._exits.macs(backbone.tokens - self._exits.num_prefix_tokens) if scored else 0
        each = [macs + score * (layer in scored) for layer, macs in enumerate(blocks, start=1)]
        ends = sum(backbone.stem_and_head_macs())
        early = 0 if self._exits is None else self._exits.head_macs(backbone.tokens - backbone.num_prefix_tokens)
        *inner, last = accumulate(each)
        return [sum(blocks) + ends, *(macs + early + ends for macs in inner), last + ends]

    def _leave(self, active: DeviceSet, u: Tensor | None, layer: int, lanes: Tensor, snapshot: Tensor | None) -> Tensor:
        given = {"bound": len(lanes), "partner": self._partner, "snapshot": snapshot}
        decision = self._decision
        if decision.limits is not None:
            return active.exit_rows(u, decision.limits[layer - 1], layer, **given)
        if self._partner is not None and u is not None:
            by_lane = torch.zeros(active.num_lanes, device=u.device).index_copy_(0, lanes.long(), u)
            u = torch.maximum(u, by_lane.index_select(0, self._partner.index_select(0, lanes)))
        mask = decision.leave_blindly(u, layer, lanes, _running(active, lanes))
        return active.exit_rows_where(mask, layer, **given)

    def _record(self, layer: int, u: Tensor, active: DeviceSet, lanes: Tensor) -> None:
        own, lanes = self.scores[layer - 1], lanes.long()
        own.index_copy_(0, lanes, torch.where(_running(active, lanes), u, own.index_select(0, lanes)))


def _running(active: DeviceSet, lanes: Tensor) -> Tensor:
    """bool [n]: rows that run."""
    return torch.arange(len(lanes), device=lanes.device) < active.count


_idle = threading.local()
_of_graphs: list[DeviceSet] = []  # a captured graph writes to the memory of its set for as long as it lives


@contextmanager
def _device_set(B: int, device: torch.device) -> Iterator[DeviceSet]:
    """A set that nobody uses, started. Making one takes pinned memory and waits for the device, so they are kept, by
    what must not be shared: threads, streams and captured graphs."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _idle.__dict__.setdefault((B, device, stream), [])
    with torch.inference_mode(False):  # whatever mode the caller is in, the next one may be in another
        active = kept.pop() if kept else DeviceSet(B, device)
    active.start()
    try:
        yield active
    finally:
        (_of_graphs if active.recorded else kept).append(active)
