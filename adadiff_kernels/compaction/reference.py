"""Which rows exit, and which remaining rows take their places: the formula, and its reference in PyTorch.

B lanes, n rows running. One permutation of the lanes: rows [0, n) run; rows [n, B) have exited and lie contiguous by
exit layer, the earliest last. An exit decides for every running row whether it exits; then

    the k-th exiting row below the new n and the k-th remaining row at or above it change places, for every k,

both counted upwards. These pairs are disjoint, and no smaller set of swaps keeps the running rows contiguous. Row order
of remaining lanes is unspecified; `row_to_lane` gives it. csrc/compaction.h is the same algorithm for CPU and GPU.
"""

import torch
from torch import Tensor

MAX_LANES = 1 << 15  # one block of 1024 GPU threads, 32 rows each


def exit_rows_reference(
    row_to_lane: Tensor,
    lane_to_row: Tensor,
    exit_layer: Tensor,
    state: Tensor,
    u: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    partner: Tensor | None,
    snapshot: Tensor | None,
    bound: int,
    layer: int,
) -> Tensor:
    """One exit, on any device and without host synchronisation.

    Changed in place: row_to_lane, lane_to_row, exit_layer: int32 [B]; state: int32 [3], the running rows, the rows
    moved so far and the tick (unchanged); snapshot: int32 [B] or None, receives lane_to_row after the exit.
    Read: u: float32 [bound] by row and threshold: float32 [B] by lane: u < threshold exits, and a threshold of +inf
    needs no u; mask: bool [bound] by row; partner: int32 [B], the lane with which each lane exits or stays.
    Criteria that are None are skipped; if all are, every running row exits. bound must be at least the running rows; if
    it is not, no row exits and state[0] becomes -1.
    Returns the moves, int32 [bound, 3]: an exiting row, its lane, and the row that takes its place (-1: none), in row
    order, then rows of -1.
    """
    r = torch.arange(bound, dtype=torch.int32, device=row_to_lane.device)
    n = state[:1]
    fault = (n < 0) | (n > bound)
    running = (r < n) & ~fault
    lanes = row_to_lane[:bound].long()
    exits = running
    if threshold is not None:
        limit = threshold[lanes]
        exits = exits & (limit.isposinf() if u is None else (u < limit) | limit.isposinf())
    if mask is not None:
        exits = exits & mask
    if partner is not None and bound:
        other = lane_to_row[partner[lanes].long()].long()  # the partner's row
        exits = exits & exits[other.clamp(max=bound - 1)] & (other < bound)
    kept = running & ~exits
    after = kept.sum(dtype=torch.int32)

    # Move k has the k-th exiting row and the k-th remaining row at or above `after`; others write to a spare element.
    moves = torch.full((bound + 1, 3), -1, dtype=torch.int32, device=row_to_lane.device)
    for column, rows, value in ((0, exits, r), (1, exits, row_to_lane[:bound]), (2, kept & (r >= after), r)):
        moves[:, column].scatter_(0, torch.where(rows, rows.cumsum(0) - 1, bound), value)
    moves = moves[:-1]
    exit_layer[lanes] = torch.where(exits, layer, exit_layer[lanes])
    order = torch.arange(bound + 1, device=row_to_lane.device)
    low, _, high = moves.long().where(moves[:, 2:] >= 0, bound).unbind(1)
    order[low], order[high] = high, low
    row_to_lane[:bound] = lanes[order[:bound]].int()
    lane_to_row[row_to_lane[:bound].long()] = r
    state[0] = after.where(~fault, -1)[0]
    state[1] += 2 * (moves[:, 2] >= 0).sum(dtype=torch.int32)
    if snapshot is not None:
        snapshot.copy_(lane_to_row)
    return moves
