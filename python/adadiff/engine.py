"""One evaluation of a network with exits: block, score, decide, leave, head."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adadiff_kernels import ActiveSet, Score, layer_norm, residual_uem, swap_rows, take_rows, uem_score

from .exits import Exits
from .models.interface import Backbone, Block, Conditioning, WholeBlock
from .rules import Decision, Rule

# On a CPU a block runs over groups of lanes with about this many tokens: enough for products at their full rate, few
# enough that what one writes is still in the cache when the next reads it. Rows do not see each other inside a block.
CPU_GROUP_TOKENS = 2048


@dataclass(frozen=True)
class Evaluation:
    eps: Tensor  # [B, C, H, W], the network's dtype
    exit_layer: Tensor  # i32 [B], blocks a lane ran, 1..L
    macs: int  # multiply-adds run, all lanes together
    macs_full: int  # the same lanes through the plain network
    moved: int  # rows moved to keep the running ones together
    scores: Tensor | None  # float32 [L, B], NaN where nobody was asked; None unless recorded
    variance: Tensor | None = None  # [B, C, H, W], v of a learned range (solver_step); None where none was learned


@dataclass(frozen=True)
class _Cohort:
    """Lanes whose conditioning was computed together: by lane inside it."""

    cond: Conditioning
    offsets: Tensor | None  # of the scores, float32 [L, lanes, P]


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    exits: Exits | None,
    rule: Rule | Sequence[Rule],
    x: Tensor,
    t: Tensor,
    context: Tensor | None = None,
    *,
    which: Tensor | None = None,
    threshold: Tensor | None = None,
    pairs: Tensor | None = None,
    batch_invariant: bool = False,
    group: int | None = None,
    record: bool = False,
) -> Evaluation:
    """The network's prediction for B lanes, each at its own timestep, each leaving when its rule says so.

    x: [B, C, H, W]; t: float [B], the network's time; context: labels int64 [B], text [B, N, E] or None.
    rule: one for all, or several with which: int64 [B], the index of each lane's own.
    threshold: float [B], overrides the rule's; pairs: int64 [B], each lane's tied partner (itself if it has none),
    tied lanes leave together by the larger u.
    batch_invariant: every product is computed lane by lane, so that a lane's prediction, score and exit are the same
    bits in any batch (on one machine with one number of threads).
    group: lanes per block call (default: `group_size` on a CPU, else all); without effect if batch_invariant.
    Raises ValueError for inputs that require grad, thresholds the rule refuses, pairs that are none or whose two lanes
    have two thresholds, or a rule that needs missing exits.
    """
    B, L = len(x), len(backbone.blocks)
    if x.requires_grad:
        raise ValueError("evaluate is for inference; x must not require grad")
    decision = Decision(rule if isinstance(rule, Sequence) else (rule,), which, L, t, threshold)
    if exits is None and decision.asked:
        raise ValueError("this network has no exits; only the rule 'full' can run it")
    if group is not None and group < 1:
        raise ValueError(f"group must be at least 1 lane, got {group}")
    if pairs is not None:
        _check_pairs(pairs, decision.threshold, which)
    if batch_invariant and B:
        rows, cohorts = _begin_each(backbone, exits, decision, x, t, context)
    else:
        rows, cohorts = _begin(backbone, exits, decision, x, t, context)
    active = ActiveSet(B)
    scores = torch.full((L, B), torch.nan, device=x.device) if record else None
    needed = {block.skip_from for block in backbone.blocks} - {None}
    skips: dict[int, tuple[Tensor, Tensor]] = {}
    left: list[tuple[int, Tensor]] = []
    if group is None:
        group = group_size(backbone) if x.device.type == "cpu" else max(1, B)
    costs = [block.macs(backbone.tokens) for block in backbone.blocks]
    macs = 0

    for layer, block in enumerate(backbone.blocks, start=1):
        lanes = active.running
        n = active.count
        scored = layer in decision.scored
        skip, index = None, None
        if block.skip_from is not None:
            skip, snapshot = skips.pop(block.skip_from)
            index = active.locate(snapshot)
        layer_exits = exits if scored else None
        if batch_invariant:
            rows, u = _run_each(block, rows, skip, index, cohorts, lanes, layer_exits, layer)
        else:
            rows, u = _run_block(block, rows, skip, index, cohorts[0], lanes, layer_exits, layer, group)
        macs += n * costs[layer - 1]
        if scored:
            macs += n * exits.macs(backbone.tokens - exits.extras)
            if scores is not None:
                scores[layer - 1, lanes] = u
            if pairs is not None:
                by_lane = torch.empty(B, device=u.device).index_copy_(0, lanes.long(), u)
                u = torch.maximum(u, by_lane[pairs[lanes]])
        if layer in decision.asked:
            swaps = active.leave(decision.leave(u, layer, lanes), layer)
            if swaps.after < swaps.before:
                decision.moved()
                swap_rows(swaps, rows)
                left.append((layer, rows[swaps.after :, backbone.extras :].clone()))
                rows = rows[: swaps.after]
                if not swaps.after:
                    break
        if layer - 1 in needed:
            skips[layer - 1] = (rows, active.snapshot())
    skips.clear()
    if active.count:
        left.append((L, rows[:, backbone.extras :]))
        active.finish(L)
    stem, head = backbone.fixed_macs()
    ends = B * (stem + head)
    full = B * sum(costs) + ends
    if not left:
        prediction = rows.new_empty(0, x.shape[1] * (2 if backbone.learned_variance else 1), *x.shape[2:])
    elif batch_invariant:
        prediction = _heads_each(backbone, exits, left, cohorts, active.lane)
    else:
        prediction = _heads(backbone, exits, left, cohorts[0].cond, active.lane)
    eps, variance = prediction.chunk(2, dim=1) if backbone.learned_variance else (prediction, None)
    return Evaluation(eps, active.exit_layer, macs + ends, full, active.moved, scores, variance)


def _begin(
    backbone: Backbone, exits: Exits | None, decision: Decision, x: Tensor, t: Tensor, context: Tensor | None
) -> tuple[Tensor, list[_Cohort]]:
    rows, cond = backbone.begin(x, t, context)
    return rows, [_Cohort(cond, exits.offsets(cond.time) if decision.scored else None)]


def _run_block(
    block: Block,
    rows: Tensor,
    skip: Tensor | None,
    index: Tensor | None,
    cohort: _Cohort,
    lanes: Tensor,
    exits: Exits | None,
    layer: int,
    group: int,
) -> tuple[Tensor, Tensor | None]:
    """One block over all running rows, a group of them at a time. Returns its output and u (None without exits)."""
    n = len(rows)
    score = exits.score(layer, cohort.offsets) if exits is not None else None
    if n <= group:
        here = take_rows(skip, index, n) if skip is not None else None
        return advance(block, rows, here, cohort.cond, lanes, score)
    out, us = torch.empty_like(rows), []
    for part in _groups(n, group):
        here = None
        if skip is not None:
            here = skip[part] if index is None else skip.index_select(0, index[part])
        _, u = advance(block, rows[part], here, cohort.cond, lanes[part], score, out=out[part])
        us.append(u)
    return out, torch.cat(us) if score is not None else None


def advance(
    block: Block,
    rows: Tensor,
    skip: Tensor | None,
    cond: Conditioning,
    lanes: Tensor,
    score: Score | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One block: rows, skip, out [n, T, D]; lanes i32 [n]. Returns the block's output and u, float32 [n] or None."""
    if isinstance(block, WholeBlock):
        y = block.whole(rows, cond, lanes)
        return (y if out is None else out.copy_(y)), None if score is None else uem_score(y, score, lanes)
    if skip is not None:
        rows = block.join(rows, skip)
    *first, last = block.branches
    for branch in first:
        b = branch(layer_norm(rows, branch.norm(cond), lanes))
        rows, _, _ = residual_uem(rows, b, lanes=lanes, gate=branch.gate(cond), out=b)  # b is ours to overwrite
    b = last(layer_norm(rows, last.norm(cond), lanes))
    y, _, u = residual_uem(rows, b, lanes=lanes, gate=last.gate(cond), score=score, out=b if out is None else out)
    return y, u


