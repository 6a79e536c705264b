"""The running lanes, tracked on a device. Formula and reference: reference.py; GPU kernel: csrc/compaction.cu.

The device decides which lanes exit and holds the count of running rows. The host knows only an upper bound, such as the
last count it has read, since counts only fall. Only `wait` synchronises, so a whole forward pass can be queued ahead or
captured in a CUDA graph.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from adadiff_kernels import extension
from adadiff_kernels.compaction.reference import MAX_LANES, exit_rows_reference
from adadiff_kernels.extension import traced
from adadiff_kernels.launch import need
from adadiff_kernels.library import register
from adadiff_kernels.upload import captures

TICKS = 1 << 16  # tick numbers wrap here; layer numbers are smaller


class CountSnapshot(NamedTuple):
    """The last count that the host has read: `count` rows run after `layer`; layer 0 before the first exit."""

    layer: int
    count: int


class PinnedCount:
    """One integer in pinned host memory: the device writes it in stream order, the host reads it without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._word = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")

    def post(self, word: Tensor) -> None:
        """Queues the write. word: int64 [1] on the device."""
        self._word.copy_(word, non_blocking=True)

    def read(self) -> int:
        return int(self._word)


class DeviceSet:
    """The running lanes, and the row of every lane, on a device. Starts as the identity, with all lanes running.

    row_to_lane: int32 [B].      lane_to_row: int32 [B], its inverse.
    exit_layer: int32 [B] by lane, 0 while the lane runs.
    count: int32 [1], n, the running rows.      moved: int32 [1], rows swapped so far, two per swap.
    tickets: int32 [B], zeros for the fused pass (`Score`).
    num_lanes: B.      recorded: whether the last start was captured in a CUDA graph.

    The tensors keep their addresses, so captured graphs may use them while the set lives. Create a set that a graph
    uses before the capture, and do not use it eagerly afterwards.
    A bound below the count is a caller's error that the host cannot see at once: then no lane exits, no row moves,
    `count` stays -1 until the next start, and `seen` and `wait` raise RuntimeError.
    backend: "cuda", the kernel; "reference", PyTorch; None: the kernel on a CUDA device, if it was built.
    word: replaces the counter of the reference on the host, to emulate a host that reads counts late.
    Raises ValueError for num_lanes outside [0, MAX_LANES] or an unknown backend; RuntimeError where backend "cuda"
    cannot serve, and during CUDA-graph capture.
    """

    def __init__(
        self,
        num_lanes: int,
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
            raise ValueError("word is for the reference; the kernel has its own")
        if captures(device):
            raise RuntimeError(
                "a DeviceSet cannot be made while a CUDA graph is captured; run the same once before, on this stream"
            )
        if not isinstance(num_lanes, int) or not 0 <= num_lanes <= MAX_LANES:
            raise ValueError(f"num_lanes must be an int from 0 to {MAX_LANES}, got {num_lanes!r}")
        self.device, self.num_lanes = device, num_lanes
        self.row_to_lane = torch.arange(num_lanes, dtype=torch.int32, device=device)
        self.lane_to_row = self.row_to_lane.clone()
        self.exit_layer, self.tickets = torch.zeros_like(self.row_to_lane), torch.zeros_like(self.row_to_lane)
        self._state = torch.zeros(3, dtype=torch.int32, device=device)  # count, moved, tick
        self.count, self.moved = self._state[:1], self._state[1:2]
        self.count.fill_(num_lanes)
        self._word = word or (extension.core.MappedWord(device.index) if self._kernel else PinnedCount(device))
        self._address = self._word.device_address if self._kernel else None
        self._tick, self._layer, self.recorded = 0, 0, False
        self._started = num_lanes

    def start(self, count: int | None = None) -> None:
        """Starts the next tick: the first `count` lanes (None: all) run again, in order. Lanes beyond take no part:
        their rows lie beyond the count, and they never exit.

        Raises ValueError for a count that is not an int from 0 to num_lanes.
        """
        count = self._bound(self.num_lanes if count is None else count)
        self._layer, self._started = 0, count
        unseen = traced(self.row_to_lane)
        begin = _START if unseen and self._kernel else _start
        begin(self.row_to_lane, self.lane_to_row, self.exit_layer, self._state, count, self._address)
        if not self._kernel:
            self._word.post(_packed(self._state, 0))
        if unseen or not captures(self.device):
            self.replayed()
        else:
            self.recorded = True

    def replayed(self) -> None:
        """Call it whenever a CUDA graph that holds a `start` is replayed: the host cannot see replays."""
        self._tick, self.recorded = (self._tick + 1) % TICKS, False

    def exit_rows(
        self,
        u: Tensor | None,
        threshold: Tensor,
        layer: int,
        *,
        bound: int,
        partner: Tensor | None = None,
        snapshot: Tensor | None = None,
    ) -> Tensor:
        """Lets the running rows with u < threshold exit after `layer`, and posts the new count. NaN never exits.

        u: float32 [bound] by row, or None; values at or beyond the count are ignored. threshold: float32 [B] by lane;
        +inf lets the lane exit whatever its u, even NaN or None.
        partner: int32 [B], the partner of each lane (itself if none): partners exit only if both may.
        layer: 1 or more, later than that of the last exit. bound: at least the running rows, at most B.
        snapshot: int32 [B], receives `lane_to_row` after the exit, to be kept with a long skip written now.
        Returns the moves for `settle_rows`, int32 [bound, 3]: an exiting row, its lane, and the row that takes its
        place (-1: none), in row order, then rows of -1.
        Raises ValueError, with nothing queued, for arguments of another dtype, shape or device.
        """
        need("u", u, (bound,), self.row_to_lane, (torch.float32,))
        need("threshold", threshold, (self.num_lanes,), self.row_to_lane, (torch.float32,))
        return self._exit(layer, bound, u=u, threshold=threshold, partner=partner, snapshot=snapshot)

    def exit_rows_where(
        self, mask: Tensor, layer: int, *, bound: int, partner: Tensor | None = None, snapshot: Tensor | None = None
    ) -> Tensor:
        """As `exit_rows`, for the running rows whose mask is true. mask: bool [bound] by row."""
        need("mask", mask, (bound,), self.row_to_lane, (torch.bool,))
        return self._exit(layer, bound, mask=mask, partner=partner, snapshot=snapshot)

    def finish(self, layer: int, *, bound: int | None = None) -> Tensor:
        """All lanes still running exit after `layer`, the last. bound (None: B) and the returned moves are as for
        `exit_rows`; no row takes another's place."""
        return self._exit(layer, self.num_lanes if bound is None else bound)

    def seen(self) -> CountSnapshot:
        """The last count of this tick that reached the host, without waiting: an upper bound on the running rows."""
        tick, layer, count = unpacked(self._word.read())
        if self.recorded or tick != self._tick or layer == 0:
            return CountSnapshot(0, self._started)
        return CountSnapshot(layer, _checked(count, layer))

    def wait(self, layer: int) -> int:
        """The number of running rows after `layer`, whose exit has been queued. Waits for the device, by polling.

        Raises RuntimeError if no exit at `layer` has been queued, or if its CUDA graph has not been replayed since.
        """
        if self.recorded:
            raise RuntimeError(f"the exit at layer {layer} is recorded in a CUDA graph, which has not been replayed")
        if not self._kernel:
            return _checked(int(self.count), layer)
        if not self._word.poll(self._tick, layer, 1.0):
            torch.cuda.synchronize(self.device)  # raises the device's error, if there was one
            if self.seen().layer < layer:
                raise RuntimeError(f"no exit at layer {layer} has been queued")
        return self.seen().count

    def snapshot(self) -> Tensor:
        """int32 [B]: the present row of each lane, to be kept with a long skip that is written now."""
        return self.lane_to_row.clone()

    def locate(self, snapshot: Tensor, bound: int) -> Tensor:
        """int32 [bound]: the row that each row had at the time of `snapshot`.

        Also valid for rows beyond the count: the result is below the bound at that time, since bounds never grow within
        a tick.
        """
        need("snapshot", snapshot, (self.num_lanes,), self.row_to_lane, (torch.int32,))
        return snapshot.index_select(0, self.row_to_lane[: self._bound(bound)])

    def _exit(
        self,
        layer: int,
        bound: int,
        u: Tensor | None = None,
        threshold: Tensor | None = None,
        mask: Tensor | None = None,
        partner: Tensor | None = None,
        snapshot: Tensor | None = None,
    ) -> Tensor:
        need("partner", partner, (self.num_lanes,), self.row_to_lane, (torch.int32,))
        need("snapshot", snapshot, (self.num_lanes,), self.row_to_lane, (torch.int32,))
        bound = self._bound(bound)
        if not isinstance(layer, int) or not self._layer < layer < TICKS:
            raise ValueError(f"layer must be an int after {self._layer}, the last, and below {TICKS}, got {layer!r}")
        self._layer = layer
        step = _EXIT if self._kernel and traced(self.row_to_lane) else _exit_rows
        given = (u, threshold, mask, partner, snapshot, bound, layer)
        moves = step(self.row_to_lane, self.lane_to_row, self.exit_layer, self._state, *given, self._address)
        if not self._kernel:
            self._word.post(_packed(self._state, layer))
        return moves

    def _bound(self, bound: int) -> int:
        if not isinstance(bound, int) or not 0 <= bound <= self.num_lanes:
            raise ValueError(f"bound must be an int from 0 to {self.num_lanes}, the lanes, got {bound!r}")
        return bound


# Each of these is one operator for a compiler. word: the address to which the kernel writes the count; None: PyTorch,
# which does not write it.


def _start(
    row_to_lane: Tensor, lane_to_row: Tensor, exit_layer: Tensor, state: Tensor, count: int, word: int | None
) -> None:
    if word is not None:
        pointers = _pointers(row_to_lane, lane_to_row, exit_layer, state)
        extension.core.start(*pointers, row_to_lane.shape[0], count, word, *_stream(row_to_lane))
        return
    torch.arange(row_to_lane.shape[0], dtype=torch.int32, device=row_to_lane.device, out=row_to_lane)
    lane_to_row.copy_(row_to_lane)
    exit_layer.zero_()
    state[:2] = 0
    state[0] += count
    state[2] += 1


def _exit_rows(
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
    word: int | None,
) -> Tensor:
    tensors, inputs = (row_to_lane, lane_to_row, exit_layer, state), (u, threshold, mask, partner)
    if word is None:
        return exit_rows_reference(*tensors, *inputs, snapshot, bound, layer)
    moves = row_to_lane.new_empty(bound, 3)
    pointers = _pointers(*tensors, *inputs, moves, snapshot)
    extension.core.compact(*pointers, bound, row_to_lane.shape[0], layer, word, *_stream(row_to_lane))
    return moves


_SET = "Tensor(a!) row_to_lane, Tensor(b!) lane_to_row, Tensor(c!) exit_layer, Tensor(d!) state"
_START = register(f"start_device_set({_SET}, SymInt count, int? word) -> ()", _start, lambda *given: None)
_EXIT = register(
    f"exit_rows({_SET}, Tensor? u, Tensor? threshold, Tensor? mask, Tensor? partner, Tensor(e!)? snapshot, "
    "SymInt bound, SymInt layer, int? word) -> Tensor",
    _exit_rows,
    lambda row_to_lane, _1, _2, _3, _4, _5, _6, _7, _8, bound, *_: row_to_lane.new_empty(bound, 3),
)


def kernel_missing(device: torch.device) -> str | None:
    """Why the kernel cannot serve on `device`, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device}"
    if extension.core is None or not extension.core.cuda_built:
        return "the extension was built without CUDA; install nvcc and install again with ADADIFF_CUDA=1"
    return None


def unpacked(word: int) -> tuple[int, int, int]:
    """(tick, layer, count) from the word on the host: 16, 16 and 32 bits, highest bits first."""
    count = word & 0xFFFFFFFF
    return word >> 48 & 0xFFFF, word >> 32 & 0xFFFF, count - (count >> 31 << 32)


def _packed(state: Tensor, layer: int) -> Tensor:
    """int64 [1]: the word for a state after `layer`, computed on the device."""
    count, _, tick = state.long().split(1)
    return (tick % TICKS << 48) | layer << 32 | count & 0xFFFFFFFF


def _checked(count: int, layer: int) -> int:
    if count < 0:
        raise RuntimeError(f"an exit at or before layer {layer} was given a bound below the running rows")
    return count


def _pointers(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _stream(tensor: Tensor) -> tuple[int, int]:
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
