"""Pieces of a forward pass: device work over memory at fixed addresses, run eagerly or as a captured CUDA graph.

A piece is the work queued for one layer and one number of rows. The host replays it with one call instead of queueing
every kernel again. Eager work and graph share the code: the first run of a piece calls it, on the capture stream, which
compiles its kernels and lets libraries make their plans; the second run captures it, and later runs replay the graph.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Protocol

import torch

Work = Callable[[], None]
LIMIT = 4096  # graphs; one network at one capacity needs some hundreds


class Graphs(Protocol):
    """How a device captures work."""

    def aside(self, work: Work) -> None:
        """Runs the work uncaptured, on the stream of `capture`."""

    def capture(self, work: Work) -> Work:
        """Returns a function that replays the work. Raises the errors of the work, and those of the device if it cannot
        be captured."""


class CudaGraphs:
    """CUDA graphs that share one memory pool, so that temporary memory is allocated once for all pieces. Graphs are
    replayed one after the other, in any order: no piece reads pool memory of another."""

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
            # "thread_local": other threads may allocate memory meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # ignore "the capture is invalid"
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay


class Pieces:
    """Pieces by key. limit: the number of graphs kept; beyond it the least recently used one is dropped.

    A piece that the device cannot capture runs uncaptured from then on, and is logged once. If a piece raises, the
    error propagates and the piece is not kept.
    """

    def __init__(self, graphs: Graphs, limit: int = LIMIT) -> None:
        self._graphs, self._limit = graphs, limit
        self._known: OrderedDict[Hashable, Work | None] = OrderedDict()  # None: has run once
        self._uncaptured: set[Hashable] = set()

    def __len__(self) -> int:
        return sum(replay is not None for replay in self._known.values())

    def run(self, key: Hashable, work: Work) -> None:
        """Queues the piece `key`; its work must be the same at every call."""
        replay = self._known.get(key)
        if replay is None:
            replay = self._first_runs(key, work)
        else:
            self._known.move_to_end(key)
        if replay is not None:
            replay()

    def _first_runs(self, key: Hashable, work: Work) -> Work | None:
        """Runs or captures the work; returns the replay function, or None if the work has been run."""
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
