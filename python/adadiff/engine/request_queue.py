"""Requests that wait for a slot.

Every request has a due time: its deadline, or `max_wait` seconds (with admission "work" a share of them, see
admission.py) after it was submitted, whichever is earlier; each level of priority moves it `max_wait` seconds earlier.
The earliest due time comes first. A request is overtaken only by requests submitted within the next (p + 1) x max_wait
seconds, where p is the difference in priority, so no request starves.
"""

import heapq
import itertools
import math

import numpy as np

from ..sampling.sample_batch import SampleBatch
from .admission import ExpectedWork, Kind
from .handles import Handle

SLACK = 64  # ended requests that may stay in the heap, beside as many as are waiting


class RequestQueue:
    """Not thread-safe: callers hold the engine's lock. The number of waiting requests is derived from the handles
    rather than counted, and adding is one C call, so that a signal cannot leave a wrong count. work: None for admission
    "arrival"."""

    def __init__(self, max_wait: float, work: ExpectedWork | None = None):
        self.max_wait, self._work = max_wait, work
        self._heap: list[tuple[float, int, Handle]] = []  # due, number, handle; ended handles are skipped later
        self._number = itertools.count()
        self._soonest = math.inf  # a lower bound on the deadlines of waiting requests
        self._ended = 0  # ended requests in the heap, approximately

    @property
    def count(self) -> int:
        """Requests that wait."""
        return sum(not handle.over for handle in self.all())

    def kind_of(self, samples: SampleBatch) -> Kind | None:
        """The kind of a request, for `Handle.kind`. Needs no lock."""
        return None if self._work is None else self._work.kind_of(samples)

    def add(self, handle: Handle) -> None:
        self._soonest = min(self._soonest, handle.deadline)
        heapq.heappush(self._heap, (self._due(handle), next(self._number), handle))

    def full(self, most: int) -> bool:
        """Whether `most` requests wait."""
        if len(self._heap) >= most:
            self._renew()
        return len(self._heap) >= most

    def first(self) -> Handle | None:
        """The waiting request with the earliest due time."""
        while self._heap:
            if not (handle := self._heap[0][2]).over:
                return handle
            self.take(handle)
        return None

    def take(self, handle: Handle) -> None:
        """Removes `handle`, which `first` returned, even if a signal handler has since added an earlier request."""
        entry = heapq.heappop(self._heap)
        if entry[2] is not handle:
            heapq.heappush(self._heap, entry)
            self._heap.remove(next(entry for entry in self._heap if entry[2] is handle))
            heapq.heapify(self._heap)

    def left(self) -> None:
        """Notes that a waiting request has ended. Ended requests are removed once there are many."""
        self._ended += 1
        if self._ended > SLACK and 2 * self._ended > len(self._heap):
            self._renew()

    def learn(self, handle: Handle) -> None:
        """Learns from a finished request. The first one of a kind also updates waiting requests of that kind."""
        if self._work is None or handle.kind is None:
            return
        new = self._work.learn(handle.kind, np.array([layers for layers, _, _ in handle._steps]))
        if new and any(name in new for other in self.all() for name in other.kind.names):
            self._renew()

    def late(self, now: float) -> list[Handle]:
        """Waiting requests past their deadlines. They stay in the queue until they have ended."""
        if now < self._soonest:
            return []
        waiting = [handle for handle in self.all() if not handle.over]
        self._soonest = min((handle.deadline for handle in waiting if now < handle.deadline), default=math.inf)
        return [handle for handle in waiting if now >= handle.deadline]

    def all(self) -> list[Handle]:
        """All requests in the heap, in no order; some may have ended."""
        return [handle for _, _, handle in self._heap]

    def clear(self) -> None:
        self._heap.clear()

    def _due(self, handle: Handle) -> float:
        share = 1.0 if self._work is None or handle.kind is None else self._work.share(handle.kind)
        due = min(handle.deadline, handle.submitted + share * self.max_wait)
        return due - handle.priority * self.max_wait

    def _renew(self) -> None:
        """Rebuilds the heap without ended requests, with present estimates of work."""
        seen = self._heap.copy()
        kept = [(self._due(handle), number, handle) for _, number, handle in seen if not handle.over]
        heapq.heapify(kept)
        replaced, self._heap, self._ended = self._heap, kept, 0  # no call in between, so no signal handler runs
        if len(replaced) > len(seen):  # requests that a signal handler added meanwhile
            numbers = {number for _, number, _ in seen}
            for entry in replaced:
                if entry[1] not in numbers:
                    heapq.heappush(self._heap, entry)
