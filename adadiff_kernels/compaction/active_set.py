"""The running lanes, tracked on the host. Formula and reference: reference.py."""

import torch
from torch import Tensor

from adadiff_kernels import extension
from adadiff_kernels.compaction.reference import MAX_LANES, exit_rows_reference


class ActiveSet:
    """The running lanes, and the row of every lane. Starts as the identity, with all lanes running.

    row_to_lane: int32 [B].      lane_to_row: int32 [B], its inverse.
    exit_layer: int32 [B] by lane, 0 while the lane runs.
    num_lanes: B.      count: n, the running rows.      moved: rows swapped so far, two per swap.

    The tensors are on the CPU. Only the methods write to them.
    """

    __slots__ = (
        "_moves",
        "_no_moves",
        "_snapshot",
        "count",
        "exit_layer",
        "lane_to_row",
        "moved",
        "num_lanes",
        "row_to_lane",
    )

    def __init__(self, num_lanes: int) -> None:
        if not isinstance(num_lanes, int) or not 0 <= num_lanes <= MAX_LANES:
            raise ValueError(f"num_lanes must be an int from 0 to {MAX_LANES}, got {num_lanes!r}")
        # The core reads host memory, whatever torch's default device is.
        self.row_to_lane = torch.arange(num_lanes, dtype=torch.int32, device="cpu")
        self.lane_to_row = self.row_to_lane.clone()
        self.exit_layer = torch.zeros_like(self.row_to_lane)
        self.num_lanes = self.count = num_lanes
        self.moved = 0
        self._snapshot: Tensor | None = None
        self._moves = self.row_to_lane.new_empty(num_lanes, 3)
        self._no_moves = self._moves[:0]

    @property
    def running(self) -> Tensor:
        """int32 [n]: the lane in each running row. A view, valid until the next exit."""
        return self.row_to_lane[: self.count]

    def exit_rows(self, u: Tensor | None, threshold: Tensor, layer: int, *, partner: Tensor | None = None) -> Tensor:
        """Lets the running rows with u < threshold exit after `layer`. NaN never exits.

        u: float32 [n] by row, or None. threshold: float32 [B] by lane; +inf lets the lane exit whatever its u, even NaN
        or None. partner: int32 [B], the partner of each lane (itself if none): partners exit only if both may.
        layer: 1 or more, and no earlier than the last after which a lane exited.
        Returns the moves for `settle_rows`, int32 [k, 3], one for each of k exiting rows: the row, its lane, and the
        row that takes its place (-1: none).
        Raises ValueError, with nothing changed, for arguments of another dtype, shape or device.
        """
        if u is not None and not (_is(u, torch.float32, self.count) and u.is_contiguous()):
            raise ValueError(f"u must be float32 [{self.count}], contiguous, on the CPU, got {_describe(u)}")
        if not (_is(threshold, torch.float32, self.num_lanes) and threshold.is_contiguous()):
            raise ValueError(
                f"threshold must be float32 [{self.num_lanes}], contiguous, on the CPU, got {_describe(threshold)}"
            )
        return self._exit(layer, u, threshold, None, partner)

    def exit_rows_where(self, mask: Tensor, layer: int, *, partner: Tensor | None = None) -> Tensor:
        """As `exit_rows`, for the running rows whose mask is true. mask: bool [n] by row."""
        if not _is(mask, torch.bool, self.count):
            raise ValueError(f"mask must be bool [{self.count}] on the CPU, got {_describe(mask)}")
        return self._exit(layer, None, None, mask.contiguous(), partner)

    def finish(self, layer: int) -> None:
        """All lanes still running exit after `layer`, the last; no row moves."""
        _check_layer(layer, self.row_to_lane, self.exit_layer, self.count)
        if self.count == self.num_lanes:
            self.exit_layer.fill_(layer)
        else:
            self.exit_layer[self.running.long()] = layer
        self.count = 0

    def _exit(
        self, layer: int, u: Tensor | None, threshold: Tensor | None, mask: Tensor | None, partner: Tensor | None
    ) -> Tensor:
        if type(layer) is not int:
            raise ValueError(f"layer must be an int, got {layer!r}")
        if partner is not None and not (_is(partner, torch.int32, self.num_lanes) and partner.is_contiguous()):
            raise ValueError(
                f"partner must be int32 [{self.num_lanes}], contiguous, on the CPU, got {_describe(partner)}"
            )
        n, core, test = self.count, extension.core, (u, threshold, mask, partner)
        tensors = self.row_to_lane, self.lane_to_row, self.exit_layer
        if core is None:
            _check_state(*tensors, n, layer)
            state = torch.tensor([n, 0, 0], dtype=torch.int32, device="cpu")
            self._moves = exit_rows_reference(*tensors, state, *test, None, n, layer)
            self.count = int(state[0])
        else:
            pointers = [0 if value is None else value.data_ptr() for value in (*test, *tensors, self._moves)]
            self.count = core.exit_rows(*pointers, n, self.num_lanes, layer)
        if self.count == n:
            return self._no_moves
        moves = self._moves[: n - self.count].clone()
        if moved := 2 * int((moves[:, 2] >= 0).sum()):
            self.moved += moved
            self._snapshot = None
        return moves

    def snapshot(self) -> Tensor:
        """int32 [B]: the present row of each lane, to be kept with a long skip that is written now.

        Read-only: calls between which no row moved return the same tensor.
        """
        if self._snapshot is None:
            self._snapshot = self.lane_to_row.clone()
        return self._snapshot

    def locate(self, snapshot: Tensor) -> Tensor | None:
        """int64 [n]: the row that each running row had at the time of `snapshot`; None if that is 0..n-1, so that no
        gather is needed. Raises ValueError for a snapshot of another size or device."""
        if snapshot is self._snapshot:
            return None
        like = self.lane_to_row
        if snapshot.dtype != torch.int32 or snapshot.shape != like.shape or snapshot.device != like.device:
            raise ValueError(f"snapshot must be int32 [{self.num_lanes}] of this set, got {_describe(snapshot)}")
        index = snapshot.index_select(0, self.running).long()
        return None if torch.equal(index, torch.arange(self.count, device=index.device)) else index


