"""Lane by lane on a CPU: each on one thread, as many lanes at once as PyTorch has threads.

One thread a lane makes its bits those of that thread's arithmetic alone, whatever else runs and however many threads
there are; and lanes that run beside each other need not wait for each other inside every product.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

Result = TypeVar("Result")


def lane_by_lane(work: Callable[[int], Result], n: int, device: torch.device) -> list[Result]:
    """[work(0), ..., work(n - 1)], without gradients. On a CPU from several threads at once, one for each call.

    Where a call raises, its error is raised when every thread has stopped.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu":
        return [work(lane) for lane in range(n)]
    todo, results = deque(range(n)), [None] * n
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
