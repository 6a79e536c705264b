"""Requests that wait for a slot.

Every request has a due time, its deadline or `max_wait` seconds after it was submitted; each level of priority moves it
`max_wait` seconds earlier. The earliest due comes first. Due times do not change, so whoever waits is overtaken only by
requests submitted within the next (priority + 1) x max_wait seconds: nobody starves.
"""

import heapq
import itertools
import math

from .handles import Handle

SLACK = 64  # ended requests that may stay besides twice those that wait


class RequestQueue:
    """`count` requests, without those that have ended. Locks nothing: who uses it does."""

    def __init__(self, max_wait: float):
        self.max_wait, self.count = max_wait, 0
        self._heap: list[tuple[float, int, Handle]] = []  # due, number, handle; ended ones are skipped later
        self._number = itertools.count()
        self._soonest = math.inf  # no deadline of those who wait is earlier

    def add(self, handle: Handle, priority: int) -> None:
        due = min(handle.deadline, handle.submitted + self.max_wait) - priority * self.max_wait
        heapq.heappush(self._heap, (due, next(self._number), handle))
        self._soonest = min(self._soonest, handle.deadline)
        self.count += 1

    def first(self, now: float) -> Handle | None:
        """The earliest due of those that have not ended and are not too late."""
        while self._heap:
            handle = self._heap[0][2]
            if not handle.done() and now < handle.deadline:
                return handle
            heapq.heappop(self._heap)
        return None

    def pop(self) -> None:
        """Takes out what `first` gave. It counts until `left` is called."""
        heapq.heappop(self._heap)

    def left(self) -> None:
        """One that was counted has got a slot, or has ended."""
        self.count -= 1
        if len(self._heap) > SLACK + 2 * self.count:
            self._heap = [entry for entry in self._heap if not entry[2].done()]
            heapq.heapify(self._heap)

    def late(self, now: float) -> list[Handle]:
        """Those past their deadlines, wherever they stand. They stay until they have ended."""
        if now < self._soonest:
            return []
        waiting = [handle for handle in self.all() if not handle.done()]
        self._soonest = min((handle.deadline for handle in waiting if now < handle.deadline), default=math.inf)
        return [handle for handle in waiting if now >= handle.deadline]

    def all(self) -> list[Handle]:
        """In no order; some of them may have ended."""
        return [handle for _, _, handle in self._heap]

    def clear(self) -> list[Handle]:
        """Takes all of them out, and returns them."""
        handles = self.all()
        self._heap.clear()
        return handles
