"""Compaction without the host: who leaves is decided, counted and kept on the device.

The permutation, the pairing and the order of the tail are those of `ActiveSet` (compaction.py). But how many rows run
stands in device memory, and the host knows a bound of it: a number that is never too small, such as the last count it
has seen, since counts only fall. Nothing here waits for the device except `wait`, so a whole evaluation can be queued
ahead, or captured in a CUDA graph. On a CUDA device one kernel of one thread block does each step
(csrc/compact.cu); `leave_on_device_reference` is its contract, on any device.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from adadiff_kernels.extension import core as _C
from adadiff_kernels.extension import traced
from adadiff_kernels.launch import need
from adadiff_kernels.upload import captures

TICKS = 1 << 16  # are told apart, and as many layers


class CountSnapshot(NamedTuple):
    """What the host knows: the rows that ran after `layer`; layer 0 means that it has seen no leave yet."""

    layer: int
    count: int


class PinnedCount:
    """One number in host memory that the device writes when it gets there, and the host reads without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._word = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")

    def post(self, word: Tensor) -> None:
        """Queues the write. word: int64 [1] on the device."""
        self._word.copy_(word, non_blocking=True)

    def read(self) -> int:
        return int(self._word)


class DeviceSet:
    """The lanes that still run, and the row of every lane, on a device. Starts as the identity, everybody running.

    lane: int32 [B], row -> lane.            row: int32 [B], lane -> row (its inverse).
    exit_layer: int32 [B] by lane, 0 while the lane runs.
    count: int32 [1], n, rows running.       moved: int32 [1], rows that changed places so far, two a pair.
    tickets: int32 [B], zeros for the fused pass (`Score`).
    lanes: B.                                recorded: the last start went into a CUDA graph.

    The tensors belong to the set and keep their addresses, so captured graphs may hold them while the set lives; one
    that they hold is made beforehand, and no longer for use outside of them.
    A bound below the count is a fault of the caller that the host cannot see at once: nobody leaves then, nothing
    moves, `count` stays at -1 until the next start, and `seen` and `wait` raise RuntimeError.
    backend: "cuda", the kernel; "reference", PyTorch; None takes the kernel on a CUDA device where it was built.
    word: stands in for the host's word of the reference, to emulate a host that sees counts late.
    """

    def __init__(
        self,
        B: int,
        device: torch.device | str,
        *,
        backend: Literal["reference", "cuda"] | None = None,
        word: PinnedCount | None = None,
    ) -> None:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if backend not in ("reference", "cuda", None):
            raise ValueError(f"backend must be 'reference', 'cuda' or None, got {backend!r}")
        missing = kernel_missing(device)
        if backend == "cuda" and missing is not None:
            raise RuntimeError(f"backend='cuda': {missing}")
        self._kernel = backend != "reference" and missing is None and word is None
        if backend == "cuda" and word is not None:
            raise ValueError("word is for the reference; the kernel has one of its own")
        if captures(device):
            raise RuntimeError(
                "a DeviceSet is made before a CUDA graph is captured; run once, on the same stream, what is captured"
            )
        most = _C.max_lanes if self._kernel else torch.iinfo(torch.int32).max
        if not isinstance(B, int) or not 0 <= B <= most:
            raise ValueError(f"B must be an int from 0 to {most}, got {B!r}")
        self.device, self.lanes = device, B
        self.lane = torch.arange(B, dtype=torch.int32, device=device)
        self.row = self.lane.clone()
        self.exit_layer, self.tickets = torch.zeros_like(self.lane), torch.zeros_like(self.lane)
        self._state = torch.zeros(3, dtype=torch.int32, device=device)  # count, moved, tick
        self.count, self.moved = self._state[:1], self._state[1:2]
        self.count.fill_(B)
        self._word = word or (_C.MappedWord(device.index) if self._kernel else PinnedCount(device))
        self._address = self._word.device_address if self._kernel else None
        self._tick, self._layer, self.recorded = 0, 0, False

    def start(self) -> None:
        """Everybody runs again, in the order of the lanes: the next tick."""
        self._layer = 0
        unseen = traced(self.lane)
        begin = torch.ops.adadiff_kernels.device_start if unseen and self._kernel else start
        begin(self.lane, self.row, self.exit_layer, self._state, self._address)
        if not self._kernel:
            self._word.post(_packed(self._state, 0))
        if unseen or not captures(self.device):
            self.replayed()
        else:
            self.recorded = True

    def replayed(self) -> None:
        """To be called when a CUDA graph that holds a `start` is replayed: the host cannot see that."""
        self._tick, self.recorded = (self._tick + 1) % TICKS, False

    def leave(
        self,
        u: Tensor | None,
        threshold: Tensor,
        layer: int,
        *,
        bound: int,
        partner: Tensor | None = None,
        snapshot: Tensor | None = None,
    ) -> Tensor:
        """Lets the running rows with u < threshold leave at `layer`; NaN never leaves. Posts the new count.

        u: float32 [bound] by row, or None; rows from the count on do not matter. threshold: float32 [B] by lane;
        where it is infinite, the lane leaves whatever its u, even NaN or None.
        partner: int32 [B], the lane that a lane is tied to, itself if none: tied lanes leave together or not at all, so
        where both may. layer: 1 or more, later than the last; bound: no fewer than the rows that run, no more than B.
        snapshot: int32 [B], receives `row` as it is afterwards, to be kept beside a long skip that is written now.
        Returns what `settle_rows` does with every tensor by row, int32 [bound, 3]: a row that leaves, its lane, and the
        row that takes its place, -1 if none; one leaving row after another, upwards, then rows of -1.
        Raises ValueError, with nothing queued, for arguments of other kinds.
        """
        need("u", u, (bound,), self.lane, (torch.float32,))
        need("threshold", threshold, (self.lanes,), self.lane, (torch.float32,))
        return self._leave(layer, bound, u=u, threshold=threshold, partner=partner, snapshot=snapshot)

    def leave_where(
        self, mask: Tensor, layer: int, *, bound: int, partner: Tensor | None = None, snapshot: Tensor | None = None
    ) -> Tensor:
        """`leave` of the running rows with a true mask, bool [bound] by row."""
        need("mask", mask, (bound,), self.lane, (torch.bool,))
        return self._leave(layer, bound, mask=mask, partner=partner, snapshot=snapshot)

    def finish(self, layer: int, *, bound: int | None = None) -> Tensor:
        """Everybody still running leaves at `layer`, the last. bound and result as of `leave` (None: B); no row takes
        another's place."""
        return self._leave(layer, self.lanes if bound is None else bound)

    def seen(self) -> CountSnapshot:
        """The last count of this tick that the host can see, without waiting: an upper bound of the rows that run."""
        tick, layer, count = unpacked(self._word.read())
        if self.recorded or tick != self._tick or layer == 0:
            return CountSnapshot(0, self.lanes)
        if count < 0:
            raise RuntimeError(f"a leave at or before layer {layer} was given a bound below the rows that ran")
        return CountSnapshot(layer, count)

    def wait(self, layer: int) -> int:
        """The rows that run after `layer`, at which a leave has been queued: waits for the device, by polling.

        RuntimeError where it has not been, or is recorded in a graph that nobody has replayed since.
        """
        if self.recorded:
            raise RuntimeError(f"the leave at layer {layer} is recorded in a CUDA graph, which has not been replayed")
        if not self._kernel:
            count = int(self.count)
            if count < 0:
                raise RuntimeError(f"a leave at or before layer {layer} was given a bound below the rows that ran")
            return count
        if not self._word.poll(self._tick, layer, 1.0):
            torch.cuda.synchronize(self.device)  # raises what may have gone wrong there
            if self.seen().layer < layer:
                raise RuntimeError(f"no leave at layer {layer} has been queued")
        return self.seen().count

    def snapshot(self) -> Tensor:
        """int32 [B]: the row of each lane now, to be kept beside a long skip that is written now."""
        return self.row.clone()

    def locate(self, snapshot: Tensor, bound: int) -> Tensor:
        """int32 [bound]: the row in which each row lay at the time of `snapshot`.

        Rows beyond the count have one too, and it is below the bound of that time: bounds of a tick never grow.
        """
        need("snapshot", snapshot, (self.lanes,), self.lane, (torch.int32,))
        return snapshot.index_select(0, self.lane[: self._bound(bound)])

    def _leave(
        self,
        layer: int,
        bound: int,
        u: Tensor | None = None,
        threshold: Tensor | None = None,
        mask: Tensor | None = None,
        partner: Tensor | None = None,
        snapshot: Tensor | None = None,
    ) -> Tensor:
        need("partner", partner, (self.lanes,), self.lane, (torch.int32,))
        need("snapshot", snapshot, (self.lanes,), self.lane, (torch.int32,))
        bound = self._bound(bound)
        if not isinstance(layer, int) or not self._layer < layer < TICKS:
            raise ValueError(f"layer must be an int after {self._layer}, the last, and below {TICKS}, got {layer!r}")
        self._layer = layer
        step = torch.ops.adadiff_kernels.device_leave if self._kernel and traced(self.lane) else leave
        given = (u, threshold, mask, partner, snapshot, bound, layer)
        moves = step(self.lane, self.row, self.exit_layer, self._state, *given, self._address)
        if not self._kernel:
            self._word.post(_packed(self._state, layer))
        return moves

    def _bound(self, bound: int) -> int:
        if not isinstance(bound, int) or not 0 <= bound <= self.lanes:
            raise ValueError(f"bound must be an int from 0 to {self.lanes}, the lanes, got {bound!r}")
        return bound