def _heads(
    backbone: Backbone, exits: Exits | None, left: list[tuple[int, Tensor]], cond: Conditioning, lane: Tensor
) -> Tensor:
    """One head call per tick where it is shared, one per exit layer where each has its own. lane: i32 [B] by row."""
    left = left[::-1]  # the last to leave lie first
    if exits is None or exits.heads is None:
        patches = left[0][1] if len(left) == 1 else torch.cat([rows for _, rows in left])
        eps = backbone.head(patches, cond, lane)
    else:
        lanes = lane.split([len(rows) for _, rows in left])
        heads = [exits.head(backbone, layer) for layer, _ in left]
        eps = torch.cat([head(rows, cond, own) for head, (_, rows), own in zip(heads, left, lanes, strict=True)])
    return torch.empty_like(eps).index_copy_(0, lane.long(), eps)


def _begin_each(
    backbone: Backbone, exits: Exits | None, decision: Decision, x: Tensor, t: Tensor, context: Tensor | None
) -> tuple[Tensor, list[_Cohort]]:
    """`_begin` lane by lane. Inputs are copied to memory of their own: how a product rounds may depend on alignment."""
    rows, cohorts = [], []
    for lane in range(len(x)):
        own = (v[lane : lane + 1].clone() if v is not None else None for v in (x, t, context))
        row, cohort = _begin(backbone, exits, decision, *own)
        rows.append(row)
        cohorts += cohort
    return torch.cat(rows), cohorts


