"""Requests in flight: their slots in the batch, and the results of each tick."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..sampling.arriving import Arriving
from ..sampling.batch import Batch
from ..sampling.faults import is_interrupt
from ..sampling.records import PassRecord
from ..sampling.tick import Tick
from .handles import Handle
from .request_queue import RequestQueue

_ONLY = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class Leaving:
    """A request whose sample is done and has left its slot, while its image is copied to the host. slot: slot and
    tenancy, to find the records of its last step."""

    handle: Handle
    slot: tuple[int, int]
    images: Arriving  # all images that were done in this tick
    index: int

    def end(self, now: float) -> None:
        if self.handle.over:
            return
        try:
            image = self.images.read()[self.index].clone()
            error = None if bool(image.isfinite().all()) else FloatingPointError("the image holds NaN or infinity")
        except Exception as failure:  # a device error
            image, error = None, failure
        self.handle._end(now, **({"image": image} if error is None else {"error": error}))


class Running:
    """Requests by slot. Not thread-safe: the engine's step holds a lock, and callers of `begin` and `start_over` hold
    that of the queue.

    A signal may interrupt a method anywhere. `batch.whole` is False wherever that could leave inconsistent state, which
    `start_over` then resets.
    """

    def __init__(self, make_batch: Callable[[], Batch], waiting: RequestQueue, clock: Callable[[], float]):
        self._make_batch, self._waiting, self._clock = make_batch, waiting, clock
        self.batch = make_batch()
        self._at: dict[int, Handle] = {}  # slot -> request
        self._leaving: list[Leaving] = []

    def __len__(self) -> int:
        return len(self._at) + len(self._leaving)

    @property
    def handles(self) -> list[Handle]:
        return [*self._at.values(), *(one.handle for one in self._leaving)]

    @property
    def lanes(self) -> float:
        """The most lanes of a forward pass; requests that cache features count for more, see `Rooms`."""
        return sum(handle._lanes for handle in self._at.values())

    def begin(self, handle: Handle, now: float) -> BaseException | None:
        """Gives the first waiting request, `handle`, a slot. Returns the error if it cannot begin."""
        free = self.batch.free
        try:
            slot = int(self.batch.admit(handle.samples, _ONLY)[0])
        except BaseException as error:
            if is_interrupt(error) or self.batch.free != free:  # raised by a signal handler
                raise
            return error
        self._at[slot], handle._admitted = handle, now
        handle._slot = slot, self.batch.tenancy(slot)
        self._waiting.take(handle)
        return None

    def tick(self) -> bool:
        """Advances all requests by one step. Returns False if there are none."""
        if not len(self):
            return False
        if self.batch.count:
            self._deliver(self.batch.tick())  # sets batch.whole to False when it begins to write
        else:
            self.batch.whole = False
            self._end_leaving(self.batch.flush())
        self.batch.whole = True
        return True

    def start_over(self) -> None:
        """Restarts all requests in flight from their seeds, after a signal interrupted writing and left the state
        unknown."""
        fresh = self._make_batch()
        fresh.totals, fresh.whole = self.batch.totals, False
        self.batch = fresh
        for slot, handle in list(self._at.items()):
            self._begin_again(handle)
            del self._at[slot]
        while self._leaving:
            self._begin_again(self._leaving[-1].handle)
            self._leaving.pop()
        fresh.whole = True

    def _begin_again(self, handle: Handle) -> None:
        if not handle.over:
            handle._begin_again()
            if handle not in self._waiting.all():
                self._waiting.add(handle)

    def drop_ended(self) -> None:
        """Frees the slots of requests that were cancelled or are past their deadline."""
        now = self._clock()
        for slot, handle in list(self._at.items()):
            if not handle.over and now < handle.deadline:
                continue
            if not handle.over:
                handle._end_late(now)
            self._give_up(slot)

    def give_up_all(self) -> None:
        while self._at:
            self._give_up(next(iter(self._at)))
        self._leaving = []

    def forget(self) -> None:
        """Drops all requests without ending them, in a forked process."""
        self._at.clear()
        self._leaving = []

    def predicted_x0(self, handle: Handle) -> Arriving:
        if handle._slot is None or self._at.get(handle._slot[0]) is not handle:
            raise ValueError("this request is not in flight: it waits, or has ended")
        return Arriving(self.batch.predicted_x0(handle._slot[0]))

    def _give_up(self, slot: int) -> None:
        del self._at[slot]
        self.batch.release(np.array([slot]))

    def _deliver(self, tick: Tick) -> None:
        self._end_leaving(tick.records)
        for slot, error in tick.failed.items():
            self._at[slot]._end(self._clock(), error=error)
            self._give_up(slot)
        images = self._images(tick.done)
        for slot in tick.slots.tolist():
            handle = self._at[slot]
            handle._made += 1
            error = _call_back(handle)
            image = images.get(slot)
            if error is None and isinstance(image, Exception):
                error = image
            if error is not None:
                handle._end(self._clock(), error=error)
            elif image is None:
                continue
            else:
                self._leaving.append(Leaving(handle, handle._slot, *image))
            self._give_up(slot)
        if not self.batch.late:
            self._end_leaving(())

    def _end_leaving(self, records: Sequence[PassRecord]) -> None:
        """Gives records of the previous tick to their requests, and ends the requests whose last step that was."""
        slots = {one.slot: one.handle for one in self._leaving}
        for record in records:
            known, keys = record.read(), zip(record.slots.tolist(), record.tenancy.tolist(), strict=True)
            for i, key in enumerate(keys):
                handle = self._at.get(key[0])
                if handle is None or handle._slot != key:  # the request has left the slot
                    handle = slots.get(key)
                if handle is not None:
                    handle._learn(known, i)
        for one in self._leaving:
            one.end(self._clock())
        self._leaving = []

    def _images(self, done: np.ndarray) -> dict[int, tuple[Arriving, int] | Exception]:
        """By slot: the copy of the images to the CPU and the index in it, or the error."""
        if not len(done):
            return {}
        try:
            images = Arriving(self.batch.peek(done))
            return {slot: (images, i) for i, slot in enumerate(done.tolist())}
        except Exception as error:  # out of memory, most likely
            if len(done) == 1:
                return {int(done[0]): error}
            half = len(done) // 2
            return self._images(done[:half]) | self._images(done[half:])


def _call_back(handle: Handle) -> BaseException | None:
    """Calls the request's `on_step`. Returns its exception."""
    try:
        if handle._on_step is not None and not handle.over:
            handle._on_step(handle)
    except BaseException as error:
        return error
    return None