def take_rows(rows: Tensor, index: Tensor | None, n: int) -> Tensor:
    """[n, ...]: the rows at `index`, as returned by `ActiveSet.locate`, or a view of the first n where that is None.

    index: int64 [n] or None. Raises ValueError for another dtype, shape or device, or for fewer than n rows.
    """
    if index is None:
        if not 0 <= n <= len(rows):
            raise ValueError(f"n must lie in [0, {len(rows)}], the rows given, got {n}")
        return rows[:n]
    if index.dtype != torch.int64 or index.shape != (n,) or index.device != rows.device:
        raise ValueError(f"index must be int64 [{n}] on {rows.device}, got {_describe(index)}")
    return rows.index_select(0, index)


def _check_state(row_to_lane: Tensor, lane_to_row: Tensor, exit_layer: Tensor, n: int, layer: int) -> None:
    """The checks that the C++ core makes."""
    _check_layer(layer, row_to_lane, exit_layer, n)
    running = row_to_lane[:n].long()
    if not torch.equal(lane_to_row[running], torch.arange(n, dtype=torch.int32, device=running.device)):
        raise ValueError("row_to_lane and lane_to_row are not each other's inverse")
    if exit_layer[running].any():
        raise ValueError("a running lane has exited already")


def _check_layer(layer: int, row_to_lane: Tensor, exit_layer: Tensor, n: int) -> None:
    if not isinstance(layer, int) or layer < 1:
        raise ValueError(f"layer must be an int of 1 or more, got {layer!r}")
    if n < len(row_to_lane) and (last := int(exit_layer[row_to_lane[n]])) > layer:
        raise ValueError(f"layer must be {last} or more, after which lanes have exited already, got {layer}")


def _is(tensor: Tensor, dtype: torch.dtype, length: int) -> bool:
    return tensor.dtype == dtype and tensor.shape == (length,) and tensor.is_cpu


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
