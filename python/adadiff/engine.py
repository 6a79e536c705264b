"""One evaluation of a network with exits: block, score, decide, leave, head."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adadiff_kernels import ActiveSet, Score, layer_norm, residual_uem, swap_rows, take_rows

from .exits import Exits
from .models.interface import Backbone, Block, Conditioning
from .rules import Rule, layers_asked

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


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    exits: Exits | None,
    rule: Rule,
    x: Tensor,
    t: Tensor,
    context: Tensor | None = None,
    *,
    threshold: Tensor | None = None,
    pairs: Tensor | None = None,
    group: int | None = None,
    record: bool = False,
) -> Evaluation:
    """The network's prediction for B lanes, each at its own timestep, each leaving when `rule` says so.

    x: [B, C, H, W]; t: float [B], the network's time; context: labels int64 [B], text [B, N, E] or None.
    threshold: float [B], overrides the rule's; pairs: int64 [B], each lane's tied partner (itself if it has none),
    tied lanes leave together by the larger u; group: lanes per block call (default: `group_size` on a CPU,
    else all).
    Raises ValueError for inputs that require grad, thresholds the rule refuses, pairs that are none or whose two lanes
    have two thresholds, or a rule that needs missing exits.
    """
    B, L = len(x), len(backbone.blocks)
    if x.requires_grad:
        raise ValueError("evaluate is for inference; x must not require grad")
    asked = layers_asked(rule, L)
    if exits is None and asked:
        raise ValueError("this network has no exits; only the rule 'full' can run it")
    if group is not None and group < 1:
        raise ValueError(f"group must be at least 1 lane, got {group}")
    threshold = _thresholds(rule, threshold, t)
    if pairs is not None:
        _check_pairs(pairs, threshold)
    rows, cond = backbone.begin(x, t, context)
    active = ActiveSet(B)
    offsets = exits.offsets(cond.time) if rule.scored else None
    state = torch.zeros(B, device=t.device)
    scores = torch.full((L, B), torch.nan, device=x.device) if record else None
    needed = {block.skip_from for block in backbone.blocks} - {None}
    skips: dict[int, tuple[Tensor, Tensor]] = {}
    left: list[tuple[int, Tensor]] = []
    if group is None:
        group = group_size(backbone) if x.device.type == "cpu" else max(1, B)
    costs = [block.macs(backbone.tokens) for block in backbone.blocks]
    macs = 0
    known: tuple[Tensor, Tensor, Tensor] | None = None  # t, threshold and state by row, until somebody leaves

    for layer, block in enumerate(backbone.blocks, start=1):
        lanes = active.running
        n = active.count
        score = exits.score(layer, offsets) if rule.scored and layer in asked else None
        skip, index = None, None
        if block.skip_from is not None:
            skip, snapshot = skips.pop(block.skip_from)
            index = active.locate(snapshot)
        rows, u = _run_block(block, rows, skip, index, cond, lanes, score, group)
        macs += n * costs[layer - 1]
        if score is not None:
            macs += n * exits.macs(backbone.tokens - backbone.extras)
            if scores is not None:
                scores[layer - 1, lanes] = u
            if pairs is not None:
                by_lane = torch.empty(B, device=u.device).index_copy_(0, lanes.long(), u)
                u = torch.maximum(u, by_lane[pairs[lanes]])
        if layer in asked:
            if known is None:
                known = t[lanes], threshold[lanes], state[lanes]
            mask = rule.leave(u, layer, L, *known)
            if rule.stateful:
                state[lanes] = known[2]
            swaps = active.leave(mask, layer)
            if swaps.after < swaps.before:
                known = None
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
    eps = _heads(backbone, exits, left, cond, active.lane) if left else rows.new_empty(x.shape)
    return Evaluation(eps, active.exit_layer, macs + ends, full, active.moved, scores)


def _run_block(
    block: Block,
    rows: Tensor,
    skip: Tensor | None,
    index: Tensor | None,
    cond: Conditioning,
    lanes: Tensor,
    score: Score | None,
    group: int,
) -> tuple[Tensor, Tensor | None]:
    """One block over all running rows, a group of them at a time. Returns its output and u."""
    n = len(rows)
    if n <= group:
        return advance(block, rows, take_rows(skip, index, n) if skip is not None else None, cond, lanes, score)
    out, us = torch.empty_like(rows), []
    for part in _groups(n, group):
        here = None
        if skip is not None:
            here = skip[part] if index is None else skip.index_select(0, index[part])
        _, u = advance(block, rows[part], here, cond, lanes[part], score, out=out[part])
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


def _thresholds(rule: Rule, threshold: Tensor | None, t: Tensor) -> Tensor:
    if threshold is None:
        if rule.threshold is None and rule.asks(2):
            raise ValueError(f"{rule} has no threshold of its own; give one per lane")
        default = torch.nan if rule.threshold is None else float(rule.threshold)
        return torch.full(t.shape, default, device=t.device)
    if threshold.shape != t.shape:
        raise ValueError(f"threshold must hold one number per lane, {tuple(t.shape)}, got {tuple(threshold.shape)}")
    rule.check(threshold)
    return threshold


def _check_pairs(pairs: Tensor, threshold: Tensor) -> None:
    lanes = torch.arange(len(threshold), device=pairs.device)
    fits = pairs.dtype == torch.int64 and pairs.shape == lanes.shape
    if not fits or bool(((pairs < 0) | (pairs >= len(lanes))).any()) or not torch.equal(pairs[pairs], lanes):
        raise ValueError("pairs must be int64 [B], each lane's partner, whose partner is that lane in turn")
    if not torch.equal(threshold[pairs].nan_to_num(), threshold.nan_to_num()):
        raise ValueError("tied lanes leave together, so they need one threshold")


def group_size(backbone: Backbone) -> int:
    """Lanes per block call on a CPU."""
    return max(1, round(CPU_GROUP_TOKENS / backbone.tokens))


def _groups(n: int, group: int) -> Iterator[slice]:
    """n rows in as few groups as fit, of nearly equal size: a small last group would run at a worse rate."""
    parts = -(-n // group)
    bounds = [n * i // parts for i in range(parts + 1)]
    return (slice(a, b) for a, b in itertools.pairwise(bounds))
