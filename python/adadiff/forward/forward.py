"""One evaluation of a network with exits: block, score, decide, leave, head."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adadiff_kernels import ActiveSet, settle_rows, take_rows, upload

from ..models.interface import Backbone, Block, Conditioning
from ..policies.exit_policies import Rule
from ..uem import Exits
from .blocks import ForwardOutput, advance, block_range, compiled_advance
from .counts import Counts, Sync, check_rules, counts_from
from .decision import Decision
from .device import evaluate_on_device
from .lane_by_lane import lane_by_lane

# On a CPU a block runs over groups of lanes with about this many tokens: enough for products at their full rate, few
# enough that what one writes is still in the cache when the next reads it. Rows do not see each other inside a block.
CPU_GROUP_TOKENS = 2048


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
    counts: Counts | str | None = None,
    compiled: bool = False,
    nvtx: bool = False,
) -> ForwardOutput:
    """The network's prediction for B lanes, each at its own timestep, each leaving when its rule says so.

    x: [B, C, H, W]; t: float [B], the network's time; context: labels int64 [B], text [B, N, E] or None.
    What comes by lane may lie on the CPU or on x's device; results lie there. Values on a GPU are not checked.
    rule: one for all, or several with which: int64 [B], the index of each lane's own.
    threshold: float [B], overrides the rule's; pairs: int64 [B], each lane's tied partner (itself if it has none),
    tied lanes leave together by the larger u.
    batch_invariant: every product is computed lane by lane, on a CPU each on one thread, so that a lane's prediction,
    score and exit are the same bits in any batch (on one machine).
    group: lanes per block call (default: `group_size` on a CPU, else all); without effect if batch_invariant.
    counts: how the host learns how many rows still run: "sync", "sync:4", "lagged", "lagged:2", or a `Counts`. All give
    the same exits, and images up to rounding. Default: "sync" on a GPU; on a CPU, and if batch_invariant, the host
    decides and knows. nvtx: name the blocks for NVIDIA's profilers.
    compiled: blocks go through torch.compile, for any number of rows; the first evaluations take seconds to minutes.
    Raises ValueError for inputs that require grad, thresholds the rule refuses, pairs that are none or whose two lanes
    have two thresholds, a rule that needs missing exits, or compiled with batch_invariant.
    """
    B, L, device = len(x), len(backbone.blocks), x.device
    if x.requires_grad:
        raise ValueError("evaluate is for inference; x must not require grad")
    decision = Decision(rule if isinstance(rule, Sequence) else (rule,), which, L, t, threshold)
    if exits is None and decision.asked:
        raise ValueError("this network has no exits; only the rule 'full' can run it")
    if group is not None and group < 1:
        raise ValueError(f"group must be at least 1 lane, got {group}")
    if pairs is not None:
        _check_pairs(pairs, decision.threshold, which)
    if nvtx and not torch.backends.cuda.is_built():
        raise ValueError("nvtx names blocks for NVIDIA's profilers, which takes a PyTorch built for CUDA")
    check_compiled(compiled, batch_invariant)
    counts = counts_from(counts, batch_invariant)
    _check_counts(counts, decision, group)
    if counts is None and device.type != "cpu" and not batch_invariant and group is None:
        counts = Sync()
    t, pairs = upload(t, device), None if pairs is None else upload(pairs, device)
    decision.to(device)
    if counts is not None:
        given = {"counts": counts, "record": record, "compiled": compiled, "nvtx": nvtx}
        partner = None if pairs is None else pairs.int()
        return evaluate_on_device(backbone, exits, decision, x, t, context, partner=partner, **given)
    if batch_invariant and B:
        context = None if context is None else upload(context, device)
        rows, cohorts = _begin_each(backbone, exits, decision, x, t, context)
    else:
        rows, cohorts = _begin(backbone, exits, decision, x, t, context)
    active, saved, rows_of_all = ActiveSet(B), None, rows
    scores = torch.full((L, B), torch.nan, device=x.device) if record else None
    needed = {block.skip_from for block in backbone.blocks} - {None}
    skips: dict[int, tuple[Tensor, Tensor]] = {}
    left: list[tuple[int, Tensor]] = []
    if group is None:
        group = group_size(backbone) if device.type == "cpu" else max(1, B)
    costs = [block.macs(backbone.tokens) for block in backbone.blocks]
    macs, ran = 0, []
    run = compiled_advance() if compiled else advance

    for layer, block in enumerate(backbone.blocks, start=1):
        lanes = upload(active.running, device)  # the plan is the host's
        n = active.count
        ran.append(n)
        scored = layer in decision.scored
        skip, index = None, None
        if block.skip_from is not None:
            skip, snapshot = skips.pop(block.skip_from)
            index = active.locate(snapshot)
            index = None if index is None else upload(index, device)
        layer_exits = exits if scored else None
        with block_range(layer, nvtx):
            if batch_invariant:
                rows, u = _run_each(block, rows, skip, index, cohorts, lanes, layer_exits, layer)
            else:
                rows, u = _run_block(run, block, rows, skip, index, cohorts[0], lanes, layer_exits, layer, group)
        macs += n * costs[layer - 1]
        if scored:
            macs += n * exits.macs(backbone.tokens - exits.num_prefix_tokens)
            if scores is not None:
                scores[layer - 1, lanes] = u
            if pairs is not None:
                by_lane = torch.empty(B, device=u.device).index_copy_(0, lanes.long(), u)
                u = torch.maximum(u, by_lane[pairs[lanes]])
        if layer in decision.asked:
            moves = active.exit_rows_where(decision.leave(u, layer, lanes).to("cpu"), layer)
            if len(moves):
                decision.moved()
                saved = rows.new_empty(rows_of_all.shape) if saved is None else saved
                settle_rows(upload(moves, device), rows, saved)
                own = upload(active.row_to_lane[active.count : n], device).long()
                left.append((layer, saved[:, backbone.num_prefix_tokens :].index_select(0, own)))
                rows = rows[: active.count]
                if not active.count:
                    break
        if layer - 1 in needed:
            skips[layer - 1] = (rows, active.snapshot())
    skips.clear()
    if exits is not None:
        macs += (B - active.count) * exits.head_macs(backbone.tokens - backbone.num_prefix_tokens)
    if active.count:
        left.append((L, rows[:, backbone.num_prefix_tokens :]))
        active.finish(L)
    lane = upload(active.row_to_lane, device)
    stem, head = backbone.stem_and_head_macs()
    ends = B * (stem + head)
    full = B * sum(costs) + ends
    if not left:
        prediction = rows.new_empty(0, x.shape[1] * (2 if backbone.learned_variance else 1), *x.shape[2:])
    elif batch_invariant:
        prediction = _heads_each(backbone, exits, left, cohorts, lane)
    else:
        prediction = _heads(backbone, exits, left, cohorts[0].cond, lane)
    eps, variance = prediction.chunk(2, dim=1) if backbone.learned_variance else (prediction, None)
    exit_layer = upload(active.exit_layer, device)
    ran += [0] * (L - len(ran))
    return ForwardOutput(eps, exit_layer, macs + ends, full, active.moved, scores, tuple(ran), variance)


def check_compiled(compiled: bool, batch_invariant: bool) -> None:
    """Raises ValueError where both are asked for."""
    if compiled and batch_invariant:
        raise ValueError("batch_invariant runs lane by lane, which is not compiled; leave one of the two out")


def _begin(
    backbone: Backbone, exits: Exits | None, decision: Decision, x: Tensor, t: Tensor, context: Tensor | None
) -> tuple[Tensor, list[_Cohort]]:
    rows, cond = backbone.embed(x, t, context)
    return rows, [_Cohort(cond, exits.offsets(cond.time, t) if decision.scored else None)]


def _run_block(
    run: Callable[..., tuple[Tensor, Tensor | None]],
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
    """One block over all running rows, a group of them at a time. run: `advance`, compiled or not. Returns its output
    and u (None without exits)."""
    n = len(rows)
    score = exits.score(layer, cohort.offsets) if exits is not None else None
    if n <= group:
        here = take_rows(skip, index, n) if skip is not None else None
        return run(block, rows, here, cohort.cond, lanes, score)
    out, us = torch.empty_like(rows), []
    for part in _groups(n, group):
        here = None
        if skip is not None:
            here = skip[part] if index is None else skip.index_select(0, index[part])
        _, u = run(block, rows[part], here, cohort.cond, lanes[part], score, out=out[part])
        us.append(u)
    return out, torch.cat(us) if score is not None else None


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

    def one(lane: int) -> tuple[Tensor, list[_Cohort]]:
        own = (v[lane : lane + 1].clone() if v is not None else None for v in (x, t, context))
        return _begin(backbone, exits, decision, *own)

    begun = lane_by_lane(one, len(x), x.device)
    return torch.cat([rows for rows, _ in begun]), [cohort for _, (cohort,) in begun]


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
    n, out = len(rows), torch.empty_like(rows)
    only = torch.zeros(1, dtype=torch.int32, device=rows.device)  # the one lane of a cohort
    lanes, places = lanes.tolist(), range(n) if index is None else index.tolist()

    def one(row: int) -> Tensor | None:
        own, place = cohorts[lanes[row]], places[row]
        here = None if skip is None else skip[place : place + 1].clone()
        score = exits.score(layer, own.offsets) if exits is not None else None
        y, u = advance(block, rows[row : row + 1].clone(), here, own.cond, only, score)
        out[row] = y[0]
        return u

    us = lane_by_lane(one, n, rows.device)
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
    rows = [(layer, row) for layer, rows in left[::-1] for row in rows.split(1)]
    lanes = lane.tolist()

    def one(i: int) -> Tensor:
        layer, row = rows[i]
        head = backbone.head if exits is None else exits.head(backbone, layer)
        return head(row.clone(), cohorts[lanes[i]].cond, only)

    eps = torch.cat(lane_by_lane(one, len(rows), lane.device))
    return torch.empty_like(eps).index_copy_(0, lane.long(), eps)


def _check_counts(counts: Counts | None, decision: Decision, group: int | None) -> None:
    if counts is not None and group is not None:
        raise ValueError("groups are for a host that knows the count; leave counts or group out")
    check_rules(counts, decision.by_lane)


def _check_pairs(pairs: Tensor, threshold: Tensor, which: Tensor | None) -> None:
    if not (pairs.is_cpu and threshold.is_cpu and (which is None or which.is_cpu)):
        return
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
