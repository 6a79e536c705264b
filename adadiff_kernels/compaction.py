"""Compaction: who still runs, and where each lane lies in memory.

B lanes, n rows running. `ActiveSet` is one permutation of the lanes: rows [0, n) run; rows [n, B) have
left and lie contiguous by exit layer, the earliest last. When lanes leave, the k-th leaving row below the
new n changes places with the k-th kept row at or above it, both counted upwards: disjoint pairs, in place,
and no smaller set of swaps does it. Which row a kept lane gets is no promise; its lane is.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adadiff_kernels.extension import core as _C


@dataclass(frozen=True, slots=True)
class Swaps:
    """What one `leave` asks of every tensor that is held by row.

    pairs: int32 [k, 2], rows to exchange: (a row below `after`, a row in [after, before)).
    before, after: rows that ran before and run now.
    """

    pairs: Tensor
    before: int
    after: int

    def __post_init__(self) -> None:
        if self.pairs.dtype != torch.int32 or self.pairs.dim() != 2 or self.pairs.shape[1] != 2:
            raise ValueError(f"pairs must be int32 [k, 2], got {_describe(self.pairs)}")
        if not self.pairs.is_contiguous():
            raise ValueError(f"pairs must be contiguous, got strides {self.pairs.stride()}")
        if not 0 <= self.after <= self.before:
            raise ValueError(f"need 0 <= after <= before, got after={self.after}, before={self.before}")


class ActiveSet:
    """The lanes that still run, and the row of every lane. Starts as the identity, everybody running.

    lane: int32 [B], row -> lane.            row: int32 [B], lane -> row (its inverse).
    exit_layer: int32 [B] by lane, 0 while the lane runs.
    lanes: B.    count: n, rows running.    moved: rows moved by swaps so far, two a pair.

    The tensors live on the CPU and belong to the set: read them, and leave writing to its methods.
    """

    __slots__ = ("_no_pairs", "_pairs", "_snapshot", "count", "exit_layer", "lane", "lanes", "moved", "row")

    def __init__(self, lanes: int) -> None:
        if not isinstance(lanes, int) or lanes < 0:
            raise ValueError(f"lanes must be an int of 0 or more, got {lanes!r}")
        # The core reads host memory, whatever torch's default device is.
        self.lane = torch.arange(lanes, dtype=torch.int32, device="cpu")
        self.row = self.lane.clone()
        self.exit_layer = torch.zeros_like(self.lane)
        self.lanes = self.count = lanes
        self.moved = 0
        self._pairs = self.lane.new_zeros(lanes // 2, 2)
        self._no_pairs = self._pairs[:0]
        self._snapshot: Tensor | None = None

    @property
    def bound(self) -> int:
        """Host-side upper bound of the rows that run; on the CPU the count itself."""
        return self.count

    @property
    def running(self) -> Tensor:
        """int32 [n]: the lane in each running row. A view, valid until the next leave."""
        return self.lane[: self.count]

    def leave(self, mask: Tensor, layer: int) -> Swaps:
        """Lets the running rows with a true mask leave at `layer`, and plans the moves this takes.

        mask: bool [n] by row. layer: 1 or more, and no earlier than that of lanes which have left.
        Raises ValueError, with nothing changed, for a mask or layer of another kind.
        """
        n = self.count
        if mask.dtype != torch.bool or mask.shape != (n,) or mask.device != self.lane.device:
            raise ValueError(f"mask must be bool [{n}] on {self.lane.device}, got {_describe(mask)}")
        if not isinstance(layer, int):
            raise ValueError(f"layer must be an int, got {layer!r}")
        if _C is None:
            after, pairs = leave_reference(mask, self.lane, self.row, self.exit_layer, n, layer)
        else:
            mask = mask.contiguous()
            after, k = _C.leave(
                *(mask.data_ptr(), self.lane.data_ptr(), self.row.data_ptr(), self.exit_layer.data_ptr()),
                *(self._pairs.data_ptr(), n, self.lanes, layer),
            )
            pairs = self._pairs[:k].clone() if k else self._no_pairs
        if len(pairs):
            self.moved += pairs.numel()
            self._snapshot = None
        self.count = after
        return Swaps(pairs, n, after)

    def finish(self, layer: int) -> None:
        """Everybody still running leaves at `layer`, the last; no row moves."""
        _check_layer(layer, self.lane, self.exit_layer, self.count)
        self.exit_layer[self.running.long()] = layer
        self.count = 0

    def snapshot(self) -> Tensor:
        """int32 [B]: the row of each lane now, to be kept beside a long skip that is written now.

        Snapshots between which no row moved are one tensor: read it only.
        """
        if self._snapshot is None:
            self._snapshot = self.row.clone()
        return self._snapshot

    def locate(self, snapshot: Tensor) -> Tensor | None:
        """int64 [n]: the row in which each running row lay at the time of `snapshot`.

        None if that is exactly 0..n-1: there is nothing to gather.
        """
        if snapshot is self._snapshot:
            return None
        if snapshot.dtype != torch.int32 or snapshot.shape != (self.lanes,) or snapshot.device != self.row.device:
            raise ValueError(f"snapshot must be int32 [{self.lanes}] of this set, got {_describe(snapshot)}")
        index = snapshot.index_select(0, self.running).long()
        return None if torch.equal(index, torch.arange(self.count, device=index.device)) else index


def leave_reference(
    mask: Tensor, lane: Tensor, row: Tensor, exit_layer: Tensor, n: int, layer: int
) -> tuple[int, Tensor]:
    """`ActiveSet.leave` in PyTorch: changes lane, row and exit_layer (int32 [B]) in place.

    mask: bool [n] by row. Returns the rows that still run and the pairs, int32 [k, 2]; the result is
    the compiled core's, element for element. Raises ValueError where it does, with nothing changed.
    """
    _check_layer(layer, lane, exit_layer, n)
    running = lane[:n].long()
    if not torch.equal(row[running], torch.arange(n, dtype=row.dtype, device=row.device)):
        raise ValueError("lane and row are not each other's inverse")
    if exit_layer[running].any():
        raise ValueError("a running lane has already left")
    leaving = mask.nonzero().flatten()
    after = n - len(leaving)
    exit_layer[running[leaving]] = layer
    kept = (~mask).nonzero().flatten()
    pairs = torch.stack([leaving[leaving < after], kept[kept >= after]], dim=1)  # [k, 2]
    lane[pairs.flatten()] = running[pairs.flip(1).flatten()].int()
    row[lane[:n].long()] = torch.arange(n, dtype=row.dtype, device=row.device)
    return after, pairs.int()


def swap_rows_core(swaps: Swaps, *rows: Tensor) -> None:
    """`swap_rows` by the compiled core."""
    for tensor in rows:
        size = tensor.element_size()
        _C.swap_rows(
            *(tensor.data_ptr(), math.prod(tensor.shape[1:]) * size, tensor.stride(0) * size),
            *(swaps.before, swaps.pairs.data_ptr(), len(swaps.pairs)),
        )


def swap_rows_reference(swaps: Swaps, *rows: Tensor) -> None:
    """`swap_rows` in PyTorch. Pairs are checked where they lie on the CPU; elsewhere that would wait."""
    here = swaps.pairs.flatten().long()
    there = swaps.pairs.flip(1).flatten().long()
    if (
        swaps.pairs.is_cpu
        and len(here)
        and (here.min() < 0 or here.max() >= swaps.before or len(here.unique()) < len(here))
    ):
        raise ValueError(f"pairs must name rows of [0, {swaps.before}), each at most once")
    for tensor in rows:
        tensor.index_copy_(0, here, tensor.index_select(0, there))


def core_swaps(swaps: Swaps) -> bool:
    """Whether the compiled core can reach the pairs."""
    return swaps.pairs.is_cpu and _C is not None


def take_rows(rows: Tensor, index: Tensor | None, n: int) -> Tensor:
    """[n, ...]: the rows that `ActiveSet.locate` names; a view of the first n where it names none.

    index: int64 [n] or None. Raises ValueError for an index of another kind or too few rows.
    """
    if index is None:
        if not 0 <= n <= len(rows):
            raise ValueError(f"n must lie in [0, {len(rows)}], the rows given, got {n}")
        return rows[:n]
    if index.dtype != torch.int64 or index.shape != (n,) or index.device != rows.device:
        raise ValueError(f"index must be int64 [{n}] on {rows.device}, got {_describe(index)}")
    return rows.index_select(0, index)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _check_layer(layer: int, lane: Tensor, exit_layer: Tensor, n: int) -> None:
    if not isinstance(layer, int) or layer < 1:
        raise ValueError(f"layer must be an int of 1 or more, got {layer!r}")
    if n < len(lane) and (last := int(exit_layer[lane[n]])) > layer:
        raise ValueError(f"layer must be {last} or more, where lanes have left already, got {layer}")


def check_rows(swaps: Swaps, *rows: Tensor) -> None:
    """ValueError unless every tensor has rows that can be exchanged in place."""
    for position, tensor in enumerate(rows):
        _check_rows(tensor, swaps, f"rows[{position}]")


def _check_rows(tensor: Tensor, swaps: Swaps, name: str) -> None:
    if tensor.dim() < 1 or tensor.shape[0] < swaps.before:
        raise ValueError(f"{name} must have {swaps.before} rows or more, got {_describe(tensor)}")
    if tensor.device != swaps.pairs.device:
        raise ValueError(f"{name} must be on {swaps.pairs.device} like the swaps, got {_describe(tensor)}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad: rows move in place, unseen by autograd")
    if tensor.shape[0] > 1 and not (tensor[0].is_contiguous() and tensor.stride(0) >= tensor[0].numel()):
        raise ValueError(f"{name} must have contiguous rows that do not overlap, got strides {tensor.stride()}")