def start(lane: Tensor, row: Tensor, exit_layer: Tensor, state: Tensor, word: int | None) -> None:
    """`DeviceSet.start` on its tensors. word: the address at which the kernel posts; None: PyTorch, posting nothing."""
    if word is not None:
        _C.start(*_addresses(lane, row, exit_layer, state), lane.shape[0], word, *_place(lane))
        return
    torch.arange(lane.shape[0], dtype=torch.int32, out=lane)
    row.copy_(lane)
    exit_layer.zero_()
    state[:2] = 0
    state[0] += lane.shape[0]
    state[2] += 1


def leave(
    lane: Tensor,
    row: Tensor,
    exit_layer: Tensor,
    state: Tensor,
    u: Tensor | None,
    threshold: Tensor | None,
    mask: Tensor | None,
    partner: Tensor | None,
    snapshot: Tensor | None,
    bound: int,
    layer: int,
    word: int | None,
) -> Tensor:
    """As `leave_on_device_reference`, by the kernel if there is a word (see `start`)."""
    inputs = (u, threshold, mask, partner)
    if word is None:
        return leave_on_device_reference(lane, row, exit_layer, state, *inputs, snapshot, bound, layer)
    moves = lane.new_empty(bound, 3)
    addresses = _addresses(lane, row, exit_layer, state, *inputs, moves, snapshot)
    _C.compact(*addresses, bound, lane.shape[0], layer, word, *_place(lane))
    return moves


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def leave_on_device_reference(
    lane: Tensor,
    row: Tensor,
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
    """One `leave` of a `DeviceSet` in PyTorch, on any device, without waiting for it.

    Changes lane, row, exit_layer, snapshot (int32 [B]) and state (int32 [3]: count, moved, tick) in place. Rows leave
    by u < threshold, by mask, or all. Returns the moves.
    """
    r = torch.arange(bound, dtype=torch.int32, device=lane.device)
    n = state[:1]
    fault = (n < 0) | (n > bound)
    running = (r < n) & ~fault
    lanes = lane[:bound].long()
    goes = running
    if threshold is not None:
        own = threshold[lanes]
        goes = goes & (own.isposinf() if u is None else (u < own) | own.isposinf())
    if mask is not None:
        goes = goes & mask
    if partner is not None and bound:
        other = row[partner[lanes].long()].long()  # where the partner lies
        goes = goes & goes[other.clamp(max=bound - 1)] & (other < bound)
    kept = running & ~goes
    after = kept.sum(dtype=torch.int32)

    # Move k is of the k-th row to go, and of the k-th kept one from `after` on; the others share a spare place.
    moves = torch.full((bound + 1, 3), -1, dtype=torch.int32, device=lane.device)
    for column, rows, value in ((0, goes, r), (1, goes, lane[:bound]), (2, kept & (r >= after), r)):
        moves[:, column].scatter_(0, torch.where(rows, rows.cumsum(0) - 1, bound), value)
    moves = moves[:-1]
    exit_layer[lanes] = torch.where(goes, layer, exit_layer[lanes])
    order = torch.arange(bound + 1, device=lane.device)
    low, _, high = moves.long().where(moves[:, 2:] >= 0, bound).unbind(1)
    order[low], order[high] = high, low
    lane[:bound] = lanes[order[:bound]].int()
    row[lane[:bound].long()] = r
    state[0] = after.where(~fault, -1)[0]
    state[1] += 2 * (moves[:, 2] >= 0).sum(dtype=torch.int32)
    if snapshot is not None:
        snapshot.copy_(row)
    return moves


def kernel_missing(device: torch.device) -> str | None:
    """Why the kernel cannot serve on `device`, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device}"
    if _C is None or not _C.cuda_built:
        return "the extension was built without CUDA; install nvcc and install again with ADADIFF_CUDA=1"
    return None


def unpacked(word: int) -> tuple[int, int, int]:
    """(tick, layer, count) of the host's word: 16, 16 and 32 bits, from the highest."""
    count = word & 0xFFFFFFFF
    return word >> 48 & 0xFFFF, word >> 32 & 0xFFFF, count - (count >> 31 << 32)


def _packed(state: Tensor, layer: int) -> Tensor:
    """int64 [1]: the word of a state as of `layer`, made on the device."""
    count, _, tick = state.long().split(1)
    return (tick % TICKS << 48) | layer << 32 | count & 0xFFFFFFFF
