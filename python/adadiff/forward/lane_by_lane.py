"""Blocks lane by lane, so that a lane's bits are the same in any batch; on a CPU as many lanes at once as PyTorch has
threads, each on one.

One thread for a lane makes its bits those of that thread's arithmetic alone, whatever else runs and however many
threads there are; and lanes that run at the same time need not wait for each other inside every product.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor, nn

from adadiff_kernels import LayerScores

from ..models.interface import Backbone, Block, Conditioning
from ..uem import Exits
from .options import ExecutionOptions
from .placement import DevicePlacement, HostPlacement, Skip
from .structure import Structure

Result = TypeVar("Result")


class LaneRunner:
    """As `BlockRunner`. Everything is copied to memory of its own first: how a product rounds may depend on
    alignment."""

    anybody = True

    def __init__(
        self, backbone: Backbone, exits: Exits | None, execution: ExecutionOptions, structure: Structure, host: bool
    ):
        self._backbone, self._exits = backbone, exits
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
            own = None if skip is None else skip.rows[source : source + 1].clone()
            y = block(hidden[row : row + 1].clone(), self._conds[lane], own)
            out[row] = y[0]
            return self._scores[lane](y, layer, self._only) if scored else None

        u = lane_by_lane(one, n, hidden.device)
        return out, torch.cat(u) if scored else None

    def head(self, head: nn.Module, patches: Tensor, lanes: Tensor) -> Tensor:
        lanes = lanes.tolist()

        def one(row: int) -> Tensor:
            return head(patches[row : row + 1].clone(), self._conds[lanes[row]], self._only)

        return torch.cat(lane_by_lane(one, len(lanes), patches.device))


def lane_by_lane(work: Callable[[int], Result], n: int, device: torch.device) -> list[Result]:
    """[work(0), ..., work(n - 1)], without gradients. On a CPU from several threads at once, one for each call.

    Where a call raises, its error is raised when every thread has stopped.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu":
        return [work(lane) for lane in range(n)]
    todo, results = deque(range(n)), [None] * n  # every entry is written, or an error raised
    inference = torch.is_inference_mode_enabled()  # a setting of a thread, as is no_grad

    def some() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while todo:
                try:
                    lane = todo.popleft()
                except IndexError:  # another thread was quicker
                    return
                results[lane] = work(lane)

    pool = _pool(threads, os.getpid())  # threads do not survive a fork
    running = [pool.submit(some) for _ in range(min(threads, n))]
    try:
        wait(running, return_when="FIRST_EXCEPTION")
    finally:
        todo.clear()  # after an error, or Ctrl-C, nobody begins another
    for future in running:
        future.result()
    return results


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """That many workers of one PyTorch thread each."""
    ready = Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first use of PyTorch resets its number, hence before
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "adadiff-lane", start)
    for _ in range(threads):
        pool.submit(ready.wait)  # one that waits takes no second, so each has a thread
    ready.wait()
    torch.set_num_threads(threads)  # a worker sets its own number and that of threads yet to come; here, theirs again
    return pool
