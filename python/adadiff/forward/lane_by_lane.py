"""Runs blocks lane by lane, so that a lane's result is bit-identical in any batch. On a CPU as many lanes run in
parallel as PyTorch has threads, each lane on one thread.

With one thread per lane the bits do not depend on the number of threads or on other lanes, and parallel lanes need not
synchronise inside every matrix product.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from queue import SimpleQueue
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from adadiff_kernels import LayerScores

from ..models.interface import Backbone, Block, Conditioning, FusableBlock
from ..uem import Exits
from .options import ExecutionOptions
from .placement import DevicePlacement, HostPlacement, Skip
from .runner import read_by
from .structure import Structure

Result = TypeVar("Result")


class LaneRunner:
    """As `BlockRunner`, lane by lane. Inputs are first copied to new memory, since the rounding of a matrix product may
    depend on alignment."""

    anybody, normed = True, None

    def __init__(
        self, backbone: Backbone, exits: Exits | None, execution: ExecutionOptions, structure: Structure, host: bool
    ):
        self._backbone, self._exits, self._first = backbone, exits, structure.blocks[0]
        self._conds: list[Conditioning] = []
        self._scores: list[LayerScores | None] = []

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None, scored: bool, limits: Tensor | None) -> Tensor:
        if not len(x):
            return self._backbone.embed(x, t, context)[0]
        exits = self._exits
        self._only = torch.zeros(1, dtype=torch.int32, device=x.device)  # the one lane of each call

        def one(lane: int) -> tuple[Tensor, Conditioning, LayerScores | None]:
            x_, t_, context_ = (v[lane : lane + 1].clone() if v is not None else None for v in (x, t, context))
            hidden, cond = self._backbone.embed(x_, t_, context_)
            if not scored:
                return hidden, cond, None
            return hidden, cond, LayerScores(exits.weight, exits.offsets(cond.time, t_), exits.num_prefix_tokens)

        hidden, self._conds, self._scores = zip(*lane_by_lane(one, len(x), x.device), strict=True)
        return torch.cat(hidden)

    def block(
        self,
        block: Block,
        layer: int,
        hidden: Tensor,
        skip: Skip | None,
        placement: HostPlacement | DevicePlacement,
        scored: bool,
    ) -> tuple[Tensor, Tensor | None]:
        n, out, lanes = len(hidden), torch.empty_like(hidden), placement.row_to_lane.tolist()
        index = None if skip is None else skip.row_index
        sources = range(n) if index is None else index.tolist()

        def one(row: int) -> Tensor | None:
            lane, source = lanes[row], sources[row]
            joined = None if skip is None else skip.rows[source : source + 1].clone()
            y = self._one(block, layer, lane, hidden[row : row + 1].clone(), joined)
            out[row] = y[0]
            return self._scores[lane](y, layer, self._only) if scored else None

        u = lane_by_lane(one, n, hidden.device)
        return out, torch.cat(u) if scored else None

    def first_read(self, hidden: Tensor) -> Tensor:
        branch = cast(FusableBlock, self._first).branches[0]

        def one(lane: int) -> Tensor:
            return read_by(branch, hidden[lane : lane + 1].clone(), self._conds[lane], self._only)

        return torch.cat(lane_by_lane(one, len(hidden), hidden.device)) if len(hidden) else hidden

    def _one(self, block: Block, layer: int, lane: int, x: Tensor, skip: Tensor | None) -> Tensor:
        """Block `layer` for one lane, x: [1, T, D], a copy."""
        return block(x, self._conds[lane], skip)

    def head(self, head: nn.Module, patches: Tensor, lanes: Tensor) -> Tensor:
        lanes = lanes.tolist()

        def one(row: int) -> Tensor:
            return head(patches[row : row + 1].clone(), self._conds[lanes[row]], self._only)

        return torch.cat(lane_by_lane(one, len(lanes), patches.device))


def lane_by_lane(work: Callable[[int], Result], n: int, device: torch.device) -> list[Result]:
    """[work(0), ..., work(n - 1)], without gradients. On a CPU the calls run in parallel, each on one thread.

    If a call raises, its error is raised once every thread has stopped.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu":
        return [work(lane) for lane in range(n)]
    todo, results = deque(range(n)), [None] * n  # every entry is written unless an error is raised
    inference = torch.is_inference_mode_enabled()  # set per thread, like no_grad
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def some() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():
                while todo:
                    try:
                        lane = todo.popleft()
                    except IndexError:  # another thread took the last one
                        break
                    results[lane] = work(lane)
            ended.put(None)
        except BaseException as error:
            todo.clear()  # no thread begins another lane
            ended.put(error)

    workers = _workers(threads, os.getpid())  # threads do not survive a fork
    parts = min(threads, n)
    try:
        for _ in range(parts):
            workers.start(some)
        errors = [ended.get() for _ in range(parts)]
    except BaseException:  # Ctrl-C
        todo.clear()
        raise
    for error in errors:
        if error is not None:
            raise error
    return results


class _Workers:
    """Worker threads, each with one PyTorch thread. Work comes through a queue implemented in C: with locks held in
    Python, as in `concurrent.futures`, a signal handler that raises could leave a lock held and block later passes."""

    def __init__(self, threads: int):
        self._threads = threads
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        ready: SimpleQueue[None] = SimpleQueue()
        try:
            for _ in range(threads):
                queues = self._work, ready
                threading.Thread(target=_serve, args=queues, name="adadiff-lane", daemon=True).start()
            for _ in range(threads):
                ready.get()
        finally:
            # a worker's set_num_threads also sets the default of new threads; restore it
            torch.set_num_threads(threads)

    def start(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def __del__(self) -> None:
        for _ in range(self._threads):
            self._work.put(None)


def _serve(todo: "SimpleQueue[Callable[[], None] | None]", ready: "SimpleQueue[None]") -> None:
    torch.get_num_threads()  # a thread's first use of PyTorch resets its number, so call it first
    torch.set_num_threads(1)
    ready.put(None)
    while (work := todo.get()) is not None:
        work()
        del work  # frees what it holds


@lru_cache(maxsize=1)
def _workers(threads: int, process: int) -> _Workers:
    return _Workers(threads)
