"""Requests that wait for a slot.

Every request has a due time, its deadline or `max_wait` seconds after it was submitted; each level of priority moves it
`max_wait` seconds earlier. The earliest due comes first. Due times do not change, so whoever waits is overtaken only by
requests submitted within the next (priority + 1) x max_wait seconds: nobody starves.
"""

import heapq
import itertools
import math

from .handles import Handle

SLACK = 64  # ended requests that may stay besides as many as wait


class RequestQueue:
    """Locks nothing: who uses it does. Who waits is read from the handles and counted nowhere, and `add` is one call
    that a signal cannot cut in two, so that no interrupt leaves a wrong count behind."""

    def __init__(self, max_wait: float):
        self.max_wait = max_wait
        self._heap: list[tuple[float, int, Handle]] = []  # due, number, handle; ended ones are skipped later
        self._number = itertools.count()
        self._soonest = math.inf  # no deadline of those who wait is earlier
        self._ended = 0  # of those in the heap, about

    @property
    def count(self) -> int:
        """Requests that wait."""
        return sum(not handle.over for handle in self.all())

    def add(self, handle: Handle, priority: int) -> None:
        due = min(handle.deadline, handle.submitted + self.max_wait) - priority * self.max_wait
        self._soonest = min(self._soonest, handle.deadline)
        heapq.heappush(self._heap, (due, next(self._number), handle))

    def full(self, most: int) -> bool:
        """Whether `most` requests wait."""
        if len(self._heap) >= most:
            self._drop_ended()
        return len(self._heap) >= most

    def first(self) -> Handle | None:
        """The earliest due of those that have not ended."""
        while self._heap:
            if not (handle := self._heap[0][2]).over:
                return handle
            heapq.heappop(self._heap)
        return None

    def pop(self) -> None:
        """Takes out what `first` gave."""
        heapq.heappop(self._heap)

    def left(self) -> None:
        """One of those that wait has ended. They are taken out once they are many."""
        self._ended += 1
        if self._ended > SLACK and 2 * self._ended > len(self._heap):
            self._drop_ended()

    def late(self, now: float) -> list[Handle]:
        """Those past their deadlines, wherever they stand. They stay until they have ended."""
        if now < self._soonest:
            return []
        waiting = [handle for handle in self.all() if not handle.over]
        self._soonest = min((handle.deadline for handle in waiting if now < handle.deadline), default=math.inf)
        return [handle for handle in waiting if now >= handle.deadline]

    def all(self) -> list[Handle]:
        """In no order; some of them may have ended."""
        return [handle for _, _, handle in self._heap]

    def clear(self) -> None:
        self._heap.clear()

    def _drop_ended(self) -> None:
        kept = [entry for entry in self._heap if not entry[2].over]
        heapq.heapify(kept)
        self._heap, self._ended = kept, 0
