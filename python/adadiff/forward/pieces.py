"""Pieces of a forward pass: device work over memory whose addresses stay, run as it is or as a captured CUDA graph.

A piece is what is queued for one layer and one number of rows. The host replays it with one call instead of queueing
every kernel anew. Work and graph are one code: the first run of a piece calls it, on the stream that captures, which
compiles its kernels and makes the plans of the libraries; the second run captures it, and later ones replay that.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Protocol

import torch

Work = Callable[[], None]
LIMIT = 4096  # graphs; those of one network and capacity are some hundreds


class Graphs(Protocol):
    """How a device captures work."""

    def aside(self, work: Work) -> None:
        """Does the work, where `capture` would capture it."""

    def capture(self, work: Work) -> Work:
        """What replays the work. Raises what the work raises, or the device where it cannot be captured."""


class CudaGraphs:
    """CUDA graphs that share one pool of memory, so that what a piece allocates on its way costs its memory once. They
    are replayed one after the other, in any order: nothing that is in the pool is read by another piece."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def aside(self, work: Work) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            current.wait_stream(self._stream)

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # other threads may go on allocating memory
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # that the capture is void
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay


class Pieces:
    """limit: of graphs; the least recently used one is dropped beyond it.

    A piece that the device cannot capture runs uncaptured from then on, which one log line says. What a piece raises is
    raised, and nothing is kept of it.
    """

    def __init__(self, graphs: Graphs, limit: int = LIMIT) -> None:
        self._graphs, self._limit = graphs, limit
        self._known: OrderedDict[Hashable, Work | None] = OrderedDict()  # None: has run once
        self._uncaptured: set[Hashable] = set()

    def __len__(self) -> int:
        return sum(replay is not None for replay in self._known.values())

    def run(self, key: Hashable, work: Work) -> None:
        """Queues the piece `key`, whose work is the same at every call."""
        replay = self._known.get(key)
        if replay is None:
            replay = self._first_runs(key, work)
        else:
            self._known.move_to_end(key)
        if replay is not None:
            replay()

    def _first_runs(self, key: Hashable, work: Work) -> Work | None:
        """None if the work is done."""
        if key in self._known and key not in self._uncaptured:
            try:
                replay = self._graphs.capture(work)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._uncaptured.add(key)
                _log.warning("%s could not be captured in a CUDA graph, and runs without one: %s", key, error)
            else:
                self._keep(key, replay)
                return replay
        self._graphs.aside(work)
        self._keep(key, None)
        return None

    def _keep(self, key: Hashable, replay: Work | None) -> None:
        self._known[key] = replay
        self._known.move_to_end(key)
        while len(self._known) > self._limit:
            self._known.popitem(last=False)


_log = logging.getLogger("adadiff")