def _run_each(
    block: Block,
    rows: Tensor,
    skip: Tensor | None,
    index: Tensor | None,
    cohorts: Sequence[_Cohort],
    lanes: Tensor,
    exits: Exits | None,
    layer: int,
) -> tuple[Tensor, Tensor | None]:
    """`_run_block` lane by lane, on copies."""
    out, us = torch.empty_like(rows), []
    only = torch.zeros(1, dtype=torch.int32, device=rows.device)  # the one lane of a cohort
    places = range(len(rows)) if index is None else index.tolist()
    for row, (lane, place) in enumerate(zip(lanes.tolist(), places, strict=True)):
        own = cohorts[lane]
        here = None if skip is None else skip[place : place + 1].clone()
        score = exits.score(layer, own.offsets) if exits is not None else None
        y, u = advance(block, rows[row : row + 1].clone(), here, own.cond, only, score)
        out[row] = y[0]
        us.append(u)
    return out, torch.cat(us) if exits is not None else None


def _heads_each(
    backbone: Backbone,
    exits: Exits | None,
    left: list[tuple[int, Tensor]],
    cohorts: Sequence[_Cohort],
    lane: Tensor,
) -> Tensor:
    """`_heads` lane by lane, on copies."""
    only = torch.zeros(1, dtype=torch.int32, device=lane.device)
    rows = ((layer, row) for layer, rows in left[::-1] for row in rows.split(1))
    eps = []
    for own, (layer, row) in zip(lane.tolist(), rows, strict=True):
        head = backbone.head if exits is None else exits.head(backbone, layer)
        eps.append(head(row.clone(), cohorts[own].cond, only))
    return torch.empty_like(eps := torch.cat(eps)).index_copy_(0, lane.long(), eps)


def _check_pairs(pairs: Tensor, threshold: Tensor, which: Tensor | None) -> None:
    lanes = torch.arange(len(threshold), device=pairs.device)
    fits = pairs.dtype == torch.int64 and pairs.shape == lanes.shape
    if not fits or bool(((pairs < 0) | (pairs >= len(lanes))).any()) or not torch.equal(pairs[pairs], lanes):
        raise ValueError("pairs must be int64 [B], each lane's partner, whose partner is that lane in turn")
    if not torch.equal(threshold[pairs].nan_to_num(), threshold.nan_to_num()):
        raise ValueError("tied lanes leave together, so they need one threshold")
    if which is not None and not torch.equal(which[pairs], which):
        raise ValueError("tied lanes leave together, so they need one rule")


def group_size(backbone: Backbone) -> int:
    """Lanes per block call on a CPU."""
    return max(1, round(CPU_GROUP_TOKENS / backbone.tokens))


def _groups(n: int, group: int) -> Iterator[slice]:
    """n rows in as few groups as fit, of nearly equal size: a small last group would run at a worse rate."""
    parts = -(-n // group)
    bounds = [n * i // parts for i in range(parts + 1)]
    return (slice(a, b) for a, b in itertools.pairwise(bounds))
